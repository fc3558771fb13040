"""Where and how encoders run: device, arithmetic, evaluation mode, and the dtypes of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cliperase_fast.distributed import Ranks
from cliperase_fast.errors import InputError, UnlearningError, is_out_of_memory, tell_out_of_memory

if TYPE_CHECKING:
    from cliperase_fast.models.adapters.base import ClipAdapter

# What torch (RuntimeError, IndexError), transformers (ValueError) and timm raise for inputs of another size.
_OF_INPUTS = (RuntimeError, IndexError, ValueError, AssertionError)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device with that name; "auto" is the GPU if there is one.

    Raises `InputError` if the device is not valid or not available.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={str(device)!r} is not a valid device; use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device={str(device)!r} is not supported; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={str(device)!r} is not available (torch sees {torch.cuda.device_count()} GPUs); use cpu or auto"
        )
    return chosen


def device_of_rank(device: str | torch.device, ranks: Ranks) -> torch.device:
    """Return the device with that name for this rank: of GPUs, the one with its local number, which becomes current.

    Raises `InputError` where there is none for it, or where the process group cannot exchange its tensors.
    """
    chosen = pick_device(device)
    if ranks.group is None:
        return chosen
    if chosen.type == "cuda":
        if chosen.index is not None and ranks.size > 1:
            raise InputError(
                f"device={str(device)!r} is one GPU and there are {ranks.size} ranks: use 'auto' or 'cuda'"
            )
        if chosen.index is None:
            if ranks.local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"rank {ranks.rank} is process {ranks.local_rank + 1} of its machine and torch sees "
                    f"{torch.cuda.device_count()} GPUs: start one process for each, or use device='cpu'"
                )
            chosen = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(chosen)
    ranks.group.check_device(chosen)
    return chosen


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `InputError` unless `precision` is fp32, bf16, or fp16 on a GPU."""
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision='fp16' needs a GPU and the device is {device}; use 'bf16' or 'fp32'")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones (AVX512-BF16, AMX, GPUs from
    compute capability 8.0).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of that precision; "fp32" keeps the dtype of the parameters."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def encoding_fits() -> AbstractContextManager[None]:
    """Turn running out of memory while encoding without gradients into an `UnlearningError` that names the fix."""
    return tell_out_of_memory("encoding", "use a smaller batch_size (in unlearn(): eval_batch_size)")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode; restore the mode of each submodule on exit."""
    modes = training_modes(module)
    module.eval()
    try:
        yield
    finally:
        set_training_modes(module, modes)


def training_modes(module: nn.Module) -> dict[str, bool]:
    """Return whether each submodule is in training mode, by name."""
    return {name: part.training for name, part in module.named_modules(remove_duplicate=False)}


def set_training_modes(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Put the submodules into the modes that `training_modes` returned, for this module or one that it is a copy of.

    A `train` of their own is called where the mode changes: it may do more, such as take a merged adapter out again.
    """
    for name, part in module.named_modules():
        if type(part).train is not nn.Module.train and part.training != modes.get(name, part.training):
            part.train(modes[name])
    for name, part in module.named_modules():
        part.training = modes.get(name, part.training)


@contextmanager
def inference(module: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Evaluation mode, no gradients and the given arithmetic; weights that a lookup renormalises are restored.

    Raises `UnlearningError` if memory runs out inside.
    """
    # no_grad and not inference_mode: a module that builds a mask or a table on first use and keeps it could not be
    # trained afterwards, because inference tensors cannot be saved for a backward pass.
    with evaluating(module), encoding_fits(), torch.no_grad(), autocast(device, precision), _renormalised(module):
        yield


@contextmanager
def _renormalised(module: nn.Module) -> Iterator[None]:
    """Restore the weights of embeddings with a max_norm, which torch changes where they are looked up."""
    tables = [
        part.weight for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None
    ]  # fmt: skip
    before = [table.detach().clone() for table in tables]
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.copy_(values)


def in_fast_layout(visual: nn.Module, pixels: Tensor) -> Tensor:  # [B, C, H, W], the same values
    """Return the input of a convolutional image tower in the memory layout in which the tower is fastest.

    On a CPU, depthwise convolutions with batch norms take two thirds of the time if the channels come last.
    """
    if pixels.ndim != 4 or pixels.device.type != "cpu":
        return pixels
    depthwise = any(isinstance(part, nn.Conv2d) and part.groups > 1 for part in visual.modules())
    batch_norms = any(isinstance(part, nn.BatchNorm2d) for part in visual.modules())
    return pixels.contiguous(memory_format=torch.channels_last) if depthwise and batch_norms else pixels


def in_float32(adapter: ClipAdapter) -> ClipAdapter:
    """Return an adapter whose floating-point weights are float32: the same one, or a copy if some are not.

    float16 and bfloat16 widen exactly; float64 is rounded.
    """
    if all(tensor.dtype == torch.float32 for _, tensor in _floating(adapter.module)):
        return adapter
    twin = adapter.clone()
    twin.module.float()
    return twin


def is_mixed(module: nn.Module) -> bool:
    """Return whether the floating-point parameters have several dtypes, so that inputs of one do not fit all layers."""
    return len({parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}) > 1


def weight_dtypes(adapter: ClipAdapter) -> str:
    """Return the dtypes of the floating-point parameters, the most frequent first: "float16 and float32"."""
    counts: dict[str, int] = {}
    for parameter in adapter.module.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return " and ".join(sorted(counts, key=lambda name: -counts[name]))


def in_dtypes_of(given: ClipAdapter, adapter: ClipAdapter) -> ClipAdapter:
    """Return a copy of `adapter` with each weight rounded to the dtype it has in `given`.

    adapter: of the same structure, in float32. A value equal to the float32 of `given`'s gets `given`'s own bits back,
    so that untrained weights are unchanged in float64 too.
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


@contextmanager
def refuse_inputs(failure: str, remedy: str) -> Iterator[None]:
    """Turn an error that an encoder raises inside the block into an `InputError`.

    failure: what cannot be encoded, such as "the model cannot encode captions of 77 tokens". remedy: for wrong inputs.
    """
    try:
        yield
    except Exception as error:  # each library raises its own kind for an input that it cannot take
        if isinstance(error, (InputError, UnlearningError)) or is_out_of_memory(error):
            raise
        said = str(error)
        if not isinstance(error, _OF_INPUTS):
            said, remedy = f"{type(error).__name__}: {said}", "correct the model's own code, which raised this"
        raise InputError(f"{failure} ({said}): {_dtype_hint(said) or remedy}") from error


def _dtype_hint(said: str) -> str:
    """Return what to do about an encoder's error that mentions dtypes; else an empty string."""
    if not any(word in said for word in ("dtype", "Half", "BFloat16", "Double")):
        return ""
    return (
        "the weights are float32 here, whatever dtype they were given in, so the encoders must follow the dtype of "
        "their weights instead of converting to a fixed one"
    )


def _rounded(value: Tensor, original: Tensor) -> Tensor:
    original = original.detach()
    if value.dtype == original.dtype:
        return value
    return torch.where(value == original.to(value.dtype), original, value.to(original.dtype))


def _floating(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point parameters and buffers by name."""
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            if tensor.is_floating_point():
                yield name, tensor
