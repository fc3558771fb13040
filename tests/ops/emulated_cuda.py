"""Build csrc/cuda for the CPU, with the emulation in csrc/tests instead of CUDA, and import it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = (*sorted((CSRC / "cuda").glob("*.c*")), CSRC / "buffer.cpp", CSRC / "tests" / "emulated_cuda.cpp")
SOURCES = tuple(source for source in SOURCES if source.suffix in (".cpp", ".cu"))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def build(folder: Path) -> ModuleType:
    """Return the Python bindings of the kernels, for CPU tensors. CLIPERASE_SANITIZE=1: built with sanitizers."""
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing",
        f"-I{CSRC / 'tests' / 'emulation'}", f"-I{CSRC / 'cuda'}", f"-I{CSRC}", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
    ]  # fmt: skip
    if os.environ.get("CLIPERASE_SANITIZE") == "1":
        flags += SANITIZERS
    compiler = os.environ.get("CXX", "c++")

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        _run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, SOURCES)]
    library = folder / "emulated_cuda.so"
    _run([compiler, *flags, "-shared", *objects, "-o", str(library)])
    spec = importlib.util.spec_from_file_location("emulated_cuda", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
