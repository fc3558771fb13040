"""Bound the speedup over eager that any loss can have on this CPU: four products at the processor's peak rate.

    python -m benchmarks.product_bound --sizes 2048,4096 --widths 128,512,768 --json

The gradients need an N x N x D matrix product for each of S, S°, dI and dT: at least four products of 2 N² D FLOP. The
peak is that of fused multiply-adds on registers, measured with a few lines of C that are compiled for the processor and
run between the losses on the same number of threads. "bound" is eager's time divided by that of the four products, for
the float32 losses of `benchmarks.loss`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .batches import Case, make_batch
from .loss_report import text
from .machine import RESULTS, describe
from .providers import default_names, every_provider
from .records import Table
from .timing import Clock, Step, Times, in_rounds, loss_step, summary

PRODUCTS = 4
_FMA_SECONDS = 0.05
_SOURCE = r"""
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__FMA__)
#define LANES 8
#else
#error "neither AVX-512 nor FMA"
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
/* FLOP of `count` rounds of 12 independent fused multiply-adds on each thread. */
double fma_flop(long count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        vec b = {0}, a[12] = {{0}};
        for (long i = 0; i < count; ++i)
            __asm__ volatile(
                "vfmadd231ps %12, %12, %0\n vfmadd231ps %12, %12, %1\n vfmadd231ps %12, %12, %2\n"
                "vfmadd231ps %12, %12, %3\n vfmadd231ps %12, %12, %4\n vfmadd231ps %12, %12, %5\n"
                "vfmadd231ps %12, %12, %6\n vfmadd231ps %12, %12, %7\n vfmadd231ps %12, %12, %8\n"
                "vfmadd231ps %12, %12, %9\n vfmadd231ps %12, %12, %10\n vfmadd231ps %12, %12, %11\n"
                : "+x"(a[0]), "+x"(a[1]), "+x"(a[2]), "+x"(a[3]), "+x"(a[4]), "+x"(a[5]), "+x"(a[6]), "+x"(a[7]),
                  "+x"(a[8]), "+x"(a[9]), "+x"(a[10]), "+x"(a[11])
                : "x"(b));
    }
    return 2.0 * LANES * 12 * count * threads;
}
"""


def _fma() -> Any:
    """The C function above. SystemExit where it cannot be had."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise SystemExit("the peak is measured in C, and there is no compiler: apt install gcc (or your system's)")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "fma.c", Path(folder) / "fma.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the peak cannot be measured here: {done.stderr.strip()}")
        function = ctypes.CDLL(str(library)).fma_flop
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_int]
    return function


def _peak_step(fma: Any, case: Case, threads: int, clock: Clock) -> Step:
    """A step that takes as long as the case's four products would at the peak."""
    clock.start()
    flop = fma(1_000_000, threads)
    clock.mark()
    count = int(1_000_000 * _FMA_SECONDS / clock.between()[0])
    share = PRODUCTS * 2.0 * case.n**2 * case.width / (flop * count / 1_000_000)

    def step() -> Times:
        clock.start()
        fma(count, threads)
        clock.mark()
        return Times(0.0, clock.between()[0] * share)

    return step


def measure(sizes: Sequence[int], widths: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    fma, clock, known = _fma(), Clock("cpu"), every_provider()
    eager = next(name for name in default_names("cliperase") if name.startswith("open_clip"))
    rows = []
    for n in sizes:
        for width in widths:
            case = Case("cliperase", "peaked", "float32", n, width)
            batch = make_batch(case, "cpu")
            steps = {name: loss_step(known[name].make(case), batch, clock) for name in (eager, "ours-auto")}
            steps["peak"] = _peak_step(fma, case, torch.get_num_threads(), clock)
            estimates = {name: min(step().both for _ in range(2)) for name, step in steps.items()}
            samples, failures = in_rounds(steps, seconds, None, estimates, cap=60.0)
            for error in failures.values():
                raise error
            of = {name: summary([times.both for times in samples[name]]) for name in steps}
            rows.append({**asdict(case), "eager_ms": of[eager], "ours_ms": of["ours-auto"], "peak_ms": of["peak"]})
    return rows


def bound_table(rows: Sequence[dict[str, Any]]) -> Table:
    head = ("N", "D", "eager, ms", "four products at the peak, ms", "bound", "measured", "of the bound")
    lines = []
    for row in rows:
        eager, ours, peak = (row[name]["median"] for name in ("eager_ms", "ours_ms", "peak_ms"))
        ratios = f"{eager / peak:.2f}x", f"{eager / ours:.2f}x", f"{100 * peak / ours:.0f} %"
        lines.append((f"{row['n']:,}", str(row["width"]), f"{eager:.0f}", f"{peak:.0f}", *ratios))
    return head, lines


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else list(words)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.product_bound", description=__doc__, formatter_class=formatter
    )
    numbers: dict[str, Any] = {"type": lambda text: [int(word) for word in text.split(",")]}
    parser.add_argument("--sizes", default=[2048, 4096], help="N (2048,4096)", **numbers)
    parser.add_argument("--widths", default=[128, 512, 768], help="D (128,512,768)", **numbers)
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each of a size's three (2)")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "product-bound.json", metavar="PATH",
                        help="write the record; without PATH to benchmarks/results/product-bound.json")  # fmt: skip
    arguments = parser.parse_args(words)
    command = shlex.join(["python", "-m", "benchmarks.product_bound", *words])
    record = {"command": command, **describe(), "runs": measure(arguments.sizes, arguments.widths, arguments.seconds)}
    print(text(bound_table(record["runs"])))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
