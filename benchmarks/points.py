"""Measure providers over sizes, each point in a separate process, so that its peak memory is the provider's alone."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from .batches import Case
from .loss_memory import measured_apart
from .providers import Provider, check
from .runner import cannot_fit, first_line, too_slow
from .timing import median_row

_STARTING = 60.0  # seconds that loading, compiling and the batch may take beyond the steps
_PATIENCE = 60.0  # a point is not begun again after so many seconds
_SILENCE = 10.0  # a point that takes longer is announced


class Points:
    """rows: one for each case and provider, with status, reason and what was measured.

    seconds: to spend on timing a point; 0: memory alone. cap: a step that would take more seconds is skipped.
    repeats: processes for each point, whose medians show the noise; fewer where they take minutes.
    """

    def __init__(
        self, providers: dict[str, Provider], device: str, threads: int, seconds: float, cap: float, repeats: int = 1
    ) -> None:
        self.providers, self.device, self.threads, self.seconds, self.cap = providers, device, threads, seconds, cap
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []
        self._step: dict[tuple[str, Case], tuple[int, float]] = {}  # (N, seconds) of the largest size so far
        self._checks: dict[tuple[str, Case], tuple[float, str | None]] = {}
        self._began = time.perf_counter()

    def run(self, case: Case, names: Sequence[str]) -> None:
        for name in names:
            provider = self.providers[name]
            row = {**asdict(case), "provider": name, "status": "n/a", "reason": "", "note": provider.note}
            self.rows.append(row)
            previous = self._step.get((name, replace(case, n=0)))
            reason = (
                provider.why_not(case, self.device)
                or cannot_fit(provider, case, self.device)
                or too_slow(case, previous, self.cap)
            )
            if reason is not None:
                row["reason"] = reason
            else:
                if previous is not None and previous[1] * (case.n / previous[0]) ** 2 > _SILENCE:
                    self._log(f"{case}: {name} ...")
                self._measure(case, provider, row)
            if row["status"] == "ok":
                step = f", {_step_text(row['both_ms'])}" if "both_ms" in row else ""
                self._log(f"{case}: {name}, {row['extra_bytes'] / 2**20:.1f} MiB{step}")
            elif reason is None or previous is not None:  # what cannot be here at all need not be said for each size
                self._log(f"{case}: {name} {row['status']}, {row['reason']}")

    def _measure(self, case: Case, provider: Provider, row: dict[str, Any]) -> None:
        key = provider.name, replace(case, n=0)
        timeout = 4 * self.cap + self.seconds + _STARTING
        try:
            if key not in self._checks:
                self._checks[key] = check(provider, case, self.device)
            row["error"], wrong = self._checks[key]
            if wrong is not None:
                row.update(status="failed", reason=wrong)
                return
            found = self._repeated(provider, case, timeout)
        except subprocess.TimeoutExpired as late:
            row["reason"] = f"not done after {late.timeout:.0f} s"
        except MemoryError as error:
            row["reason"] = f"out of memory: {error}"
        except Exception as error:  # one provider must not take the others with it
            row.update(status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
            traceback.print_exception(error)
        else:
            self._step[key] = case.n, found["both_ms"]["median"] / 1e3
            if not self.seconds:  # the step whose memory was measured does not count as a timing
                found = {"extra_bytes": found["extra_bytes"]}
            row.update(found, status="ok")

    def _repeated(self, provider: Provider, case: Case, timeout: float) -> dict[str, Any]:
        began = time.perf_counter()
        runs: list[dict[str, Any]] = []
        while len(runs) < self.repeats and (not runs or time.perf_counter() - began < _PATIENCE):
            runs.append(measured_apart(provider.name, case, self.device, self.threads, self.seconds, timeout))
        return median_row(runs)

    def _log(self, line: str) -> None:
        print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)

    @property
    def ours_failed(self) -> bool:
        return any(row["status"] == "failed" and self.providers[row["provider"]].ours for row in self.rows)


def _step_text(times: dict[str, Any]) -> str:
    runs = times.get("runs", [])
    spread = f" ({min(runs):.1f} to {max(runs):.1f} in {len(runs)} runs)" if len(runs) > 1 else ""
    return f"{times['median']:.1f} ms a step{spread}"
