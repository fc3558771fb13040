"""Peak extra memory of one step of one provider on the CPU; `benchmarks.loss --memory` starts it for each.

python -m benchmarks.loss_memory PROVIDER LOSS DATA DTYPE N WIDTH THREADS       prints bytes
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from .batches import Case, gradients, make_batch
from .providers import every_provider


def resident(field: str) -> int:
    """VmRSS, or VmHWM: the most there has been; bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main() -> None:
    name, loss, data, dtype, n, width, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case, provider = Case(loss, data, dtype, int(n), int(width)), every_provider()[name]
    # A small step first: it loads what is loaded on first use. A compiled loss is compiled for each size, and the
    # compiler's own memory is none of the loss's, so its first step at this size does not count either.
    small = replace(case, n=min(320, case.n))
    batch = make_batch(case, "cpu")
    function = provider.make(case)
    gradients(function, make_batch(small, "cpu"))
    if name.endswith("-compiled"):
        gradients(function, batch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    gradients(function, batch)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
