"""torch.set_default_dtype and torch.set_default_device do not change the losses of the backend "triton".

Run by `test_triton_interpreter.py`.
"""

from __future__ import annotations

import pytest
import torch
from default_losses import CASES
from torch_defaults import DEFAULTS, assert_independent

FEW = ("clip, groups", "similarity_kl, similarities kept", "cliperase, hinge, features", "sigmoid, numbers")


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("case", FEW)
def test_losses_and_gradients_do_not_depend_on_the_defaults_of_torch(case, default):
    assert_independent(default, lambda: CASES[case]("triton", torch.float32))
