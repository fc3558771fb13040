"""Run code under torch's initial defaults, whatever the user's defaults are.

The package's own allocations name their dtype and device, but the libraries that it calls (models, transforms, data
loaders, optimizers) follow `torch.set_default_dtype` and `torch.set_default_device`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import overrides
from torch.utils._device import DeviceContext


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Give torch its initial defaults, float32 and the CPU, inside a block or a decorated function.

    The caller's defaults are restored afterwards. The default dtype belongs to the process, so other threads see the
    change too.
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
def plain_torch() -> Iterator[None]:
    """Give torch its initial defaults, and leave the caller's autocast and inference mode, in a block or a function.

    For work that is complete in itself: the caller's autocast would round its products, those of a backward pass too,
    and nothing made in inference mode can be trained.
    """
    with torch_defaults(), ExitStack() as modes:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def _no_default_device() -> Iterator[None]:
    """Remove the default device inside the block.

    Another `with torch.device("cpu")` is not enough: a default device is a torch function mode, and under such a mode
    torch.nn does not use its fused attention, whose results differ in the last bits.
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
