"""Backend "triton": the loss sweep in fused kernels, on GPUs (and in Triton's interpreter, on CPU).

Forward: strips of rows; a tile of S and S° is formed once and leaves row and column partials, which are merged in a
fixed order, without atomics, so two runs are bitwise equal. Backward: a strip of dS is formed in the dtype of the
features, from which dI = s dS T and, accumulated in float32, dT = s dSᵀ I. No n x m tensor, no host synchronisation.
With keep="similarities" the first rows of S and S° stay in memory, as many as the budget holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep, cache_budget, strip_bytes
from cliperase_fast.ops.matmul import add_product, as_pair, float32_precision, product
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    Need,
    SavedStats,
    SimilarityInputs,
    Stats,
    Weights,
    losses_from_stats,
    unit_terms,
)
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.configs import INTERPRETER, Config, Configs, configs_for
from cliperase_fast.ops.triton.kernels import backward_kernel, forward_kernel, merge_kernel, pair_dot_kernel

_PROGRAMS = 1024  # a forward launch has about this many where it can: some for each multiprocessor
_GROUP_ROWS = 8
_TUNING_PAIRS = 16384
_MERGE_BLOCK = 256
_OPTIONS = {"enable_fp_fusion": True}  # said, as Triton's default changes in 3.10
_KEPT_ROWS = 256  # kept rows come in multiples of this, which every block of rows divides


class TritonKernels:
    """See `ops.spec.SweepKernels`; not float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied.
    """

    name = "triton"

    def __init__(self, configs: Configs | None = None) -> None:
        """configs: None for those of the GPU, dtype and width at hand."""
        self.configs = configs

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """float32 S, and S° where there is a teacher, of the first rows; "auto" keeps nothing."""
        if inputs.keep != "similarities":
            return 0
        row_bytes = 4 * inputs.m * (1 + inputs.want_consistency)
        rows = cache_budget(inputs.image.device) // row_bytes
        return row_bytes * (inputs.n if rows >= inputs.n else rows // _KEPT_ROWS * _KEPT_ROWS)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = Operands(inputs, self.configs)
            cache = torch.empty(cache_size, dtype=torch.uint8, device=inputs.image.device)
            diagonal = teacher_diagonal = shift = None
            own = slice(inputs.pair_offset, inputs.pair_offset + inputs.n)
            if inputs.paired:
                diagonal = _pair_dot(operands.image, operands.text[own], operands.scale)
            if (
                operands.teacher_image is not None
                and operands.teacher_text is not None
                and operands.teacher_scale is not None
            ):
                # any constant would do; an entry keeps the gaps small, so exact, where S° - S hardly varies
                if diagonal is not None:
                    teacher_diagonal = _pair_dot(
                        operands.teacher_image, operands.teacher_text[own], operands.teacher_scale
                    )
                    shift = teacher_diagonal[0] - diagonal[0]
                else:
                    entry = _pair_dot(operands.image[:1], operands.text[:1], operands.scale)
                    shift = (
                        _pair_dot(operands.teacher_image[:1], operands.teacher_text[:1], operands.teacher_scale) - entry
                    )
                    shift = shift.reshape(())
            rows, columns = _off_diagonal_sums(operands, operands.scalars(shift), inputs.strip_rows, cache)
            return Stats(rows, columns, diagonal, teacher_diagonal, shift), cache

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands, n, m = Operands(inputs, self.configs), inputs.n, inputs.m
            image, text = inputs.image, inputs.text
            config = operands.configs.backward_groups if operands.masked else operands.configs.backward
            softmaxes, diagonal, unit = unit_terms(
                inputs, saved, Weights(weights.retention.float(), weights.consistency.float()),
                loss_scale=2.0**13 if operands.image.dtype == torch.float16 else 1.0,
            )  # fmt: skip
            scalars = operands.scalars(unit)  # the shift is not used here
            image_dtype, text_dtype, scale_dtype = image.dtype, text.dtype, inputs.scale.dtype
            if partial:
                image_dtype = text_dtype = scale_dtype = torch.float32
            grad_image = image.new_empty(image.shape if need.image else (0,), dtype=image_dtype)
            grad_text = diagonal.new_zeros(text.shape if need.text else (0,))
            grad_scale = diagonal.new_zeros(())
            strip = None
            kept_rows = operands.kept_rows(saved.cache)
            for start, stop in operands.strips(m * operands.image.itemsize, config, inputs.strip_rows, kept_rows):
                if strip is None or len(strip) < stop - start:
                    strip = operands.image.new_empty(stop - start, m)
                rows = strip[: stop - start]
                backward_kernel[(triton.cdiv(stop - start, config.block_m) * triton.cdiv(m, config.block_n),)](
                    operands.image, operands.text, operands.teacher_image, operands.teacher_text, *operands.groups,
                    scalars, softmaxes, diagonal, rows, *operands.kept(saved.cache),
                    start, stop, n, m, operands.pair_offset, *operands.widths(), *operands.strides(),
                    GROUP_ROWS=_GROUP_ROWS, KEPT=start < kept_rows, **operands.form(config),
                )  # fmt: skip
                image_rows = operands.image[start:stop]
                if need.image or need.scale:
                    towards_text = product(rows, operands.text)  # [h, D]
                    if need.scale:  # before the factor s, which may be 0
                        grad_scale += (towards_text * image_rows).sum()
                    if need.image:
                        grad_image[start:stop] = towards_text.mul_(unit * operands.scale)
                if need.text:
                    add_product(grad_text, rows.T, image_rows)
            grad_text = grad_text.mul_(unit * operands.scale).to(text_dtype)
            return grad_image, grad_text, (grad_scale * unit).to(scale_dtype)


class Operands:
    """The inputs as the kernels take them, and which of the forms of the kernels they need."""

    def __init__(self, inputs: SimilarityInputs, configs: Configs | None) -> None:
        self.n, self.m, self.pair_offset = inputs.n, inputs.m, inputs.pair_offset
        self.image, self.text = as_pair(inputs.image, inputs.text)
        self.scale = inputs.scale.float()
        self.teacher_image = self.teacher_text = self.teacher_scale = None
        if inputs.teacher is not None:
            image, text, scale = inputs.teacher
            self.teacher_image, self.teacher_text = as_pair(image, text)
            self.teacher_scale = scale.float()
        groups = (inputs.group_ids, inputs.column_groups)
        self.groups = tuple(None if ids is None else ids.contiguous() for ids in groups)
        self.plain, self.masked, self.teacher = inputs.plain, inputs.masked, inputs.want_consistency
        self.students = self.plain + self.masked
        self.num_stats = inputs.num_stats
        self.configs = configs or self._configs()

    def _configs(self) -> Configs:
        device = self.image.device
        if device.type != "cuda":
            return INTERPRETER
        dtype, width = self.image.dtype, self.image.shape[1]
        if self.teacher_image is not None:
            dtype, width = torch.promote_types(dtype, self.teacher_image.dtype), max(width, self.teacher_image.shape[1])
        shipped = configs_for(torch.cuda.get_device_capability(device)[0], dtype, width)
        timer = partial(_milliseconds, device, dtype, width, min(self.m, _TUNING_PAIRS))
        return autotune.configs(device, dtype, width, shipped, timer)

    def strips(self, bytes_a_row: float, config: Config, strip_rows: int, kept_rows: int) -> Iterator[tuple[int, int]]:
        """Whole blocks of rows, `strip_rows` of them or what the memory for strips holds; kept rows apart."""
        rows = strip_rows or int(strip_bytes() / bytes_a_row)
        height = min(max(1, rows // config.block_m), triton.cdiv(self.n, config.block_m)) * config.block_m
        for first, last in ((0, kept_rows), (kept_rows, self.n)):
            for start in range(first, last, height):
                yield start, min(start + height, last)

    def scalars(self, shift: Tensor | None) -> Tensor:
        scalars = self.scale.new_zeros(3)
        scalars[0] = self.scale
        if self.teacher_scale is not None and shift is not None:
            scalars[1], scalars[2] = self.teacher_scale, shift
        return scalars

    def widths(self) -> tuple[int, int]:
        return self.image.shape[1], 0 if self.teacher_image is None else self.teacher_image.shape[1]

    def strides(self) -> tuple[int, ...]:
        tensors = (self.image, self.text, self.teacher_image, self.teacher_text)
        return tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors)

    def kept_rows(self, kept: Tensor) -> int:
        return len(kept) // (4 * self.m * (1 + self.teacher))

    def kept(self, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The kept rows of S and of S°, [kept rows, m] each."""
        if len(kept) == 0:
            return None, None
        parts = kept.view(torch.float32).view(1 + self.teacher, -1, self.m)
        return parts[0], parts[1] if self.teacher else None

    def form(self, config: Config) -> dict[str, Any]:
        """The compile-time arguments that the two large kernels share."""
        width, teacher_width = self.widths()
        return {
            "PLAIN": int(self.plain), "MASKED": int(self.masked), "TEACHER": int(self.teacher),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "EVEN_K": width % config.block_k == 0, "EVEN_K_TEACHER": teacher_width % config.block_k == 0,
            "PRECISION": float32_precision(), "num_warps": config.warps, "num_stages": config.stages, **_OPTIONS,
        }  # fmt: skip


