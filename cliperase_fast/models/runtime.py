"""Where and how encoders run: device, arithmetic, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from cliperase_fast.errors import InputError, tell_out_of_memory

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device of that name, "auto" being the GPU when there is one. `InputError` when it is not here."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={str(device)!r} is not a device: use auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device={str(device)!r} is not supported: use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={str(device)!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return chosen


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `InputError` unless `precision` is fp32, bf16, or fp16 on a GPU."""
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision='fp16' needs a GPU and the device is {device}: use 'bf16' or 'fp32'")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of the encoders; "fp32" leaves the parameters' own."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def encoding_fits() -> AbstractContextManager[None]:
    """Around what encodes without a gradient: that memory runs out is an `UnlearningError` with the remedy."""
    return tell_out_of_memory("encoding", "give a smaller batch_size (of unlearn(): eval_batch_size)")


@contextmanager
def inference(module: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Evaluation mode (each submodule's own mode comes back afterwards), no gradients, the given arithmetic.

    Raises `UnlearningError` where memory runs out inside.
    """
    # no_grad and not inference_mode: a module that builds a mask or a table on first use and keeps it could
    # not be trained afterwards, as inference tensors cannot be saved for a backward pass.
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with encoding_fits(), torch.no_grad(), autocast(device, precision):
            yield
    finally:
        for part in training:
            part.training = True
