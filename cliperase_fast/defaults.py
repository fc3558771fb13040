"""What torch does without being told, kept out of the package's results.

`torch.set_default_dtype` and `torch.set_default_device` are for code of one's own. The package's allocations name their
dtype and device, but the libraries that it calls (models, transforms, data loaders, optimizers) do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import overrides
from torch.utils._device import DeviceContext


@contextmanager
def torch_defaults() -> Iterator[None]:
    """A context, and a decorator, in which torch has the defaults it starts with: float32 and the CPU.

    The caller's come back afterwards. The default dtype is the process's: other threads see it change for as long.
    """
    dtype = torch.get_default_dtype()
    try:
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
        with _no_default_device():
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


@contextmanager
def _no_default_device() -> Iterator[None]:
    """As if no default device had ever been set.

    One more `with torch.device("cpu")` would not do: under a mode, which a default device is, torch.nn leaves out its
    fused attention, whose results differ in the last bits.
    """
    modes = overrides._get_current_function_mode_stack()
    others = [mode for mode in modes if not isinstance(mode, DeviceContext)]
    if len(others) == len(modes):
        yield
        return
    _replace_modes(others)
    try:
        yield
    finally:
        _replace_modes(modes)


def _replace_modes(modes: list[overrides.TorchFunctionMode]) -> None:
    for _ in overrides._get_current_function_mode_stack():
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)