def _pair_dot(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """scale <left_i, right_i>, [N] float32."""
    n, width = left.shape
    out = scale.new_empty(n)
    block_m, block_k = 16, min(256, triton.next_power_of_2(width))
    pair_dot_kernel[(triton.cdiv(n, block_m),)](
        left, right, out, n, width, left.stride(0), right.stride(0), BLOCK_M=block_m, BLOCK_K=block_k, **_OPTIONS
    )
    return out.mul_(scale)


def _off_diagonal_sums(operands: Operands, scalars: Tensor, strip_rows: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward_kernel` leaves, merged: [planes, n] of rows, [planes, m] of columns."""
    n, m, planes, config = operands.n, operands.m, operands.num_stats, operands.configs.forward
    rows, columns = scalars.new_empty(planes, n), scalars.new_empty(planes, m)
    tiles = triton.cdiv(m, config.block_n)
    kept_rows = operands.kept_rows(kept)
    for start, stop in operands.strips(4 * planes * m / config.block_m, config, strip_rows, kept_rows):
        blocks = triton.cdiv(stop - start, config.block_m)
        tiles_per_chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
        chunks = triton.cdiv(tiles, tiles_per_chunk)
        of_rows = scalars.new_empty(chunks, planes, stop - start)
        of_columns = scalars.new_empty(blocks, planes, m)
        forward_kernel[(blocks, chunks)](
            operands.image, operands.text, operands.teacher_image, operands.teacher_text, *operands.groups,
            scalars, of_rows, of_columns, *operands.kept(kept),
            start, stop, n, m, operands.pair_offset, *operands.widths(), tiles_per_chunk, *operands.strides(),
            PLANES=planes, KEEP=start < kept_rows, **operands.form(config),
        )  # fmt: skip
        _merge_into(rows, of_rows, start, operands, fresh=True)
        _merge_into(columns, of_columns, 0, operands, fresh=start == 0)
    return rows, columns


def _merge_into(merged: Tensor, partial: Tensor, first: int, operands: Operands, fresh: bool) -> None:
    """partial [parts, planes, positions] into merged [planes, n or m], from position `first` on."""
    parts, planes, positions = partial.shape
    merge_kernel[(triton.cdiv(positions, _MERGE_BLOCK),)](
        partial, merged, merged.shape[1], first, positions, parts,
        FRESH=fresh, STUDENTS=operands.students, TEACHER=int(operands.teacher), PLANES=planes, BLOCK=_MERGE_BLOCK,
        **_OPTIONS,
    )  # fmt: skip


def _milliseconds(device: torch.device, dtype: torch.dtype, width: int, n: int, configs: Configs, way: str) -> float:
    """Median time of one way of a sweep over random features, with a teacher as wide as the student."""
    generator = torch.Generator(device).manual_seed(0)
    features = (torch.randn(n, width, generator=generator, dtype=torch.float32, device=device) for _ in range(4))
    image, text, teacher_image, teacher_text = (
        torch.nn.functional.normalize(each, dim=1).to(dtype) for each in features
    )
    scale = torch.full((), 50.0, dtype=torch.float32, device=device)
    group_ids = torch.arange(n, dtype=torch.int64, device=device) // 2 if way == "backward_groups" else None
    inputs = SimilarityInputs(image, text, scale, teacher_image, teacher_text, scale, group_ids)
    tuned = TritonKernels(configs)
    if way == "forward":
        return triton.testing.do_bench(lambda: tuned.forward(inputs, 0), return_mode="median")
    weight = torch.full((), 1 / n, dtype=torch.float32, device=device)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    saved = SavedStats(torch.zeros(NUM_SAVED, 2 * n, dtype=torch.float32, device=device), n, nothing)
    return triton.testing.do_bench(
        lambda: tuned.backward(inputs, saved, Weights(weight, weight), Need()), return_mode="median"
    )


kernels = TritonKernels()
sweep = as_sweep(kernels)
