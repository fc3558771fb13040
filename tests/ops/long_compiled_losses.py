"""Every public loss and option compiled by inductor, which takes minutes."""

from __future__ import annotations

import pytest
from compiled_losses import assert_compiled_right
from loss_cases import BACKENDS, losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_gives_the_gradients_of_every_loss(backend):
    assert_compiled_right(backend, tuple(losses(backend)))
