"""How fast the losses are, side by side with others, and how much memory they take.

    python -m benchmarks.loss --quick                       under a minute on two cores
    python -m benchmarks.loss                               a few sizes on this device
    python -m benchmarks.loss --sizes 256,4096 --widths 64,512 --dtypes float32 --memory --json mine.json
    python -m benchmarks.loss --providers ours-auto,open_clip-compiled --loss clip --data random
    python -m benchmarks.loss --compare before.json after.json
    python -m benchmarks.loss --gpu-check                   the set of sizes for one GPU, in under five minutes

What is timed: one call of the loss ("forward") and torch.autograd.grad of it ("backward"), with the same inputs for
all, in rounds in which everyone has a turn. Losses: cliperase is RM + 3 FM + 3 CM (retention, forgetting,
consistency), clip is RM alone.

Before anyone is timed, their loss and gradients are compared with float64 on 512 pairs of the same kind of data; who
is off gets no time. "floor" is 6 products (clip: 4) of 2 N² D FLOP, measured in the same rounds: no method that stores
no N x N matrix can be faster. TFLOP/s counts those products for everyone, whatever they really compute. "against
compiled": how many times faster than torch.compile of open_clip's losses. Extra memory is the measured peak beyond the
inputs, gradients included; on the CPU with --memory, in a process for each provider.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import loss_report
from .batches import CHECK_ROWS, DATA, DTYPES, LOSSES, Batch, Case, errors, make_batch, truth
from .machine import RESULTS, describe
from .providers import Provider, default_names, every_provider, version
from .timing import Clock, Floor, PeakMemory, Step, Times, cpu_memory, in_rounds, loss_step, summary

PACKAGES = ("inf-cl", "memeff", "cut-cross-entropy", "liger-kernel")
_REHEARSAL = 256  # --gpu-check on the CPU: sizes divided by this
_QUICK = {"sizes": [1024], "widths": [128], "seconds": 1.0}


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


@dataclass
class Runner:
    settings: Settings
    providers: dict[str, Provider]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clock = Clock(self.settings.device)
        self._peak = PeakMemory()
        self._checked: dict[tuple[str, Case], tuple[float, str | None]] = {}
        self._step_seconds: dict[tuple[str, Case], tuple[int, float]] = {}  # of the largest size so far
        self._began = time.perf_counter()

    def run(self, case: Case, names: Sequence[str]) -> None:
        """Add a row for the floor and for each provider."""
        rows: dict[str, dict[str, Any]] = {
            name: {**asdict(case), "provider": name, "status": "n/a", "reason": ""}
            for name in (loss_report.FLOOR, *names)
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
        steps[loss_report.FLOOR] = floor.step
        estimates[loss_report.FLOOR] = floor.step().both * floor.timed / floor.strips / case.products
        rows[loss_report.FLOOR].update(note=f"{case.products} products")
        for name in names:
            row, provider = rows[name], self.providers[name]
            row["note"] = provider.note
            reason = provider.why_not(case, self.settings.device) or self._too_large(provider, case)
            if reason is not None:
                row["reason"] = reason
                continue
            try:
                row["error"], wrong = self._check(provider, case)
                if wrong is not None:
                    row.update(status="failed", reason=wrong)
                    continue
                steps[name], estimates[name] = self._warm_up(provider, case, batch, row)
            except Exception as error:
                self._report(row, error)
        samples, failures = in_rounds(
            steps, self.settings.seconds, self.settings.rounds, estimates, self.settings.cap
        )  # fmt: skip
        for name, error in failures.items():
            self._report(rows[name], error)
        for name, times in samples.items():
            if name not in failures:
                rows[name].update(status="ok", **_timed(times))

    def _check(self, provider: Provider, case: Case) -> tuple[float, str | None]:
        """(worst relative error, what is wrong if it is too large), on a smaller batch of the same kind."""
        small = replace(case, n=min(case.n, CHECK_ROWS))
        if (provider.name, small) not in self._checked:
            batch = make_batch(small, self.settings.device, seed=1)
            found = errors(
                provider.make(small), batch, truth(batch), provider.adds_entropy, provider.scale_gradient
            )  # fmt: skip
            worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
            limit = provider.limit(DTYPES[case.dtype])
            right = all(error <= limit for error in found.values())  # false for NaN as well
            what = "loss" if worst == "loss" else f"gradient of {worst}"
            wrong = None if right else f"{what} is off by {found[worst]:.1e}, more than {limit:.0e}, from float64's"
            self._checked[provider.name, small] = found[worst], wrong
        return self._checked[provider.name, small]

    def _warm_up(self, provider: Provider, case: Case, batch: Batch, row: dict[str, Any]) -> tuple[Step, float]:
        """Steps that are not counted; the first compiles and allocates, the second shows how long one takes."""
        began = time.perf_counter()
        step = loss_step(provider.make(case), batch, self._clock)
        if self.settings.device == "cuda":
            _, first = self._peak.measure(provider.name, step)
            times, second = self._peak.measure(provider.name, step)
            row["extra_bytes"] = max(first, second)
        else:
            times = step()
            if times.both * 3 <= self.settings.cap:
                times = step()
            if self.settings.memory:
                row["extra_bytes"] = cpu_memory(provider.name, case, self.settings.threads)
        self._step_seconds[provider.name, replace(case, n=0)] = case.n, times.both
        self._log(f"  {provider.name}: {1e3 * times.both:.1f} ms a step, ready in {time.perf_counter() - began:.1f} s")
        return step, times.both

    def _too_large(self, provider: Provider, case: Case) -> str | None:
        """Why a size is not tried: its matrices cannot fit, or by a smaller size a step would take too long."""
        needed = provider.matrices * case.n**2 * DTYPES[case.dtype].itemsize
        # Too much on a GPU is an error that says so; on the CPU it may be the end of the process.
        there = _free_bytes(self.settings.device) / (1 if self.settings.device == "cuda" else 2)
        if needed > there:
            return f"needs about {needed / 2**30:.0f} GiB for N x N matrices"
        smaller, seconds = self._step_seconds.get((provider.name, replace(case, n=0)), (case.n, 0.0))
        expected = seconds * (case.n / smaller) ** 2
        if expected > self.settings.cap:
            return f"a step would take about {expected:.0f} s, judged by N = {smaller:,}"
        return None

    def _report(self, row: dict[str, Any], error: Exception) -> None:
        """Into the row, with the traceback on stderr. Raises DeviceLost when the device does not answer any more."""
        reason = _first_line(error)
        if _is_out_of_memory(error):
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
        print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)


def _timed(times: list[Times]) -> dict[str, Any]:
    parts: dict[str, Callable[[Times], float]] = {
        "forward_ms": lambda t: t.forward, "backward_ms": lambda t: t.backward, "both_ms": lambda t: t.both,
    }  # fmt: skip
    return {name: summary([part(sample) for sample in times]) for name, part in parts.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LookupError("MemAvailable")


def gpu_plan(names: Sequence[str], device: str) -> list[tuple[Case, Sequence[str]]]:
    """What `--gpu-check` measures, the most wanted first; on the CPU a rehearsal with small sizes."""
    own = [name for name in names if name.startswith("ours-") and name != "ours-eager"]
    target = Case("cliperase", "peaked", "bfloat16", 32_768, 768)
    plan = [
        (target, names),
        (replace(target, n=65_536), names),
        (replace(target, n=262_144), own),
        (replace(target, loss="clip"), names),
        (replace(target, loss="clip", n=65_536), names),
        (replace(target, n=8_192), names),
        (replace(target, n=2_048), names),
        (replace(target, data="random"), own),
        (replace(target, width=512), own),
        (replace(target, width=1_024), own),
        (replace(target, dtype="float16"), own),
        (replace(target, dtype="float32", n=8_192, width=512), names),
        (replace(target, width=256), own),
        (replace(target, loss="clip", n=262_144), own),
    ]  # fmt: skip
    if device == "cpu":
        plan = [(replace(case, n=max(8, case.n // _REHEARSAL)), who) for case, who in plan]
    return plan


def device_slug(device: str) -> str:
    """cpu, or the GPU's name: h200."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").replace("geforce", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _save(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        out = os.environ.get("OUT")
        if out:
            shutil.copy(path, Path(out) / path.name)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word.replace("_", "")) for word in _words(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1024,4096") from error
    if any(number < 1 for number in numbers) or not numbers:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 on")
    return numbers


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for word in _words(text):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not known; use {', '.join(known)}")
        return _words(text)

    return parse


def parser() -> argparse.ArgumentParser:
    known = list(every_provider())
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m benchmarks.loss", description=__doc__, formatter_class=formatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    p.add_argument("--sizes", type=_numbers, help="N, pairs in the retain batch (cpu 1024,4096; cuda 8192,32768)")
    p.add_argument("--widths", type=_numbers, help="D, width of the features (cpu 128,512; cuda 768)")
    p.add_argument("--dtypes", type=_some_of(list(DTYPES)), help="(cpu float32,bfloat16; cuda bfloat16)")
    p.add_argument("--loss", type=_some_of(LOSSES), default=["cliperase"], help="cliperase, clip or both with a comma")
    p.add_argument("--data", type=_some_of(DATA), default=["peaked"], help="peaked: a trained model's; random")
    p.add_argument("--providers", type=_some_of(known), help=f"some of {', '.join(known)}")
    p.add_argument("--seconds", type=float, default=2.0, help="to spend on each provider of a case (2)")
    p.add_argument("--rounds", type=int, help="at most so many rounds")
    p.add_argument("--cap", type=float, default=60.0, help="seconds: slower steps are measured once, or not (60)")
    p.add_argument("--limit", type=float, help="seconds after which no case is begun (--gpu-check: 240)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    p.add_argument("--memory", action="store_true", help="on the CPU, measure peak memory too")
    p.add_argument("--json", type=Path, nargs="?", const=True, metavar="PATH",
                   help="write the record; without PATH to benchmarks/results/loss-DEVICE.json")  # fmt: skip
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw time, memory and TFLOP/s against N")
    p.add_argument("--from", type=Path, dest="source", metavar="JSON", help="measure nothing; show (and plot) a record")
    one = p.add_mutually_exclusive_group()
    one.add_argument("--quick", action="store_true", help="one size, under a minute on two cores")
    one.add_argument("--gpu-check", action="store_true", help="the set for one GPU; on the CPU a rehearsal of it")
    one.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what changed from A to B")
    return p


def plan_of(arguments: argparse.Namespace) -> list[tuple[Case, Sequence[str]]]:
    names = arguments.providers or default_names()
    if arguments.gpu_check:
        return gpu_plan(names, arguments.device)
    cpu = arguments.device == "cpu"
    quick = _QUICK if arguments.quick else {}
    sizes = arguments.sizes or quick.get("sizes") or ([1024, 4096] if cpu else [8192, 32768])
    widths = arguments.widths or quick.get("widths") or ([128, 512] if cpu else [768])
    dtypes = arguments.dtypes or (["float32", "bfloat16"] if cpu else ["bfloat16"])
    return [
        (Case(loss, data, dtype, n, width), names)
        for loss in arguments.loss
        for data in arguments.data
        for dtype in dtypes
        for width in widths
        for n in sorted(sizes)
    ]


def measure(arguments: argparse.Namespace, command: str) -> tuple[dict[str, Any], int]:
    """The record, and the exit status: 1 when one of our own providers failed or the device was lost."""
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; use --device cpu")
    if arguments.memory and arguments.device == "cpu" and sys.platform != "linux":
        raise SystemExit("--memory reads /proc, so on the CPU it needs Linux")
    quick = arguments.quick or arguments.gpu_check
    settings = Settings(
        device=arguments.device,
        seconds=min(arguments.seconds, 1.0) if quick else arguments.seconds,
        rounds=arguments.rounds,
        cap=min(arguments.cap, 6.0) if arguments.gpu_check else arguments.cap,
        limit=arguments.limit or (240.0 if arguments.gpu_check else None),
        memory=arguments.memory,
        threads=arguments.threads,
    )
    path = arguments.json
    if path is True or (path is None and arguments.gpu_check and arguments.device == "cuda"):
        path = RESULTS / f"loss-{device_slug(arguments.device)}.json"
    runner = Runner(settings, every_provider())
    record = {"command": command, **describe(), "device": device_slug(arguments.device), "settings": asdict(settings)}
    record["versions"].update({name: found for name in PACKAGES if (found := version(name)) is not None})
    record["versions"]["cuda"] = torch.version.cuda if arguments.device == "cuda" else None
    record["runs"] = runner.rows
    status = 0
    for case, names in plan_of(arguments):
        try:
            runner.run(case, names)
        except DeviceLost as error:
            print(f"{error}; run again with --providers and without it", file=sys.stderr)
            status = 1
            break
        finally:
            _save(record, path)
    if any(row["status"] == "failed" and row["provider"].startswith("ours-") for row in runner.rows):
        status = 1
    if path is not None:
        print(f"written to {path}", file=sys.stderr)
    return record, status


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words)
    if arguments.compare:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.compare)
        print(loss_report.text(loss_report.comparison(before, after)))
        return 0
    if arguments.source is not None:
        record, status = json.loads(arguments.source.read_text(encoding="utf-8")), 0
    else:
        record, status = measure(arguments, shlex.join(["python", "-m", "benchmarks.loss", *words]))
    if arguments.plots is not None:
        from .loss_plots import draw

        for path in draw(record, arguments.plots):
            print(f"drawn {path}", file=sys.stderr)
    print(loss_report.full_text(record))
    if arguments.gpu_check or (arguments.source is not None and record["device"] != "cpu"):
        print("\nTargets for one H200, bfloat16, D = 768, cliperase")
        print(loss_report.text(loss_report.targets_table(record)))
    return status


if __name__ == "__main__":
    sys.exit(main())
