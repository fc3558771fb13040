"""One provider at one size in a process of its own: peak extra memory of a step, and how long one takes.

python -m benchmarks.loss_memory PROVIDER LOSS DATA DTYPE N WIDTH DEVICE THREADS SECONDS        prints JSON

A small step loads what is loaded on first use; the first one at this size is weighed. It also touches its memory for
the first time, which can take longer than the step itself, so it is not timed: with SECONDS > 0 a second one warms up,
and more are timed for about so long, at least three. Where a step takes many times SECONDS, the second is the one
sample there is. Whether the provider is right is the caller's to check, in another process: what the check leaves
behind would hide a part of the need.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .batches import Case, gradients, make_batch
from .machine import resident, run_module
from .providers import every_provider
from .timing import LEAST_ROUNDS, Clock, PeakMemory, Step, Times, loss_step, timed

_SMALL = 320  # pairs
_LONG = 10  # times the seconds to spend: such a step is timed once


def measured_apart(
    provider: str, case: Case, device: str, threads: int, seconds: float = 0.0, timeout: float | None = None
) -> dict[str, Any]:
    """`measure` in a process of its own; errors are those of `machine.run_module`."""
    words = [provider, *map(str, asdict(case).values()), device, str(threads), str(seconds)]
    return json.loads(run_module("loss_memory", *words, timeout=timeout).splitlines()[-1])


def measure(name: str, case: Case, device: str, seconds: float) -> dict[str, Any]:
    """extra_bytes, and times as `timing.timed` has them: of the weighed step where seconds is 0, else of later ones."""
    provider = every_provider()[name]
    batch = make_batch(case, device)
    function = provider.make(case)
    # A compiled loss is compiled for each size, and the compiler's own memory is none of the loss's, so its first step
    # at this size does not count.
    small = case if name.endswith("-compiled") else replace(case, n=min(case.n, _SMALL))
    gradients(function, make_batch(small, device))
    step = loss_step(function, batch, Clock(device))
    first, extra = PeakMemory().measure(name, step) if device == "cuda" else _weighed(step)
    samples = timed_steps(step, seconds) if seconds else [first]
    return {"extra_bytes": extra, **timed(samples)}


def timed_steps(step: Step, seconds: float) -> list[Times]:
    """Samples of a step that has run once before: after one more that is not counted, unless it is so long."""
    second = step()
    if second.both > _LONG * seconds:
        return [second]
    samples: list[Times] = []
    began = time.perf_counter()
    while len(samples) < LEAST_ROUNDS or time.perf_counter() - began < seconds:
        samples.append(step())
    return samples


def _weighed(step: Step) -> tuple[Times, int]:
    """A step on the CPU and what it added to the resident memory at its peak (Linux)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was left free would hide as much of the step's need
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    times = step()
    return times, resident("VmHWM") - before


def main() -> None:
    name, loss, data, dtype, n, width, device, threads, seconds = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(name, Case(loss, data, dtype, int(n), int(width)), device, float(seconds))))


if __name__ == "__main__":
    main()
