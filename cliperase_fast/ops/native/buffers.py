"""Tensors as the extension takes them: where, of what type, how large, laid out how and on which device.

The extension checks each against what it is going to read or write, and raises ValueError instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def as_buffer(module: Any, tensor: Tensor) -> Any:
    """`tensor` as the Buffer of `module`, one of the extension's halves; the buffer keeps the tensor alive."""
    return module.Buffer(
        tensor.data_ptr(), _dtype(tensor.dtype), tensor.shape, tensor.stride(), _device(tensor.device), tensor
    )


def as_buffer_or_none(module: Any, tensor: Tensor | None) -> Any:
    """The same; None where there is nothing to read or write."""
    return None if tensor is None or tensor.numel() == 0 else as_buffer(module, tensor)


@cache
def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _device(device: torch.device) -> str:
    return str(device)
