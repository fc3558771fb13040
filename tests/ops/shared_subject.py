"""The Triton kernels with one exponential for an entry's row and column, in small blocks for the interpreter."""

from __future__ import annotations

from dataclasses import replace

from kernel_checks import Subject

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.triton import forward
from cliperase_fast.ops.triton.configs import INTERPRETER, Configs
from cliperase_fast.ops.triton.sweep import TritonKernels

_NAME = "triton_shared"
_CONFIGS = Configs(*(replace(INTERPRETER.forward, shared=True) for _ in range(4)))

SUBJECT = Subject(
    as_sweep(TritonKernels(_CONFIGS, _NAME, block_columns=64)),
    _NAME,
    TritonKernels,
    few_programs=lambda monkeypatch: monkeypatch.setattr(forward, "_PROGRAMS", 6),
)
