"""Measure whole sweeps of the CUDA kernels of `native` in the tournament: its blocks, batched products and graphs.

The variants: as shipped, with nothing and with all similarities kept; student and teacher as one batched product; that
in blocks that fit the L2 cache, from CUDA graphs. Needs the extension with its CUDA kernels, as `make gpu-check` builds
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from cliperase_fast.ops import eager
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.native.graphs import GraphedKernels

from .tournament_checks import Entry, Row, outcome, worst_error

if TYPE_CHECKING:
    from .tournament import Tournament

Kernels = CudaKernels | GraphedKernels
VARIANTS: dict[str, Callable[[str], Kernels]] = {
    "shipped": lambda name: CudaKernels(name=name),
    "batched": lambda name: CudaKernels(name=name, batched=True),
    "blocks of 16 MiB, graphs": lambda name: GraphedKernels(name=name, block_bytes=16 << 20),
    "blocks of 32 MiB, graphs": lambda name: GraphedKernels(name=name, block_bytes=32 << 20),
}
_NUMBERS = itertools.count()


def why_missing(device: str) -> str | None:
    """Return why the kernels cannot run on this device; None if they can."""
    if device != "cuda":
        return "the CUDA kernels of native need a GPU"
    return extension.why_missing() or extension.why_no_cuda()


def native_entries(tournament: Tournament) -> Iterator[Entry]:
    missing = why_missing(tournament.device)
    if missing is not None:
        yield Entry("native", dict, missing=missing)
        return
    for variant in VARIANTS:
        yield Entry(f"correct native {variant}", partial(_correct, tournament, variant))
    for n in tournament.sizes:
        for variant in VARIANTS:
            call = partial(_time, tournament, variant, n, "nothing")
            yield Entry(f"native sweep {n} {variant}", call, f"correct native {variant}")
    n = tournament.sizes[0]
    call = partial(_time, tournament, "shipped", n, "similarities")
    yield Entry(f"native sweep {n} shipped, kept", call, "correct native shipped")


@contextmanager
def _kernels(variant: str) -> Iterator[Kernels]:
    kernels = VARIANTS[variant](f"tournament_native_{next(_NUMBERS)}")
    try:
        yield kernels
    finally:
        if isinstance(kernels, GraphedKernels):
            kernels.clear()


def _correct(tournament: Tournament, variant: str) -> Row:
    """Compare the losses and gradients of several blocks with float64, with and without groups."""
    count, worst = 4001 if tournament.device == "cuda" else 40, 0.0
    with _kernels(variant) as kernels:
        sweep = as_sweep(kernels)
        for groups in (False, True, False):  # the last one replays the graphs of the first
            inputs = tournament.inputs(count, groups)
            found = outcome(sweep, inputs, inputs.image.dtype)
            worst = max(worst, worst_error(found, outcome(eager.sweep, inputs, torch.float64)))
    return {"error": worst}


def _time(tournament: Tournament, variant: str, n: int, keep: str) -> Row:
    """Time a step, and the forward pass alone; measure the memory that graphs hold."""
    inputs = tournament.inputs(n, keep=keep)
    with _kernels(variant) as kernels:
        sweep, before = as_sweep(kernels), _reserved(tournament.device)
        row = {**tournament.time_step(sweep, inputs), "keep": keep}
        row["held_bytes"] = _reserved(tournament.device) - before
        with torch.no_grad():
            row["forward_ms"] = tournament.median_ms(lambda: sweep(inputs))
    return row


def _reserved(device: str) -> int:
    """Return the bytes that torch cannot give back to the device."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
