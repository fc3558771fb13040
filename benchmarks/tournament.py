"""Measure the variants of the Triton kernels against each other on a GPU, and save the best configuration.

    make gpu-tournament                            at most 6 minutes
    make gpu-tournament GPU_SECONDS=480            at most 8
    make gpu-tune                                  then: search more launch configurations, at most 6 minutes
    TRITON_INTERPRET=1 python -m benchmarks.tournament --rehearse     small sizes in Triton's interpreter

The rounds, the most important first: correctness of each variant against float64; the forward and the backward kernel
of RM + CM in bfloat16 with N = 32,768 and D = 768; whole sweeps with N = 32,768 and 65,536; the same of the backend
`native` (`tournament_native.py`), where the extension has its CUDA kernels; the calibrated loss; the kernels with kept
similarities; the products dI and dT for several shapes of blocks of dS; the GPU's counters during the best sweep, where
Nsight Compute (`ncu`) is installed. Each result is a line of tournament-GPU.jsonl, written as it comes into runs/bench,
and into the folder $OUT if that is set. A second run goes on where the first one stopped (on another machine, with the
file in its runs/bench), and leaves out an entry that has ended the process twice. The last line has the best
configuration, which is saved like a tuned one, so that the losses use it from then on. Delete the file to measure
again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.calibrated import Calibrated, CalibratedInputs
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.matmul import add_product, product
from cliperase_fast.ops.spec import Need, SavedStats, SimilarityInputs, Sweep, Weights
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.configs import INTERPRETER, SHARED, Config, Configs, configs_for
from cliperase_fast.ops.triton.sweep import TUNING_PAIRS, TritonKernels, kernel_milliseconds

from . import gpu_check
from .batches import Batch, Case, forgotten, make_batch
from .machine import IN_CHECKOUT, describe
from .options import device_slug
from .timing import Clock
from .tournament_checks import Entry, Row, outcome, worst_error
from .tournament_native import native_entries

SECONDS = 360.0
_WIDTH, _SIZES = 768, (32_768, 65_536)
_REHEARSAL = (64, 96)
_REPEATS, _MEASURE_SECONDS = 15, 0.4
_STARTS = 4  # of the measuring process
_SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")  # of Nsight Compute
_COUNTER_SECONDS = 90.0
# Rows and columns of a block of dS, beside the one that is used; 2048 x N is the strip of earlier versions.
_BLOCKS = ((2048, 32_768), (4096, 8192), (8192, 8192), (5632, 5632), (5632, 11_264), (11_264, 5632))
# Not shipped and not in SHARED: two blocks of threads on a multiprocessor, other tiles and stages.
FORWARD = (
    Config(64, 128, 64, 4, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 2, True),
    Config(128, 64, 64, 8, 4, True), Config(64, 128, 64, 8, 3, True), Config(64, 128, 64, 4, 2, True),
)  # fmt: skip
BACKWARD = (
    Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 2, True), Config(128, 64, 64, 8, 4, True),
    Config(64, 128, 64, 4, 2, True), Config(128, 64, 64, 4, 3), Config(128, 128, 64, 8, 3),
)  # fmt: skip
# Beside the configuration that is used; others of 128 rows and columns spill in this loss.
_CALIBRATED = (Config(64, 64, 64, 8, 4), Config(64, 64, 64, 4, 3))


class Tournament:
    """The entries, their results, and what they share."""

    def __init__(self, device: str, sizes: Sequence[int], width: int, paths: Sequence[Path]) -> None:
        self.device, self.sizes, self.width, self.paths = device, sizes, width, paths
        self.rows = self._read(paths[0])
        self.clock = Clock(device)
        gpu = device == "cuda"
        major = torch.cuda.get_device_capability()[0] if gpu else 0
        self.shipped = configs_for(major, torch.bfloat16, width) if gpu else INTERPRETER
        tile = replace(INTERPRETER.forward, shared=True)
        shared = SHARED.get(major, Configs(tile, tile, tile, tile) if not gpu else SHARED[8])
        self.configs = {
            "forward": unique(self.shipped.forward, shared.forward, *(FORWARD if gpu else ())),
            "backward": unique(self.shipped.backward, shared.backward, *(BACKWARD if gpu else ())),
            "forward_groups": unique(
                self.shipped.forward_groups, shared.forward_groups, *((FORWARD[0], FORWARD[3]) if gpu else ())
            ),
        }
        self._made: dict[int, Batch] = {}

    @staticmethod
    def _read(path: Path) -> list[Row]:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []

    def write(self, row: Row) -> None:
        self.rows.append(row)
        for path in self.paths:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def result(self, key: str) -> Row | None:
        return next((row for row in reversed(self.rows) if row["key"] == key and row["status"] != "begun"), None)

    def passed(self, key: str) -> bool:
        row = self.result(key)
        return row is not None and row["status"] == "passed"

    def run(self, ends: float) -> bool:
        """Run the entries that have no result yet until `ends`; return whether all have one."""
        for entry in self.entries():
            if self.result(entry.key) is not None:
                continue
            if time.monotonic() > ends:
                print(f"out of time before {entry.key}; run the same command to go on", flush=True)
                return False
            self.write(self._row(entry))
            print(json.dumps(self.rows[-1]), flush=True)
        return True

    def _row(self, entry: Entry) -> Row:
        if entry.missing is not None:
            return {"key": entry.key, "status": "left out", "reason": entry.missing}
        if entry.needs is not None and not self.passed(entry.needs):
            return {"key": entry.key, "status": "left out", "reason": f"{entry.needs} did not pass"}
        begun = Counter(row["key"] for row in self.rows if row["status"] == "begun")
        if begun[entry.key] >= 2:
            return {"key": entry.key, "status": "failed", "reason": "the process ended in it, twice"}
        self.write({"key": entry.key, "status": "begun"})
        try:
            return {"key": entry.key, "status": "passed", **entry.run()}
        except Exception as error:
            if self.device == "cuda":
                torch.cuda.synchronize()  # raises where the device is lost, which ends the process
            return {"key": entry.key, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}

    def entries(self) -> Iterator[Entry]:
        """Yield the entries in their order; later ones depend on the results of earlier ones."""
        n = self.sizes[0]
        for way, configs in self.configs.items():
            for config in configs:
                yield Entry(f"correct {way} {name(config)}", partial(self.correct, way, config))
        yield Entry("correct calibrated", self.correct_calibrated)
        kept = self.shipped.forward_groups
        yield Entry("correct compact", lambda: self.correct("forward_groups", kept, "compact"))
        for way in ("forward", "backward"):
            for config in self.configs[way]:
                call = partial(self.time_kernel, way, config, n, kept=False)
                yield Entry(f"{way} {name(config)}", call, f"correct {way} {name(config)}")
        for size in self.sizes:
            yield Entry(f"sweep {size} shipped", partial(self.time_sweep, self.shipped, size, "nothing"))
            yield Entry(f"sweep {size} best", partial(self.time_best, size, "nothing"))
        yield from native_entries(self)
        used, *others = self.calibrated_configs()
        for config, keep in ((used, "nothing"), (used, "similarities"), *((other, "nothing") for other in others)):
            timed = partial(self.time_calibrated, config, n, keep)
            yield Entry(f"calibrated {n} {name(config)}, keep {keep}", timed, "correct calibrated")
        for way in ("forward_groups", "backward"):
            for config in self.configs[way]:
                call = partial(self.time_kernel, way, config, n, kept=True)
                yield Entry(f"kept {way} {name(config)}", call, f"correct {way} {name(config)}")
        yield Entry(f"sweep {n} best, kept", partial(self.time_best, n, "similarities"))
        yield Entry(f"sweep {n} best, compact", partial(self.time_best, n, "compact"), "correct compact")
        for shape in _BLOCKS:
            rows, columns = (min(n, count) for count in shape)
            yield Entry(f"products {rows} x {columns}", partial(self.time_products, rows, columns))
        yield Entry("counters", lambda: counters(self.best(), n, self.width))
        yield Entry("best", lambda: {"configs": asdict(self.best())})

    def with_config(self, way: str, config: Config) -> TritonKernels:
        return TritonKernels(replace(self.shipped, **{way: config}))

    def batch(self, n: int) -> Batch:
        if n not in self._made:
            self._made.clear()  # one size at a time
            self._made[n] = make_batch(Case("cliperase", "peaked", "bfloat16", n, self.width), self.device)
        return self._made[n]

    def inputs(self, n: int, groups: bool = False, keep: str = "nothing") -> SimilarityInputs:
        b = self.batch(n)
        ids = torch.arange(n, dtype=torch.int64, device=self.device) // 2 if groups else None
        return SimilarityInputs(
            b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale, ids, keep=keep
        )

    def correct(self, way: str, config: Config, keep: str | None = None) -> Row:
        """Compare the losses and gradients of a few hundred pairs with float64; both kinds of groups of a kernel."""
        worst, count = 0.0, 600 if self.device == "cuda" else 40
        for groups in (False, True) if way == "forward_groups" else (False,):
            inputs = self.inputs(count, groups, keep or ("similarities" if way == "forward_groups" else "nothing"))
            found = outcome(as_sweep_of(self.with_config(way, config)), inputs, inputs.image.dtype)
            truth = outcome(eager.sweep, inputs, torch.float64)
            worst = max(worst, worst_error(found, truth))
        return {"error": worst}

    def time_kernel(self, way: str, config: Config, n: int, kept: bool) -> Row:
        """Time one pass; kept: with S and S° stored, or read from memory."""
        kernels, inputs = self.with_config(way, config), self.inputs(n)
        size = 4 * n * n * 2 if kept else 0
        with torch.no_grad():
            if way.startswith("forward"):
                return {"ms": self.median_ms(lambda: kernels.forward(inputs, size)), "config": asdict(config)}
            _, _, both, cache = kernels.losses(inputs, size)
            weight = torch.full((), 1 / n, dtype=torch.float32, device=self.device)
            saved, weights = SavedStats(both, n, cache), Weights(weight, weight)
            ms = self.median_ms(lambda: kernels.backward(inputs, saved, weights, Need()))
        return {"ms": ms, "config": asdict(config)}

    def calibrated_configs(self) -> list[Config]:
        """Return the tiles to try for the calibrated loss, in both directions; those that are used come first."""
        return unique(self.shipped.forward, *(_CALIBRATED if self.device == "cuda" else ()))

    def calibrated_with(self, config: Config) -> Calibrated:
        same = config == self.shipped.forward
        configs = self.shipped if same else Configs(config, config, config, config)
        return as_calibrated(_named(TritonKernels(configs)))

    def calibrated_inputs(self, n: int, keep: str, dtype: torch.dtype | None = None) -> CalibratedInputs:
        """Return a batch whose first eighth is to be forgotten, in `dtype` if given; the student needs gradients."""
        b = self.batch(n)

        def converted(tensor: Tensor | None) -> Tensor:
            assert tensor is not None
            tensor = tensor.detach()
            return tensor if dtype is None else tensor.to(dtype)

        image, text, scale = (converted(tensor).requires_grad_() for tensor in (b.image, b.text, b.scale))
        teacher_image, teacher_text, teacher_scale = map(converted, (b.teacher_image, b.teacher_text, b.teacher_scale))
        mask = torch.arange(n, dtype=torch.int64, device=self.device) < forgotten(n)
        levels = torch.full((2, n), 0.05, dtype=torch.float32, device=self.device)
        return CalibratedInputs(
            image, text, scale, teacher_image, teacher_text, teacher_scale, mask, levels[0], levels[1], keep=keep
        )

    def correct_calibrated(self) -> Row:
        """Compare the calibrated loss of a few hundred pairs, as it is used, with float64."""
        count = 600 if self.device == "cuda" else 40
        found = _calibrated_outcome(
            self.calibrated_with(self.shipped.forward).loss, self.calibrated_inputs(count, "nothing")
        )
        truth = _calibrated_outcome(eager.calibrated, self.calibrated_inputs(count, "nothing", torch.float64))
        return {"error": worst_error(found, truth)}

    def time_calibrated(self, config: Config, n: int, keep: str) -> Row:
        """Time forward and backward of the calibrated loss with its default weights."""
        loss, inputs = self.calibrated_with(config).loss, self.calibrated_inputs(n, keep)
        return {"ms": self.median_ms(lambda: _calibrated_outcome(loss, inputs)), "config": asdict(config)}

    def time_products(self, rows: int, columns: int) -> Row:
        """Time dI and dT of the whole batch, in blocks of dS of this shape."""
        b, n = self.batch(self.sizes[0]), self.sizes[0]
        block = torch.randn(rows, columns, dtype=torch.float32, device=self.device).to(b.image.dtype)
        image, text = b.image.detach()[:rows], b.text.detach()[:columns]
        towards = torch.zeros(rows, self.width, dtype=torch.float32, device=self.device)
        total = torch.zeros(columns, self.width, dtype=torch.float32, device=self.device)

        def both() -> None:
            if columns < n:
                add_product(towards, block, text)
            else:
                product(block, text)
            add_product(total, block.T, image)

        return {"ms": self.median_ms(both) * (n / rows) * (n / columns), "bytes": block.nbytes}

    def time_best(self, n: int, keep: str) -> Row:
        """Time a step with the configurations that are the fastest by now."""
        return self.time_sweep(self.best(), n, keep)

    def time_sweep(self, configs: Configs, n: int, keep: str) -> Row:
        row = self.time_step(as_sweep_of(TritonKernels(configs)), self.inputs(n, keep=keep))
        return {**row, "configs": asdict(configs), "keep": keep}

    def time_step(self, sweep: Sweep, inputs: SimilarityInputs) -> Row:
        """Time forward and backward of RM + CM, and measure the memory beyond the inputs."""
        leaves = [inputs.image, inputs.text, inputs.scale]

        def step() -> None:
            retention, consistency = sweep(inputs)
            torch.autograd.grad(retention + 3 * consistency, leaves)

        step()
        row: Row = {}
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            row["extra_bytes"] = torch.cuda.max_memory_allocated() - before
        return {"ms": self.median_ms(step), **row}

    def median_ms(self, call: Callable[[], Any]) -> float:
        call()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - began < _MEASURE_SECONDS and len(times) < _REPEATS):
            self.clock.start()
            call()
            self.clock.mark()
            times += self.clock.between()
        return 1e3 * statistics.median(times)

    def best(self) -> Configs:
        """Return the fastest configuration of each kernel so far; what was not measured stays as shipped."""
        chosen = {}
        for way, prefix in (
            ("forward", "forward"),
            ("backward", "backward"),
            ("forward_groups", "kept forward_groups"),
        ):
            rows = [
                row
                for config in self.configs[way]
                if (row := self.result(f"{prefix} {name(config)}")) is not None and row["status"] == "passed"
            ]
            if rows:
                chosen[way] = Config(**min(rows, key=lambda row: row["ms"])["config"])
        return replace(self.shipped, **chosen)


def name(config: Config) -> str:
    shape = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{shape} warps {config.warps} stages {config.stages}" + " shared" * config.shared


def unique(*configs: Config) -> list[Config]:
    return list(dict.fromkeys(configs))


_NUMBERS = itertools.count()


def _named(kernels: TritonKernels) -> TritonKernels:
    """Give `kernels` a name that is not taken."""
    kernels.name = f"tournament_{next(_NUMBERS)}"
    return kernels


def as_sweep_of(kernels: TritonKernels) -> Sweep:
    return as_sweep(_named(kernels))


def _calibrated_outcome(loss: Callable[[CalibratedInputs], Sequence[Tensor]], inputs: CalibratedInputs) -> list[Tensor]:
    """Return the loss with its default weights, and the gradients."""
    terms = loss(inputs)
    total = terms[0] + 3 * terms[1] + 3 * terms[2] + 30 * terms[3]
    return [total.detach(), *torch.autograd.grad(total, (inputs.image, inputs.text, inputs.scale))]


def counters(configs: Configs, n: int, width: int) -> Row:
    """Return what Nsight Compute counts in the kernels of one sweep: {kernel: {metric: value}}."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"reason": "ncu is not installed"}
    command = [
        tool, "--clock-control", "none", "--kernel-name", "regex:forward_kernel|backward_kernel",
        "--launch-count", "12", "--csv", "--page", "details", *(f"--section={section}" for section in _SECTIONS),
        sys.executable, "-m", f"{__package__}.tournament", "--sweep", json.dumps(asdict(configs)), str(n), str(width),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=gpu_check.ROOT, capture_output=True, text=True, check=False, timeout=_COUNTER_SECONDS
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        kernel = found.setdefault(row["Kernel Name"], {})
        kernel.setdefault(f"{row['Metric Name']} [{row['Metric Unit']}]", row["Metric Value"])  # of the first launch
    if not found:
        raise RuntimeError(f"ncu printed no counters: {(done.stdout + done.stderr).strip()[-300:]}")
    return {"kernels": found}


def run_sweep(configs: Configs, n: int, width: int) -> None:
    """Run forward and backward once, for a profiler."""
    tournament = Tournament("cuda", (n,), width, [Path(os.devnull)])
    inputs = tournament.inputs(n)
    losses = as_sweep_of(TritonKernels(configs))(inputs)
    torch.autograd.grad(losses[0] + 3 * losses[1], [inputs.image, inputs.text, inputs.scale])
    torch.cuda.synchronize()


def tune(widths: Sequence[int], seconds: float) -> None:
    """Search all configurations for bfloat16 features of these widths, and save those of each width."""
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    properties: Any = torch.cuda.get_device_properties(device)
    path, limit = autotune.saved_path(device), properties.shared_memory_per_block_optin
    each = seconds / (len(widths) * len(fields(Configs)))
    for width in widths:
        key, found = saved_key(width), dict(autotune.load(path))
        start = found.get(key, configs_for(torch.cuda.get_device_capability(device)[0], dtype, width))
        timer = partial(kernel_milliseconds, device, dtype, width, TUNING_PAIRS)
        found[key] = autotune.search(key, start, dtype.itemsize, limit, timer, each)
        autotune.save(path, found)
        print(f"width {width}: {found[key]}", flush=True)
        for folder in gpu_check.result_folders():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"tuned-{path.name}")


