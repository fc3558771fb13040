"""Build csrc/cuda as an installation does, for every architecture, and report the resources of each kernel.

python -m benchmarks.native_kernel_report writes benchmarks/results/native_kernels.json; needs nvcc and cmake, no GPU
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from .machine import RESULTS, ROOT, describe

SOURCES = ROOT / "csrc" / "cuda"
# The bytes that a kernel may spill: with more registers only one block of threads would fit a multiprocessor.
SPILLS = {("sm_120", "forward_kernel", "calibrated, edited"): 24}
_ARCHITECTURE = re.compile(r"^arch = (sm_\w+)$")
_FUNCTION = re.compile(r"Function \w+?\d+([a-z_]+_kernel)(?:INS\w*?_?4FormI((?:Lb[01]E)+)E)?")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def kernels() -> list[str]:
    """Return the names of the kernels in the sources."""
    found = [
        re.findall(r"__global__ void .*?\b(\w+_kernel)\(", path.read_text()) for path in sorted(SOURCES.glob("*.cu"))
    ]
    return [name for names in found for name in names]


def report(build: Path) -> Iterator[dict[str, Any]]:
    """Yield the resources that cuobjdump reports for the objects in a build folder."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for path in sorted(build.rglob("*.cu.o")):
        text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
        architecture = kernel = form = None
        for line in text.splitlines():
            if found := _ARCHITECTURE.match(line):
                architecture = found[1]
            elif found := _FUNCTION.search(line):
                kernel, form = found[1], _form(found[2])
            elif (found := _RESOURCES.search(line)) and kernel is not None:
                registers, stack, shared, local = map(int, found.groups())
                yield {
                    "architecture": architecture, "kernel": kernel, "form": form, "registers": registers,
                    "spilled_bytes": stack + local, "shared_bytes": shared,
                }  # fmt: skip
                kernel = None


def _form(flags: str | None) -> str:
    """Describe the template arguments (plain, masked, teacher, compared, edited)."""
    if flags is None:
        return "any"
    plain, masked, teacher, compared, edited = (flag == "1" for flag in re.findall(r"Lb([01])E", flags))
    if compared:
        assert plain and teacher and not (masked and edited)
        return "calibrated, edited" if edited else "calibrated, groups" if masked else "calibrated"
    if teacher:
        return "both, groups" if masked else "consistency, or both"
    assert plain != masked
    return "retention, groups" if masked else "retention"


def _compile(folder: Path) -> float:
    """Compile, and return the time in seconds."""
    options = ["-G", "Ninja", "-DCLIPERASE_CUDA=ON", "-DCLIPERASE_PYTHON=OFF"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    subprocess.run(["cmake", "--build", folder, "--target", "cliperase_cuda"], check=True)
    return time.perf_counter() - start


def _nvcc(folder: Path) -> str:
    cache = (folder / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    assert compiler is not None
    text = subprocess.run([compiler[1], "--version"], check=True, capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder)
        seconds = _compile(build)
        runs, nvcc = list(report(build)), _nvcc(build)
    record = {
        "command": "python -m benchmarks.native_kernel_report", **describe(), "nvcc": nvcc,
        "build_seconds": round(seconds), "runs": runs,
    }  # fmt: skip
    (RESULTS / "native_kernels.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for run in runs:
        print(*(f"{key}={value}" for key, value in run.items()))
    return int(any(run["spilled_bytes"] > allowed_spill(run) for run in runs))


def allowed_spill(run: dict[str, Any]) -> int:
    return SPILLS.get((run["architecture"], run["kernel"], run["form"]), 0)


if __name__ == "__main__":
    sys.exit(main())
