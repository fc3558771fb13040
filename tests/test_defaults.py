"""What torch does by default while the package works, and afterwards."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch_defaults import DEFAULTS, torch_default

import cliperase_fast as cf
from cliperase_fast.defaults import torch_defaults


@pytest.mark.parametrize("default", DEFAULTS)
def test_inside_tensors_are_float32_on_the_cpu_and_outside_what_the_user_set(default):
    with torch_default(default):
        outside = torch.empty(1)
        with torch_defaults():
            inside = torch.empty(1)
        again = torch.empty(1)
        with pytest.raises(ValueError, match="failed"), torch_defaults():
            raise ValueError("failed")
        after_an_error = torch.empty(1)
    assert (inside.dtype, inside.device) == (torch.float32, torch.device("cpu"))
    for found in (again, after_an_error):
        assert (found.dtype, found.device) == (outside.dtype, outside.device) != (inside.dtype, inside.device)


def test_a_device_that_a_with_block_set_counts_like_the_default():
    with torch.device("meta"):
        with torch_defaults():
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).is_meta


def test_without_other_defaults_nothing_is_entered():
    before = torch.overrides._get_current_function_mode_stack()
    with torch_defaults():
        assert torch.overrides._get_current_function_mode_stack() == before


def test_functions_keep_their_signatures():
    assert list(inspect.signature(cf.unlearn).parameters)[:3] == ["model", "forget", "retain"]
    assert list(inspect.signature(cf.evaluate).parameters)[:2] == ["model", "data"]
