"""Time several callables in one process, on the same inputs, in rounds in which each has its turn.

A slow moment of the machine then affects all of them. Reported are medians and quartiles after a warm-up.

On a GPU: CUDA events around forward and backward; before each step a buffer larger than the cache is written, so that
no step finds its inputs there (and so that the first launches wait in the queue, not the device for them). On a CPU:
the wall clock, inputs as the contestant before left them in the caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import Batch, Case, Loss

LEAST_ROUNDS = 3
_MOST_REPEATS = 10  # steps of one contestant in one round
_TURN = 0.1  # seconds a turn may last, if one step is shorter
_FLUSH_BYTES = 256 << 20  # several times the largest cache of a GPU
_STRIP_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}  # of the product measured for the floor
_FLOOR_SECONDS = 2.0


class Times(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


Step = Callable[[], Times]


class Clock:
    """Marks moments: `mark()` for each, `between()` for the seconds between neighbours once all has run."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if self._cuda else None
        self._marks: list[Any] = []

    def start(self) -> None:
        self._marks = []
        if self._flush is not None:
            self._flush.zero_()
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def between(self) -> list[float]:
        neighbours = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            self._marks[-1].synchronize()
            return [first.elapsed_time(second) / 1e3 for first, second in neighbours]
        return [second - first for first, second in neighbours]


def loss_step(loss: Loss, batch: Batch, clock: Clock) -> Step:
    leaves = list(batch.leaves().values())

    def step() -> Times:
        clock.start()
        value = loss(*batch)
        clock.mark()
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        clock.mark()
        times = Times(*clock.between())
        del grads
        return times

    return step


class Floor:
    """The products no method can avoid: `case.products` times one product I Tᵀ [N, N] in the features' dtype.

    Strip by strip where N x N does not fit a buffer; where even one product takes long, a part of its strips.
    """

    def __init__(self, case: Case, batch: Batch, clock: Clock) -> None:
        self.case, self.clock = case, clock
        self.image, self.text = batch.image.detach(), batch.text.detach()
        budget = _STRIP_BYTES[self.image.device.type] // self.image.element_size()
        self.height = min(case.n, max(1, budget // case.n))
        self.strip = self.image.new_empty(self.height, case.n)
        self.strips = case.n // self.height  # full ones; a shorter last one counts by its share
        self._product(self.image[: self.height])
        seconds = self._strips(1)
        self.timed = max(1, min(self.strips, int(_FLOOR_SECONDS / max(seconds, 1e-9))))

    def _product(self, rows: Tensor) -> None:
        torch.mm(rows, self.text.T, out=self.strip)

    def _strips(self, count: int) -> float:
        self.clock.start()
        for index in range(count):
            self._product(self.image[index * self.height : (index + 1) * self.height])
        self.clock.mark()
        return self.clock.between()[0]

    def step(self) -> Times:
        product = self._strips(self.timed) * self.case.n / (self.timed * self.height)
        forward = self.case.forward_products  # the rest forms them again, and the gradients
        return Times(forward * product, (self.case.products - forward) * product)


def in_rounds(
    steps: Mapping[str, Step], seconds: float, most_rounds: int | None, estimates: Mapping[str, float], cap: float
) -> tuple[dict[str, list[Times]], dict[str, Exception]]:
    """Samples of each step, and what was raised by those that did not get through.

    About `seconds` for each step, at least three rounds, at most `most_rounds`; a step estimated to be so long that
    three of it exceed `cap` seconds takes part in the first round only.
    """
    samples: dict[str, list[Times]] = {name: [] for name in steps}
    failures: dict[str, Exception] = {}
    names, began, rounds = list(steps), time.perf_counter(), 0
    while names:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            if rounds and estimates[name] * LEAST_ROUNDS > cap:
                continue
            for _ in range(max(1, min(_MOST_REPEATS, int(_TURN / max(estimates[name], 1e-9))))):
                try:
                    samples[name].append(steps[name]())
                except Exception as error:  # shown with its provider, so that the others still finish
                    failures[name] = error
                    break
        names = [name for name in names if name not in failures]
        rounds += 1
        late = time.perf_counter() - began > seconds * len(steps)
        if (late and rounds >= LEAST_ROUNDS) or rounds == most_rounds:
            break
    return samples, failures


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": 1e3 * middle, "q1": 1e3 * low, "q3": 1e3 * high, "samples": len(values)}


def timed(times: list[Times]) -> dict[str, dict[str, float]]:
    """`summary` of the forward pass, the backward pass and both."""
    parts: dict[str, Callable[[Times], float]] = {
        "forward_ms": lambda t: t.forward, "backward_ms": lambda t: t.backward, "both_ms": lambda t: t.both,
    }  # fmt: skip
    return {name: summary([part(sample) for sample in times]) for name, part in parts.items()}


def median_row(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the rows of several processes that measured the same: of each figure the median over them.

    Beside a time's median and quartiles stand the runs' medians: how far they lie apart is the noise of a comparison.
    """
    row: dict[str, Any] = {}
    for name, first in runs[0].items():
        if not isinstance(first, Mapping):
            row[name] = statistics.median_low(run[name] for run in runs)
            continue
        parts = ("median", "q1", "q3")
        row[name] = {part: statistics.median(run[name][part] for run in runs) for part in parts}
        row[name]["samples"] = sum(run[name]["samples"] for run in runs)
        row[name]["runs"] = [run[name]["median"] for run in runs]
    return row


class PeakMemory:
    """Bytes a provider allocates on a CUDA device beyond what was there before, gradients included.

    What it keeps from one step to the next (a workspace) counts in every later one: a user pays for it too.
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def measure(self, name: str, step: Step) -> tuple[Times, int]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        times = step()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before + self._held.get(name, 0)
        self._held[name] = self._held.get(name, 0) + torch.cuda.memory_allocated() - before
        return times, extra
