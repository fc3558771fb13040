"""Buffers that differ from what a call of the extension needs, in each of the ways that it checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cliperase_fast.ops.native.extension import as_buffer

CANARY = 77.0


def with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0] if tensor.ndim else tensor[None].expand(2)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T if tensor.ndim == 2 else with_gaps(tensor)


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda tensor: tensor.double(),
    "half the bytes": lambda tensor: tensor.to(torch.bool if tensor.dtype == torch.uint8 else torch.int16),
    "too small": lambda tensor: tensor[:-1] if tensor.ndim else tensor.new_empty(0),
    "too narrow": lambda tensor: tensor[..., :-1] if tensor.ndim else tensor.new_empty(0),
    "too large": lambda tensor: torch.cat((tensor, tensor)) if tensor.ndim else tensor.new_empty(2),
    "flat": lambda tensor: tensor[None],
    "with gaps": with_gaps,
    "transposed": transposed,
    "all one element": lambda tensor: tensor.new_zeros(()).expand(tensor.shape if tensor.ndim else (2,)),
    "on another device": lambda tensor: tensor.to("meta"),
}
UNREADABLE = {
    "null": lambda address: 0,
    "misaligned": lambda address: address + 1,
    "at the end": lambda address: 2**64 - 4,
}


def forged(module, tensor: Tensor, address: Callable[[int], int]):
    good = str(tensor.dtype)[6:], tuple(tensor.shape), tensor.stride(), str(tensor.device), tensor
    return module.Buffer(address(tensor.data_ptr()), *good)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def written(tensors: dict[str, Tensor], before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if _bits(tensor) != _bits(before[name])]


def as_buffers(module, tensors: dict[str, Tensor]) -> dict:
    return {name: as_buffer(module, tensor) for name, tensor in tensors.items()}
