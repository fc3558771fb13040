"""Weights in float32 for the work, and back in the types that they came in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import ClipAdapter


def in_float32(adapter: ClipAdapter) -> ClipAdapter:
    """An adapter whose floating-point weights are all float32: the same one, or a copy where they are not.

    float16 and bfloat16 widen exactly; float64 is rounded.
    """
    if all(tensor.dtype == torch.float32 for _, tensor in _floating(adapter.module)):
        return adapter
    twin = adapter.clone()
    twin.module.float()
    return twin


def weight_dtypes(adapter: ClipAdapter) -> str:
    """The types of the floating-point parameters, the most frequent first: "bfloat16", "float16 and float32"."""
    counts: dict[str, int] = {}
    for parameter in adapter.module.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return " and ".join(sorted(counts, key=lambda name: -counts[name]))


def in_dtypes_of(given: ClipAdapter, adapter: ClipAdapter) -> ClipAdapter:
    """A copy of `adapter`, each weight rounded to the dtype that it has in `given`.

    adapter: of the same structure, in float32. A value that equals the float32 of `given`'s comes back with `given`'s
    own bits, so that what was not trained is unchanged in float64 too.
    """
    twin = adapter.clone()
    originals = dict(_floating(given.module))
    with torch.no_grad():
        for name, parameter in twin.module.named_parameters():
            if name in originals:
                parameter.data = _rounded(parameter.data, originals[name])
        for prefix, owner in twin.module.named_modules():
            for name, buffer in owner._buffers.items():
                key = f"{prefix}.{name}" if prefix else name
                if buffer is not None and key in originals:
                    owner._buffers[name] = _rounded(buffer, originals[key])
    return twin


def _rounded(value: Tensor, original: Tensor) -> Tensor:
    original = original.detach()
    if value.dtype == original.dtype:
        return value
    return torch.where(value == original.to(value.dtype), original, value.to(original.dtype))


def _floating(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            if tensor.is_floating_point():
                yield name, tensor


def remedy_for_types(error: Exception) -> str:
    """What to do about an error of an encoder that runs in float32, where it is about types; else nothing."""
    if not any(word in str(error) for word in ("dtype", "Half", "BFloat16", "Double")):
        return ""
    return (
        "the weights are float32 here, whatever they were given in, so the encoders must follow the type of the "
        "weights instead of converting to one of their own"
    )
