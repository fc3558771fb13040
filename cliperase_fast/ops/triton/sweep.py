"""Backend "triton": the loss sweep in fused kernels, on GPUs (and in Triton's interpreter, on the CPU).

The forward pass processes one strip of rows at a time, the backward pass one block of dS (`forward.py`, `backward.py`).
No n x m tensor, no host synchronisation. Similarities that are kept (`blocks.kept_bytes`) stay in memory in between.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.blocks import kept_bytes
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    Need,
    SavedStats,
    SimilarityInputs,
    Stats,
    Weights,
    losses_from_stats,
)
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.backward import gradients
from cliperase_fast.ops.triton.configs import INTERPRETER, Configs, configs_for
from cliperase_fast.ops.triton.forward import forward_stats
from cliperase_fast.ops.triton.tiles import Operands

TUNING_PAIRS = 16384


class TritonKernels:
    """Implements `ops.spec.SweepKernels`; not for float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied.
    """

    def __init__(self, configs: Configs | None = None, name: str = "triton", block_columns: int = 0) -> None:
        """Use `configs`; None: those for the GPU, dtype and width at hand. block_columns: see `backward.gradients`."""
        self.configs, self.name, self.block_columns = configs, name, block_columns

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """Return the bytes of float32 S, and S° with a teacher, of the first rows; see `blocks.kept_bytes`."""
        return kept_bytes(inputs, 4 * inputs.m * (1 + inputs.want_consistency))

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs)
            configs = self.configs or choose_configs(operands)
            cache = torch.empty(cache_size, dtype=torch.uint8, device=inputs.image.device)
            config = configs.forward_groups if operands.masked or cache_size else configs.forward
            return forward_stats(operands, config, inputs.strip_rows, cache), cache

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs)
            configs = self.configs or choose_configs(operands)
            config = configs.backward_groups if operands.masked else configs.backward
            return gradients(inputs, operands, config, saved, weights, need, partial, self.block_columns)


def choose_configs(operands: Operands) -> Configs:
    """Return the launch configurations for the device, the widest dtype and the largest width of `operands`."""
    device = operands.image.device
    if device.type != "cuda":
        return INTERPRETER
    dtype, width = operands.image.dtype, max(operands.widths())
    if operands.teacher_image is not None:
        dtype = torch.promote_types(dtype, operands.teacher_image.dtype)
    shipped = configs_for(torch.cuda.get_device_capability(device)[0], dtype, width)
    timer = partial(kernel_milliseconds, device, dtype, width, min(operands.m, TUNING_PAIRS))
    return autotune.configs(device, dtype, width, shipped, timer)


def kernel_milliseconds(
    device: torch.device, dtype: torch.dtype, width: int, n: int, configs: Configs, way: str
) -> float:
    """Return the median time of one pass over random features, with a teacher as wide as the student."""
    generator = torch.Generator(device).manual_seed(0)
    features = (torch.randn(n, width, generator=generator, dtype=torch.float32, device=device) for _ in range(4))
    image, text, teacher_image, teacher_text = (
        torch.nn.functional.normalize(each, dim=1).to(dtype) for each in features
    )
    scale = torch.full((), 50.0, dtype=torch.float32, device=device)
    group_ids = torch.arange(n, dtype=torch.int64, device=device) // 2 if way.endswith("_groups") else None
    inputs = SimilarityInputs(image, text, scale, teacher_image, teacher_text, scale, group_ids)
    kernels = TritonKernels(configs)
    if way.startswith("forward"):
        return triton.testing.do_bench(lambda: kernels.forward(inputs, 0), return_mode="median")
    weight = torch.full((), 1 / n, dtype=torch.float32, device=device)
    cache = torch.empty(0, dtype=torch.uint8, device=device)
    saved = SavedStats(torch.zeros(NUM_SAVED, 2 * n, dtype=torch.float32, device=device), n, cache)
    return triton.testing.do_bench(
        lambda: kernels.backward(inputs, saved, Weights(weight, weight), Need()), return_mode="median"
    )


kernels = TritonKernels()
sweep = as_sweep(kernels)
