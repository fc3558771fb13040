"""The sweep of the backend "native": the device of a batch decides which half computes it."""

from __future__ import annotations

from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.native.cpu import CpuKernels
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.spec import Need, SavedStats, SimilarityInputs, Stats, SweepKernels, Weights

_HALVES: dict[str, SweepKernels] = {"cpu": CpuKernels(), "cuda": CudaKernels()}


class NativeKernels:
    """See `ops.spec.SweepKernels`."""

    name = "native"

    def cache_size(self, inputs: SimilarityInputs) -> int:
        return _HALVES[inputs.image.device.type].cache_size(inputs)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        return _HALVES[inputs.image.device.type].forward(inputs, cache_size)

    def losses(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _HALVES[inputs.image.device.type].losses(inputs, cache_size)

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _HALVES[inputs.image.device.type].backward(inputs, saved, weights, need, partial)


kernels = NativeKernels()
sweep = as_sweep(kernels)
