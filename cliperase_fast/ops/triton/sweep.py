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

from cliperase_fast.errors import InputError
from cliperase_fast.ops import softmax_stats
from cliperase_fast.ops.autograd import as_sweep, cache_budget, strip_bytes
from cliperase_fast.ops.matmul import add_product, as_pair, float32_precision, product
from cliperase_fast.ops.spec import SavedStats, SimilarityInputs, Stats
from cliperase_fast.ops.triton import autotune
from cliperase_fast.ops.triton.configs import INTERPRETER, Config, Configs, configs_for
from cliperase_fast.ops.triton.kernels import backward_kernel, forward_kernel, merge_kernel, pair_dot_kernel

_PROGRAMS = 1024  # a forward launch has about this many where it can: some for each multiprocessor
_GROUP_ROWS = 8
_TUNING_PAIRS = 16384
_MERGE_BLOCK = 256
_OPTIONS = {"enable_fp_fusion": True}  # said, as Triton's default changes in 3.10
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT_ROWS = 256  # kept rows come in multiples of this, which every block of rows divides


class _TritonEngine:
    """See `ops.autograd.SweepKernels`; not float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied.
    """

    name = "triton"

    def __init__(self, configs: Configs | None = None) -> None:
        """configs: None for those of the GPU, dtype and width at hand."""
        self.configs = configs

    def check(self, problem: SimilarityInputs) -> None:
        for features in (problem.image, problem.text, problem.teacher_image, problem.teacher_text):
            if features is not None and features.dtype not in _DTYPES:
                raise InputError(f"backend 'triton' does not take {features.dtype}; use backend='torch'")

    def cache_size(self, problem: SimilarityInputs, keep: str) -> int:
        """float32 S, and S° where there is a teacher, of the first rows; "auto" keeps nothing."""
        if keep != "similarities":
            return 0
        row_bytes = 4 * problem.m * (1 + problem.want_consistency)
        rows = cache_budget(problem.image.device) // row_bytes
        return row_bytes * (problem.n if rows >= problem.n else rows // _KEPT_ROWS * _KEPT_ROWS)

    def forward(self, problem: SimilarityInputs, strip_rows: int, cache_size: int) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(problem.image):
            inputs = Inputs(problem, self.configs)
            kept = torch.empty(cache_size, dtype=torch.uint8, device=problem.image.device)
            diagonal = teacher_diagonal = shift = None
            own = slice(problem.offset, problem.offset + problem.n)
            if problem.paired:
                diagonal = _pair_dot(inputs.image, inputs.text[own], inputs.scale)
            if (
                inputs.teacher_image is not None
                and inputs.teacher_text is not None
                and inputs.teacher_scale is not None
            ):
                # any constant would do; an entry keeps the gaps small, so exact, where S° - S hardly varies
                if diagonal is not None:
                    teacher_diagonal = _pair_dot(inputs.teacher_image, inputs.teacher_text[own], inputs.teacher_scale)
                    shift = teacher_diagonal[0] - diagonal[0]
                else:
                    entry = _pair_dot(inputs.image[:1], inputs.text[:1], inputs.scale)
                    shift = _pair_dot(inputs.teacher_image[:1], inputs.teacher_text[:1], inputs.teacher_scale) - entry
                    shift = shift.reshape(())
            rows, columns = _off_diagonal_sums(inputs, inputs.scalars(shift), strip_rows, kept)
            return Stats(rows, columns, diagonal, teacher_diagonal, shift), kept

    losses = softmax_stats.losses_of_sums

    def backward(
        self,
        problem: SimilarityInputs,
        state: SavedStats,
        weight_retention: Tensor,
        weight_consistency: Tensor,
        strip_rows: int,
        kept: Tensor,
        need_image: bool,
        need_text: bool,
        need_scale: bool,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(problem.image):
            inputs, n, m = Inputs(problem, self.configs), problem.n, problem.m
            image, text = problem.image, problem.text
            config = inputs.configs.backward_groups if inputs.masked else inputs.configs.backward
            softmaxes, diagonal, unit = softmax_stats.unit_terms(
                problem, state, weight_retention.float(), weight_consistency.float(),
                lift=2.0**13 if inputs.image.dtype == torch.float16 else 1.0,
            )  # fmt: skip
            scalars = inputs.scalars(unit)  # the shift is not used here
            image_dtype, text_dtype, scale_dtype = image.dtype, text.dtype, problem.scale.dtype
            if partial:
                image_dtype = text_dtype = scale_dtype = torch.float32
            grad_image = image.new_empty(image.shape if need_image else (0,), dtype=image_dtype)
            grad_text = diagonal.new_zeros(text.shape if need_text else (0,))
            grad_scale = diagonal.new_zeros(())
            strip = None
            kept_rows = inputs.kept_rows(kept)
            for start, stop in inputs.strips(m * inputs.image.itemsize, config, strip_rows, kept_rows):
                if strip is None or len(strip) < stop - start:
                    strip = inputs.image.new_empty(stop - start, m)
                rows = strip[: stop - start]
                backward_kernel[(triton.cdiv(stop - start, config.block_m) * triton.cdiv(m, config.block_n),)](
                    inputs.image, inputs.text, inputs.teacher_image, inputs.teacher_text, *inputs.groups,
                    scalars, softmaxes, diagonal, rows, *inputs.kept(kept),
                    start, stop, n, m, inputs.offset, *inputs.widths(), *inputs.strides(),
                    GROUP_ROWS=_GROUP_ROWS, KEPT=start < kept_rows, **inputs.form(config),
                )  # fmt: skip
                image_rows = inputs.image[start:stop]
                if need_image or need_scale:
                    towards_text = product(rows, inputs.text)  # [h, D]
                    if need_scale:  # before the factor s, which may be 0
                        grad_scale += (towards_text * image_rows).sum()
                    if need_image:
                        grad_image[start:stop] = towards_text.mul_(unit * inputs.scale)
                if need_text:
                    add_product(grad_text, rows.T, image_rows)
            grad_text = grad_text.mul_(unit * inputs.scale).to(text_dtype)
            return grad_image, grad_text, (grad_scale * unit).to(scale_dtype)


class Inputs:
    """The inputs as the kernels take them, and which of the forms of the kernels they need."""

    def __init__(self, problem: SimilarityInputs, configs: Configs | None) -> None:
        self.n, self.m, self.offset = problem.n, problem.m, problem.offset
        self.image, self.text = as_pair(problem.image, problem.text)
        self.scale = problem.scale.float()
        self.teacher_image = self.teacher_text = self.teacher_scale = None
        if problem.want_consistency:
            assert problem.teacher_image is not None and problem.teacher_text is not None
            assert problem.teacher_scale is not None
            self.teacher_image, self.teacher_text = as_pair(problem.teacher_image, problem.teacher_text)
            self.teacher_scale = problem.teacher_scale.float()
        row_groups, column_groups = problem.row_groups, problem.column_groups
        self.groups = tuple(None if ids is None else ids.contiguous() for ids in (row_groups, column_groups))
        self.plain, self.masked, self.teacher = problem.plain, problem.masked, problem.want_consistency
        self.students = self.plain + self.masked
        self.planes = problem.planes
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


def _off_diagonal_sums(inputs: Inputs, scalars: Tensor, strip_rows: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward_kernel` leaves, merged: [planes, n] of rows, [planes, m] of columns."""
    n, m, planes, config = inputs.n, inputs.m, inputs.planes, inputs.configs.forward
    rows, columns = scalars.new_empty(planes, n), scalars.new_empty(planes, m)
    tiles = triton.cdiv(m, config.block_n)
    kept_rows = inputs.kept_rows(kept)
    for start, stop in inputs.strips(4 * planes * m / config.block_m, config, strip_rows, kept_rows):
        blocks = triton.cdiv(stop - start, config.block_m)
        tiles_per_chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
        chunks = triton.cdiv(tiles, tiles_per_chunk)
        of_rows = scalars.new_empty(chunks, planes, stop - start)
        of_columns = scalars.new_empty(blocks, planes, m)
        forward_kernel[(blocks, chunks)](
            inputs.image, inputs.text, inputs.teacher_image, inputs.teacher_text, *inputs.groups,
            scalars, of_rows, of_columns, *inputs.kept(kept),
            start, stop, n, m, inputs.offset, *inputs.widths(), tiles_per_chunk, *inputs.strides(),
            PLANES=planes, KEEP=start < kept_rows, **inputs.form(config),
        )  # fmt: skip
        _merge_into(rows, of_rows, start, inputs, fresh=True)
        _merge_into(columns, of_columns, 0, inputs, fresh=start == 0)
    return rows, columns


def _merge_into(merged: Tensor, partial: Tensor, first: int, inputs: Inputs, fresh: bool) -> None:
    """partial [parts, planes, positions] into merged [planes, n or m], from position `first` on."""
    parts, planes, positions = partial.shape
    merge_kernel[(triton.cdiv(positions, _MERGE_BLOCK),)](
        partial, merged, merged.shape[1], first, positions, parts,
        FRESH=fresh, STUDENTS=inputs.students, TEACHER=int(inputs.teacher), PLANES=planes, BLOCK=_MERGE_BLOCK,
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
    problem = SimilarityInputs(image, text, scale, teacher_image, teacher_text, scale, group_ids, True, True)
    tuned = _TritonEngine(configs)
    if way == "forward":
        return triton.testing.do_bench(lambda: tuned.forward(problem, 0, 0), return_mode="median")
    weight = torch.full((), 1 / n, dtype=torch.float32, device=device)
    state = SavedStats(torch.zeros(softmax_stats.PLANES, 2 * n, dtype=torch.float32, device=device), n)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    return triton.testing.do_bench(
        lambda: tuned.backward(problem, state, weight, weight, 0, nothing, True, True, True), return_mode="median"
    )


engine = _TritonEngine()
sweep = as_sweep(engine)
