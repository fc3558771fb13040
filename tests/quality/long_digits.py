"""The demo's model, trained as long as the demo does: the digit of every test run, and more."""

import pytest
from test_digits import assert_forgotten_and_the_others_stay


@pytest.mark.parametrize("digit", ["seven", "zero", "three"])
def test_a_digit_is_forgotten_and_the_others_stay(tmp_path, model_cache, digit):
    assert_forgotten_and_the_others_stay(digit, tmp_path / "run", model_cache)
