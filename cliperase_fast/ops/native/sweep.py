"""The sweep of the backend "native": which half serves a batch is decided by its device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cliperase_fast.ops.engine import Engine, as_sweep
from cliperase_fast.ops.native.cpu import CpuEngine
from cliperase_fast.ops.native.cuda import CudaEngine
from cliperase_fast.ops.problem import Problem, Sums

_HALVES: dict[str, Engine] = {"cpu": CpuEngine(), "cuda": CudaEngine()}


class _NativeEngine:
    """See `ops.engine.Engine`."""

    name = "native"

    def check(self, problem: Problem) -> None:
        _HALVES[problem.image.device.type].check(problem)

    def kept_bytes(self, problem: Problem, keep: str) -> int:
        return _HALVES[problem.image.device.type].kept_bytes(problem, keep)

    def forward(self, problem: Problem, strip_rows: int, kept_bytes: int) -> tuple[Sums, Tensor]:
        return _HALVES[problem.image.device.type].forward(problem, strip_rows, kept_bytes)

    def losses(self, problem: Problem, strip_rows: int, kept_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _HALVES[problem.image.device.type].losses(problem, strip_rows, kept_bytes)

    def backward(self, problem: Problem, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _HALVES[problem.image.device.type].backward(problem, *arguments, **options)


engine = _NativeEngine()
sweep = as_sweep(engine)
