"""Backend "triton": the loss sweep in fused kernels, on GPUs (and in Triton's interpreter, on the CPU).

The forward pass processes one strip of rows at a time, the backward pass one block of dS (`forward.py`, `backward.py`).
No n x m tensor, no host synchronisation. Similarities that are kept (`blocks.kept_bytes`) stay in memory in between.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep, cache_budget
from cliperase_fast.ops.blocks import kept_bytes, kept_share
from cliperase_fast.ops.calibrated import Edit, Pull
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.calibrated_sweep import gradients_by_blocks, losses_by_blocks
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    GradientTerms,
    Need,
    SavedStats,
    SimilarityInputs,
    Stats,
    Weights,
    losses_from_stats,
)
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.backward import gradients
from cliperase_fast.ops.triton.calibrated import Comparison, calibrated_gradients, edited_diagonal
from cliperase_fast.ops.triton.configs import INTERPRETER, Configs, configs_for
from cliperase_fast.ops.triton.forward import forward_stats
from cliperase_fast.ops.triton.kept import compact_bytes, is_compact, new_cache
from cliperase_fast.ops.triton.tiles import Operands

TUNING_PAIRS = 16384


class TritonKernels:
    """Implements `ops.spec.SweepKernels` and `ops.calibrated.CalibratedKernels`; not for float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied.
    """

    def __init__(self, configs: Configs | None = None, name: str = "triton", block_columns: int = 0) -> None:
        """Use `configs`; None: those for the GPU, dtype and width at hand. block_columns: see `backward.gradients`."""
        self.configs, self.name, self.block_columns = configs, name, block_columns

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """Return the bytes of S, and S° with a teacher: of all rows in 16 bits, or as `blocks.kept_bytes` says."""
        compact = compact_bytes(inputs) if inputs.keep == "compact" else 0
        return compact if 0 < compact <= cache_budget(inputs.image.device) else self.blocks_cache_size(inputs)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs)
            configs = self.configs or choose_configs(operands)
            cache = new_cache(cache_size, inputs.n, inputs.m, inputs.image.device)
            config = configs.forward_groups if operands.masked or cache_size else configs.forward
            if is_compact(cache):
                config = configs.compact(operands.masked)
            return forward_stats(operands, config, inputs.strip_rows, cache), cache

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs)
            configs = self.configs or choose_configs(operands)
            config = configs.backward_groups if operands.masked else configs.backward
            if is_compact(saved.cache):
                config = configs.compact(operands.masked)
            return gradients(inputs, operands, config, saved, weights, need, partial, self.block_columns)

    def blocks_cache_size(self, inputs: SimilarityInputs) -> int:
        return kept_bytes(inputs, _kept_row_bytes(inputs))

    def cache_share(self, inputs: SimilarityInputs, available: int) -> int:
        return kept_share(inputs.n, _kept_row_bytes(inputs), available)

    def workspace(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    calibrated_losses, calibrated_gradients = losses_by_blocks, gradients_by_blocks

    def calibrated_forward(self, inputs: SimilarityInputs, edit: Edit | None, cache: Tensor) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands, comparison = Operands(inputs), Comparison(edit, inputs.scale.float())
            config = (self.configs or shipped_configs(operands)).calibrated_forward(_widest(operands)[0])
            stats = forward_stats(operands, config, inputs.strip_rows, cache, comparison)
            diagonal = edited_diagonal(inputs, edit, stats.teacher_diagonal)
            return stats._replace(teacher_diagonal=diagonal), comparison.sums

    def calibrated_backward(
        self, inputs: SimilarityInputs, edit: Edit | None, terms: GradientTerms, pull: Pull, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs)
            config = (self.configs or shipped_configs(operands)).backward
            return calibrated_gradients(inputs, operands, config, edit, terms, pull, cache, need, self.block_columns)


def _kept_row_bytes(inputs: SimilarityInputs) -> int:
    """Return the bytes of a row of S, and of S° with a teacher, in float32."""
    return 4 * inputs.m * (1 + inputs.want_consistency)


def choose_configs(operands: Operands) -> Configs:
    """Return the launch configurations of the sweep: those saved for this GPU, found on request, or shipped."""
    device = operands.image.device
    if device.type != "cuda":
        return INTERPRETER
    dtype, width = _widest(operands)
    timer = partial(kernel_milliseconds, device, dtype, width, min(operands.m, TUNING_PAIRS))
    return autotune.configs(device, dtype, width, shipped_configs(operands), timer)


def shipped_configs(operands: Operands) -> Configs:
    """Return the shipped configurations for the device, the widest dtype and the largest width of `operands`."""
    device = operands.image.device
    if device.type != "cuda":
        return INTERPRETER
    return configs_for(torch.cuda.get_device_capability(device)[0], *_widest(operands))


def _widest(operands: Operands) -> tuple[torch.dtype, int]:
    dtype = operands.image.dtype
    if operands.teacher_image is not None:
        dtype = torch.promote_types(dtype, operands.teacher_image.dtype)
    return dtype, max(operands.widths())


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
calibrated = as_calibrated(kernels)
