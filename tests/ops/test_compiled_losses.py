"""Inductor's gradients of the losses, against the float64 reference."""

from __future__ import annotations

import pytest
from compiled_losses import assert_compiled_right
from loss_cases import BACKENDS, losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_gives_the_gradients_of_the_float64_reference(backend):
    # eager's own operations are compiled, which takes long: those of one loss
    assert_compiled_right(backend, ("clip",) if backend == "eager" else ("cliperase",))


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_gives_the_gradients_of_every_loss(backend):
    assert_compiled_right(backend, tuple(losses(backend)))
