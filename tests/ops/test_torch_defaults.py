"""torch.set_default_dtype and torch.set_default_device leave every loss as it is, to the bit."""

from __future__ import annotations

import pytest
import torch
from default_losses import CASES
from sweep_cases import CPU_BACKENDS
from torch_defaults import DEFAULTS, assert_independent


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_do_not_depend_on_the_defaults_of_torch(case, backend, default):
    dtypes = [torch.float32, torch.bfloat16] + [torch.float64] * (backend != "native")
    for dtype in dtypes:
        assert_independent(default, lambda dtype=dtype: CASES[case](backend, dtype))
