"""Inductor's gradients of what the losses share; every loss and option is in `long_compiled_losses.py`."""

from __future__ import annotations

import pytest
from compiled_losses import assert_compiled_right
from loss_cases import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_gives_the_gradients_of_the_float64_reference(backend):
    # eager's own operations are compiled, which takes long: those of one loss
    assert_compiled_right(backend, ("clip",) if backend == "eager" else ("cliperase",))
