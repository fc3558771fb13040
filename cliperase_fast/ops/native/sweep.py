"""The sweep of the backend "native": which half serves a batch is decided by its device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cliperase_fast.ops.autograd import SweepKernels, as_sweep
from cliperase_fast.ops.native.cpu import CpuKernels
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.spec import SimilarityInputs, Stats

_HALVES: dict[str, SweepKernels] = {"cpu": CpuKernels(), "cuda": CudaKernels()}


class _NativeEngine:
    """See `ops.autograd.SweepKernels`."""

    name = "native"

    def check(self, problem: SimilarityInputs) -> None:
        _HALVES[problem.image.device.type].check(problem)

    def cache_size(self, problem: SimilarityInputs, keep: str) -> int:
        return _HALVES[problem.image.device.type].cache_size(problem, keep)

    def forward(self, problem: SimilarityInputs, strip_rows: int, cache_size: int) -> tuple[Stats, Tensor]:
        return _HALVES[problem.image.device.type].forward(problem, strip_rows, cache_size)

    def losses(
        self, problem: SimilarityInputs, strip_rows: int, cache_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _HALVES[problem.image.device.type].losses(problem, strip_rows, cache_size)

    def backward(self, problem: SimilarityInputs, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _HALVES[problem.image.device.type].backward(problem, *arguments, **options)


engine = _NativeEngine()
sweep = as_sweep(engine)
