"""Load the compiled extension `cliperase_fast._C`, say why it is missing, and convert tensors for it.

The extension checks each buffer before it reads or writes, and raises ValueError if the buffer does not fit.
"""

from __future__ import annotations

import importlib
import os
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.ops.spec import DTYPE_NAMES

GRAPHS_VARIABLE = "CLIPERASE_CUDA_GRAPHS"  # 1: `graphs.py` runs the sweep on a GPU
INSTRUCTIONS_VARIABLE = "CLIPERASE_CPU"  # amx, avx512_bf16, avx512, avx2 or portable, instead of the widest
LARGEST_WIDTH = 1 << 20  # of features, by the checks of the extension
_INTERFACE = 9  # must equal that of csrc/bindings.cpp
_CUDA_INTERFACE = 1  # must equal that of csrc/cuda/bindings.cpp
# setup.py leaves its reason here when it could not build the extension.
_REASON_FILE = Path(__file__).parents[2] / "_C_missing.txt"


@cache
def load() -> ModuleType:
    """Import the extension. Raises ImportError if it is missing, so call `why_missing` first."""
    return importlib.import_module("cliperase_fast._C")


def instruction_set() -> str | None:
    """Return the instruction set that the environment sets; None means the widest.

    Raises InputError if it names none that runs here.
    """
    name = os.environ.get(INSTRUCTIONS_VARIABLE) or None
    if name is not None:
        _require(name)
    return name


@cache
def _require(name: str) -> None:
    try:
        load().cpu.instruction_set(name)
    except ValueError as error:
        raise InputError(f"{INSTRUCTIONS_VARIABLE}={name}: {error}; unset it") from error


def wants_graphs() -> bool:
    """Return whether the environment asks for CUDA graphs."""
    asked = os.environ.get(GRAPHS_VARIABLE) or "0"
    if asked not in ("0", "1"):
        raise InputError(f"{GRAPHS_VARIABLE}={asked} must be 1 (use CUDA graphs), 0 or unset (do without)")
    return asked == "1"


def why_missing() -> str | None:
    """Return why the CPU sweep cannot run here, with the remedy; None if it can."""
    try:
        module = load()
    except ImportError as error:
        return _reason(error)
    if getattr(module, "INTERFACE", 0) != _INTERFACE:
        return "the extension was built from another version of the source; install cliperase_fast again"
    return wrong_instruction_set()


def wrong_instruction_set() -> str | None:
    """Return why the instruction set that the environment names does not run here; None if it does, or names none."""
    try:
        if getattr(load(), "INTERFACE", 0) == _INTERFACE:
            instruction_set()
    except InputError as error:
        return str(error)
    except ImportError:
        return None  # nothing would run it
    return None


def why_no_cuda() -> str | None:
    """Return why the CUDA kernels cannot run here; None if they can. Requires that `why_missing` returns None."""
    cuda = getattr(load(), "cuda", None)
    if cuda is None:
        return "the extension was built without CUDA; put nvcc on PATH, then install cliperase_fast again"
    if getattr(cuda, "INTERFACE", 0) != _CUDA_INTERFACE:
        return "the CUDA kernels were built from another version of the source; install cliperase_fast again"
    return None


def _reason(error: ImportError) -> str:
    again = "then install cliperase_fast again"
    if not isinstance(error, ModuleNotFoundError):
        how = "pip install --force-reinstall --no-deps . in the source folder"
        return f"the extension does not load ({error}); build it on this machine: {how}"
    if _REASON_FILE.exists():
        return f"the extension was not built: {_REASON_FILE.read_text().strip()}"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return f"the extension is not built and there is no C++ compiler; apt install g++ (or your system's), {again}"
    return "the extension is not built; run pip install . (or pip install -e .) in the source folder"


def as_buffer(module: Any, tensor: Tensor) -> Any:
    """Return `tensor` as a Buffer of `module`, one of the extension's halves; the buffer keeps the tensor alive."""
    dtype = DTYPE_NAMES.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")
    return module.Buffer(tensor.data_ptr(), dtype, tensor.shape, tensor.stride(), _device(tensor.device), tensor)


def as_buffer_or_none(module: Any, tensor: Tensor | None) -> Any:
    """Return the same, or None if the tensor is None or empty."""
    return None if tensor is None or tensor.numel() == 0 else as_buffer(module, tensor)


@cache
def _device(device: torch.device) -> str:
    return str(device)