def saved_key(width: int) -> str:
    """Return under which name `autotune` saves configurations for bfloat16 features."""
    return f"bfloat16, width {triton.next_power_of_2(width)}"


def measure(device: str, seconds: float, paths: Sequence[Path]) -> int:
    """Run the entries in this process; return 0 if all of them have a result."""
    sizes, width = (_SIZES, _WIDTH) if device == "cuda" else ((_REHEARSAL[0],), _REHEARSAL[1])
    tournament = Tournament(device, sizes, width, paths)
    if not tournament.rows:
        tournament.write({"key": "machine", "status": "passed", **describe()})
    complete = tournament.run(time.monotonic() + seconds)
    if complete and device == "cuda":
        gpu = torch.device("cuda", 0)
        path = autotune.saved_path(gpu)
        autotune.save(path, {**autotune.load(path), saved_key(width): tournament.best()})
        print(f"saved in {path}", flush=True)
    return 0 if complete else 1


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.tournament", description=__doc__, formatter_class=formatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it ({SECONDS:.0f})")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    parser.add_argument("--tune", type=int, nargs="+", metavar="WIDTH", help="search configurations for these widths")
    parser.add_argument("--sweep", nargs=3, help=argparse.SUPPRESS)  # configurations, N, D: one sweep for a profiler
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in this process, without a new start
    arguments = parser.parse_args(words)
    if not IN_CHECKOUT:
        raise SystemExit("the tournament is not for an installed package: run this in a checkout")
    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; use --rehearse with TRITON_INTERPRET=1")
    if arguments.sweep:
        configs, n, width = arguments.sweep
        run_sweep(Configs(**{way: Config(**config) for way, config in json.loads(configs).items()}), int(n), int(width))
        return 0
    if arguments.tune:
        tune(arguments.tune, arguments.seconds)
        return 0
    device = "cpu" if arguments.rehearse else "cuda"
    folders = gpu_check.result_folders()[-1 if arguments.rehearse else 0 :]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tournament-{device_slug(device)}.jsonl" for folder in folders]
    if arguments.alone or arguments.rehearse:
        return measure(device, arguments.seconds, paths)
    ends = time.monotonic() + arguments.seconds
    for _ in range(_STARTS):  # a fault of a kernel ends the process; the next one goes on after it
        left = ends - time.monotonic()
        command = [sys.executable, "-m", f"{__package__}.tournament", "--alone", "--seconds", f"{left - 20:.0f}"]
        try:
            status = subprocess.run(command, cwd=gpu_check.ROOT, check=False, timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = 1
        if status == 0 or time.monotonic() > ends - 30:
            return status
    return 1


if __name__ == "__main__":
    sys.exit(main())
