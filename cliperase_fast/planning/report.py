"""`cliperase-fast plan`: from names to a step, and its cost as text."""

from __future__ import annotations

from typing import Any

import torch

from cliperase_fast.errors import InputError
from cliperase_fast.ops.autograd import strip_bytes
from cliperase_fast.planning.cost_model import DEVICES, Model, Step, step_cost
from cliperase_fast.planning.model_size import count_model

_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def step_of(*, model: str, gpu: str = "h100", strip_mib: int | None = None, **options: Any) -> Step:
    """The step of an architecture of open_clip on a GPU of `planning.cost_model.DEVICES`; options: the other fields.

    strip_mib: None for what the kernels would take. Raises InputError for what there is not.
    """
    if gpu not in DEVICES:
        raise InputError(f"gpu={gpu!r} is not known; take {', '.join(DEVICES)}, the nearest to yours")
    precision = options.get("precision", "bf16")
    unknown = Model(model, 1, 0, 0, 0)
    strip = strip_bytes() if strip_mib is None else strip_mib << 20 if strip_mib > 0 else strip_mib
    Step(model=unknown, device=DEVICES[gpu], strip_bytes=strip, **options)  # refuses before the model is counted
    return Step(model=count_model(model, _DTYPES[precision]), device=DEVICES[gpu], strip_bytes=strip, **options)


def plan_text(step: Step) -> str:
    """Memory of a GPU and time of a step, part by part, and whether it fits; everything in it is computed."""
    cost, device = step_cost(step), step.device
    needed, available = sum(cost.memory.values()), device.memory
    share = f"{step.sweep.own:,} pairs each" + (f", encoded {step.chunk:,} at a time" if step.chunk else "")
    lines = [
        f"{step.model.name}, {step.batch:,} pairs on {step.gpus} {device.name} ({share}), {step.precision}",
        "",
        "memory of a GPU, GiB",
        *_rows({name: amount / _GIB for name, amount in cost.memory.items()}),
        "",
        "time of a step, ms",
        *_rows({name: seconds * 1e3 for name, seconds in cost.seconds.items()}),
        "",
        f"the loss on a GPU: {cost.sweep.operations:.3g} FLOP of matrix products, {cost.sweep.moved:.3g} bytes moved, "
        f"{cost.sweep.received:.3g} bytes received",
        f"Computed, not measured: {step.efficiency:.0%} of the rates in {device.source}.",
    ]
    if needed > available:
        lines.append(
            f"It does not fit: {needed / _GIB:.1f} GiB of {available / _GIB:.1f}; take {_remedy(step, cost.memory)}."
        )
    return "\n".join(lines)


def _rows(amounts: dict[str, float]) -> list[str]:
    return [f"  {name:<22}{amount:12,.2f}" for name, amount in {**amounts, "together": sum(amounts.values())}.items()]


def _remedy(step: Step, memory: dict[str, float]) -> str:
    """What shrinks the largest part."""
    largest = max(memory, key=lambda name: memory[name])
    if largest == "activations" and (step.chunk or step.sweep.own) > 1:
        return f"a smaller --chunk than {step.chunk or step.sweep.own}"
    if largest in ("student", "teacher") and step.zero < 3 and step.gpus > 1:
        return "--zero 3"
    if largest == "loss" and step.gather == "all" and step.gpus > 1:
        return "--gather ring"
    return "more or larger GPUs"
