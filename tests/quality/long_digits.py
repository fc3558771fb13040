"""More digits than the one that every test run makes the demo forget."""

import pytest
from test_digits import assert_forgotten_and_the_others_stay


@pytest.mark.parametrize("digit", ["zero", "three"])
def test_a_digit_is_forgotten_and_the_others_stay(tmp_path, model_cache, digit):
    assert_forgotten_and_the_others_stay(digit, tmp_path / "run", model_cache)
