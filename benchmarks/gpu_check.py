"""Build, test and measure on a machine with a GPU, within a given time.

    make gpu-check                       at most 3 minutes
    make gpu-check GPU_SECONDS=480       at most 8 minutes: more tests and more sizes
    python -m benchmarks.gpu_check --seconds 480

The stages are the build of the extension for this GPU's architecture only (left out where an earlier one is still
good), the tests marked `gpu`, `benchmarks.loss --gpu-check` and `benchmarks.fastest`. A stage that fails does not stop
those after it, and one that exceeds its share of the time is ended. The result of each stage is a line of
gpu-check.jsonl, written when the stage ends; the output of a stage is written to STAGE.log as it comes. Both are in
runs/bench, and in the folder $OUT if that is set. The exit status is 0 only if every stage passed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.ops import measured
from cliperase_fast.ops.native import extension

from .machine import IN_CHECKOUT, ROOT, describe, own_folder

SECONDS = 180.0
_END = 15.0  # seconds for what comes after the last measurement
_GPU_TEST = "pytest.mark.gpu"
_WORKERS = 6  # processes that test at the same time: most of the tests' time is compilation
# As pytest writes an outcome, then as pytest-xdist does.
_OUTCOMES = re.compile(r"::\S.* (PASSED|FAILED|ERROR|SKIPPED)\b|^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) .*::")


@dataclass(frozen=True)
class Stage:
    """A command, and the share of the remaining time that it may take. Its {limit} is replaced by these seconds."""

    name: str
    command: Sequence[str]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a stage. status: passed, failed, or out of time."""

    stage: str
    status: str
    seconds: float
    tests: Mapping[str, int]  # outcomes, of a stage that runs pytest
    last_line: str


def architecture(capability: tuple[int, int]) -> str:
    """Return a GPU's architecture as CLIPERASE_CUDA_ARCHITECTURES takes it."""
    number = f"{capability[0]}{capability[1]}"
    return "90a" if number == "90" else number


def build_stage(target: str) -> Stage | None:
    """Return the build of the extension for one architecture; None if it has been built from the same source."""
    stamp, key = ROOT / "build" / "gpu-check.txt", _build_key(target)
    if (
        stamp.is_file()
        and stamp.read_text(encoding="utf-8") == key
        and (extension.why_missing() or extension.why_no_cuda()) is None
    ):
        return None
    build = f"{shlex.quote(sys.executable)} setup.py -q build_ext --inplace"
    mark = f"mkdir -p build && printf %s {shlex.quote(key)} > {shlex.quote(str(stamp))}"
    environment = {
        "CLIPERASE_EXTENSION": "1", "CLIPERASE_CUDA": "ON",
        "CMAKE_ARGS": f"-DCLIPERASE_CUDA_ARCHITECTURES={target} {os.environ.get('CMAKE_ARGS', '')}".strip(),
    }  # fmt: skip
    return Stage("build", ["sh", "-c", f"{build} && {mark}"], 0.4, environment)


def _build_key(target: str) -> str:
    """Return a hash of all that the build depends on here."""
    digest = hashlib.sha256(f"{target} {sys.executable} {sys.version}".encode())
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file() and "tests" not in path.parts]
    for path in (ROOT / "setup.py", ROOT / "CMakeLists.txt", *sources):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def stages(target: str) -> list[Stage]:
    # Only files that hold such tests are imported: they need torch, triton and pytest, and not the extra `dev`.
    files = sorted(
        (path for path in (ROOT / "tests").rglob("test_*.py") if _GPU_TEST in path.read_text(encoding="utf-8")),
        key=lambda path: ("triton" not in path.name, path.name),
    )
    python, build = [sys.executable, "-u", "-m"], build_stage(target)
    # A file that cannot be imported, for want of the extension or of a library, does not stop the others.
    tests = [
        *python, "pytest", "-vv", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu",
        "--continue-on-collection-errors", *_in_parallel(), *map(str, files),
    ]  # fmt: skip
    return [
        *([] if build is None else [build]),
        Stage("tests", tests, 0.4),
        Stage("benchmark", [*python, "benchmarks.loss", "--gpu-check", "--no-plots", "--limit", "{limit}"], 1.0),
        Stage("choice", [*python, "benchmarks.fastest"], 1.0),
    ]


def _in_parallel() -> list[str]:
    """Return pytest's options for several processes, if pytest-xdist is installed and there are processors for them."""
    workers = min(_WORKERS, (os.cpu_count() or 1) // 2)
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(workers), "--dist", "loadgroup"]  # tests that take much memory are one group


def check(wanted: Sequence[Stage], seconds: float, folders: Sequence[Path]) -> list[Result]:
    """Run the stages one after the other, at most `seconds` in all, and write their results into `folders`."""
    ends, results = time.monotonic() + seconds, []
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu-check.jsonl").write_text("", encoding="utf-8")
    for place, stage in enumerate(wanted):
        left = ends - time.monotonic() - _END * (place < len(wanted) - 1)
        result = _run(stage, max(1.0, left * stage.share), folders)
        results.append(result)
        for folder in folders:
            with (folder / "gpu-check.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
    return results


def _run(stage: Stage, limit: float, folders: Sequence[Path]) -> Result:
    command = [word.replace("{limit}", f"{0.8 * limit:.0f}") for word in stage.command]
    print(f"\n{stage.name}: at most {limit:.0f} s: {shlex.join(command)}", flush=True)
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **stage.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    logs = [(folder / f"{stage.name}.log").open("w", encoding="utf-8") for folder in folders]

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            for to in filter(None, (sys.stdout, *logs)):
                to.write(line)
                to.flush()

    reader = threading.Thread(target=copy)
    reader.start()
    try:
        status = "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join()
        for log in logs:
            log.close()
    tests = Counter(found[found.lastindex or 0].lower() for line in lines if (found := _OUTCOMES.search(line)))
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Result(stage.name, status, round(time.monotonic() - began, 1), dict(tests), last[:500])


def summary(results: Sequence[Result]) -> str:
    """A line for each stage."""
    lines = []
    for result in results:
        tests = ", ".join(f"{count} {outcome}" for outcome, count in result.tests.items())
        lines.append(f"{result.stage:10} {result.status:12} {result.seconds:6.1f} s  {tests or result.last_line}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__, formatter_class=formatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all stages together ({SECONDS:.0f})")
    arguments = parser.parse_args(words)
    if not IN_CHECKOUT:
        raise SystemExit("the tests are not installed: run this in a checkout")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; `make test` has the tests that need none")
    folders = result_folders()
    print(json.dumps(describe()), flush=True)
    results = check(stages(architecture(torch.cuda.get_device_capability())), arguments.seconds, folders)
    for folder in folders:
        shutil.copy(measured.PATH, folder)
    print(f"\n{summary(results)}\nresults: {', '.join(map(str, folders))}")
    return 0 if all(result.status == "passed" for result in results) else 1


def result_folders() -> list[Path]:
    """Return runs/bench, and $OUT if it is set."""
    out: Any = os.environ.get("OUT")
    return [own_folder(), *([Path(out)] if out else [])]


if __name__ == "__main__":
    sys.exit(main())
