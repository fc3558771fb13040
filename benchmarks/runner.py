"""Run the providers of a case in rounds. A provider that is wrong, missing or too large gets a reason, not a time."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.errors import is_out_of_memory

from .batches import CHECK_ROWS, DTYPES, Batch, Case, make_batch
from .loss_memory import measured_apart
from .loss_report import FLOOR
from .providers import Provider, check
from .timing import Clock, Floor, PeakMemory, Step, in_rounds, loss_step, timed


class DeviceLost(RuntimeError):
    """A CUDA error after which the process can do nothing more on the device."""


@dataclass
class Settings:
    """All in seconds: to spend on each provider of a case; cap, of a provider's three steps; limit, of the run."""

    device: str
    seconds: float
    rounds: int | None
    cap: float
    limit: float | None
    memory: bool
    threads: int
    quiet: bool = False  # no line on stderr for each provider


@dataclass
class Runner:
    settings: Settings
    providers: dict[str, Provider]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clock = Clock(self.settings.device)
        self._peak = PeakMemory()
        self._checks: dict[tuple[str, Case], tuple[float, str | None]] = {}
        self._step_seconds: dict[tuple[str, Case], tuple[int, float]] = {}  # of the largest size so far
        self._began = time.perf_counter()

    def run(self, case: Case, names: Sequence[str]) -> None:
        """Add a row for the floor and for each provider."""
        rows: dict[str, dict[str, Any]] = {
            name: {**asdict(case), "provider": name, "status": "n/a", "reason": ""} for name in (FLOOR, *names)
        }
        self.rows += rows.values()
        try:
            if self.settings.limit is not None and time.perf_counter() - self._began > self.settings.limit:
                for row in rows.values():
                    row["reason"] = f"the run's {self.settings.limit:.0f} seconds were over"
                return
            self._log(str(case))
            self._run(case, names, rows)
        except Exception as error:  # one case must not take the others with it
            for row in rows.values():
                if row["status"] == "n/a" and not row["reason"]:
                    self._report(row, error)
            if isinstance(error, DeviceLost):
                raise

    def _run(self, case: Case, names: Sequence[str], rows: dict[str, dict[str, Any]]) -> None:
        batch = make_batch(case, self.settings.device)
        steps: dict[str, Step] = {}
        estimates: dict[str, float] = {}
        floor = Floor(case, batch, self._clock)
        steps[FLOOR] = floor.step
        estimates[FLOOR] = floor.step().both * floor.timed / floor.strips / case.products
        rows[FLOOR].update(note=f"{case.products} products")
        for name in names:
            row, provider = rows[name], self.providers[name]
            row["note"] = provider.note
            reason = provider.why_not(case, self.settings.device) or self._too_large(provider, case)
            if reason is not None:
                row["reason"] = reason
                continue
            try:
                row["auto"] = provider.does_as_auto(batch)
                row["error"], wrong = self._checked(provider, case)
                if wrong is not None:
                    row.update(status="failed", reason=wrong)
                    continue
                steps[name], estimates[name] = self._warm_up(provider, case, batch, row)
            except Exception as error:
                self._report(row, error)
        samples, failures = in_rounds(
            steps, self.settings.seconds, self.settings.rounds, estimates, self.settings.cap
        )  # fmt: skip
        for name, failure in failures.items():
            self._report(rows[name], failure)
        for name, times in samples.items():
            if name not in failures:
                rows[name].update(status="ok", **timed(times))

    def _checked(self, provider: Provider, case: Case) -> tuple[float, str | None]:
        key = provider.name, replace(case, n=min(case.n, CHECK_ROWS))
        if key not in self._checks:
            self._checks[key] = check(provider, case, self.settings.device)
        return self._checks[key]

    def _warm_up(self, provider: Provider, case: Case, batch: Batch, row: dict[str, Any]) -> tuple[Step, float]:
        """Steps that are not counted; the first compiles and allocates, the second shows how long one takes."""
        began = time.perf_counter()
        own = provider.own_case(case)
        step = loss_step(
            provider.make(own), batch if own == case else make_batch(own, self.settings.device), self._clock
        )
        if self.settings.device == "cuda":
            _, first = self._peak.measure(provider.name, step)
            times, second = self._peak.measure(provider.name, step)
            row["extra_bytes"] = max(first, second)
        else:
            times = step()
            if times.both * 3 <= self.settings.cap:
                times = step()
            if self.settings.memory:
                row["extra_bytes"] = measured_apart(provider.name, case, "cpu", self.settings.threads)["extra_bytes"]
        self._step_seconds[provider.name, replace(case, n=0)] = case.n, times.both
        self._log(f"  {provider.name}: {1e3 * times.both:.1f} ms a step, ready in {time.perf_counter() - began:.1f} s")
        return step, times.both

    def _too_large(self, provider: Provider, case: Case) -> str | None:
        return cannot_fit(provider, case, self.settings.device) or too_slow(
            case, self._step_seconds.get((provider.name, replace(case, n=0))), self.settings.cap
        )

    def _report(self, row: dict[str, Any], error: Exception) -> None:
        """Into the row, with the traceback on stderr. Raises DeviceLost when the device does not answer any more."""
        reason = first_line(error)
        if is_out_of_memory(error):
            row.update(status="n/a", reason="out of memory")
        else:
            row.update(status="failed", reason=f"{type(error).__name__}: {reason}")
            traceback.print_exception(error)
        self._log(f"  {row['provider']}: {row['status']}, {row['reason']}")
        if self.settings.device == "cuda":
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"the device was lost to {row['provider']}: {reason}") from lost

    def _log(self, line: str) -> None:
        if not self.settings.quiet:
            print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def cannot_fit(provider: Provider, case: Case, device: str) -> str | None:
    """Why a size is not tried: its matrices cannot fit."""
    needed = provider.matrices * case.n**2 * DTYPES[case.dtype].itemsize
    # Too much on a GPU is an error that says so; on the CPU it may be the end of the process.
    there = _free_bytes(device) / (1 if device == "cuda" else 2)
    return f"needs about {needed / 2**30:.0f} GiB for N x N matrices" if needed > there else None


def too_slow(case: Case, smaller: tuple[int, float] | None, cap: float) -> str | None:
    """Why a size is not tried: by a smaller one, (N, seconds), a step would take longer than `cap` seconds."""
    n, seconds = smaller or (case.n, 0.0)
    expected = seconds * (case.n / n) ** 2
    return f"a step would take about {expected:.0f} s, judged by N = {n:,}" if expected > cap else None


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LookupError("MemAvailable")
