"""What the Triton kernels and their launchers share: functions on a tile of S, and the operands of a sweep.

Logits are in natural units, and only their differences are converted for exp2, which the hardware has: a large logit
that is multiplied by log2(e) is rounded again, and would no longer match an anchor made of it. What the numbers mean
(d, r, anchors, factors) is explained in `ops/spec.py`.

Names in kernels: b_ a block of values, p_ a pointer, o_ offsets, m_ a mask, i_ an index. M and N are BLOCK_M and
BLOCK_N, the rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.autograd import strip_bytes
from cliperase_fast.ops.blocks import block_shape, full_wave, in_blocks
from cliperase_fast.ops.matmul import as_pair, float32_precision
from cliperase_fast.ops.spec import SimilarityInputs
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.kept import COMPACT, WHOLE, compact_parts, is_compact

# Stands for log 0: finite, so that no difference is NaN, and far below every logit.
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = tl.constexpr(1.4426950408889634)
# What is 60 below a reference is still exact: exp(-60) is 1e-26, and 1e-12 of it is a normal number.
REACH = tl.constexpr(60.0)
# Triton's interpreter multiplies the bits of bfloat16 as integers; in float32 the products are the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

GROUP_ROWS = 8  # row blocks that walk the columns together, see `tile_of_program`
OPTIONS = {"enable_fp_fusion": True}  # explicit, as Triton's default changes in 3.10


@triton.jit
def _add_product(b_sum, p_left, p_right, o_k, width, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """Add the product of the features o_k [K] at p_left [M, K] and p_right [K, N]."""
    if EVEN_K:
        b_left, b_right = tl.load(p_left), tl.load(p_right)  # [M, K], [K, N]
    else:
        m_k = o_k < width  # [K]
        b_left = tl.load(p_left, mask=m_k[None, :], other=0.0)  # [M, K]
        b_right = tl.load(p_right, mask=m_k[:, None], other=0.0)  # [K, N]
    if INTERPRETED:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)  # [M, N]


@triton.jit
def similarity_tile(
    p_left, p_right, o_left, o_right, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return <left_i, right_j> for a tile, accumulated in float32. o_left, o_right: int64 offsets of the rows."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)  # [K]
        p_l = p_left + o_left[:, None] + o_k[None, :]  # [M, K]
        p_r = p_right + o_right[None, :] + o_k[:, None]  # [K, N]
        b_sum = _add_product(b_sum, p_l, p_r, o_k, width, EVEN_K, PRECISION)
    return b_sum


@triton.jit
def both_similarity_tiles(
    p_left, p_right, p_teacher_left, p_teacher_right, o_left, o_right, o_teacher_left, o_teacher_right, width,
    teacher_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_K_TEACHER: tl.constexpr, SAME_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `similarity_tile` of the student's and of the teacher's features, in one loop if they are equally wide."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_teacher_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SAME_WIDTH:
        for i_k in range(0, width, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)  # [K]
            p_l = p_left + o_left[:, None] + o_k[None, :]  # [M, K]
            p_r = p_right + o_right[None, :] + o_k[:, None]  # [K, N]
            p_tl = p_teacher_left + o_teacher_left[:, None] + o_k[None, :]  # [M, K]
            p_tr = p_teacher_right + o_teacher_right[None, :] + o_k[:, None]  # [K, N]
            b_sum = _add_product(b_sum, p_l, p_r, o_k, width, EVEN_K, PRECISION)
            b_teacher_sum = _add_product(b_teacher_sum, p_tl, p_tr, o_k, width, EVEN_K, PRECISION)
    else:
        b_sum = similarity_tile(p_left, p_right, o_left, o_right, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
        b_teacher_sum = similarity_tile(
            p_teacher_left, p_teacher_right, o_teacher_left, o_teacher_right, teacher_width, BLOCK_M, BLOCK_N, BLOCK_K,
            EVEN_K_TEACHER, PRECISION,
        )  # fmt: skip
    return b_sum, b_teacher_sum


@triton.jit
def exp(b_x):
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def tile_of_program(rows, columns, GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which row and column of tiles is this program's, of a block of dS with so many rows and columns.

    Programs of GROUP_ROWS rows of tiles walk the columns together, so that their tiles of text are read from the cache.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    i_program = tl.program_id(0)
    i_group = i_program // (GROUP_ROWS * tiles_n)
    rows_here = tl.minimum(tiles_m - i_group * GROUP_ROWS, GROUP_ROWS)
    i_row = i_group * GROUP_ROWS + (i_program % (GROUP_ROWS * tiles_n)) % rows_here
    return i_row, (i_program % (GROUP_ROWS * tiles_n)) // rows_here


@triton.jit
def store_gradient(p_block, b_gradient, o_row_in_block, o_column_in_block, stride_block, m_tile):
    """Store a tile of dS in the block [rows, stride_block], in the dtype of the block."""
    if p_block.dtype.element_ty != tl.float32:
        b_gradient = b_gradient.to(p_block.dtype.element_ty, fp_downcast_rounding="rtne")  # [M, N]
    o_tile = o_row_in_block.to(tl.int64)[:, None] * stride_block + o_column_in_block[None, :]  # [M, N]
    tl.store(p_block + o_tile, b_gradient, mask=m_tile)


class Operands:
    """The inputs of a sweep as the kernels take them: features with contiguous rows, scales in float32."""

    def __init__(self, inputs: SimilarityInputs) -> None:
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
        self.num_stats = inputs.num_stats

    def strips(self, row_bytes: float, config: Config, strip_rows: int, cached_rows: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of strips of rows; none has both cached rows and others.

        A strip is a whole number of tiles: `strip_rows` rows, or, for 0, those that the memory for strips holds.
        """
        height, _ = block_shape(
            self.n, 1, row_bytes, strip_bytes(), (config.block_m, 1), strip_rows=strip_rows, columns=1
        )
        for rows, _ in in_blocks(self.n, 1, (height, 1), cached_rows):
            yield rows.start, rows.stop

    def gradient_block(self, config: Config, strip_rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the blocks of dS, in whole tiles; columns: see `block_shape`."""
        dtype, width = self.image.dtype, self.image.shape[1]
        return block_shape(
            self.n, self.m, dtype.itemsize, strip_bytes(), (config.block_m, config.block_n),
            full_wave(self.image.device, width), strip_rows, columns,
        )  # fmt: skip

    def scalars(self, shift: Tensor | None) -> Tensor:
        """Return s, s° and `shift`, float32 [3]; 0 where absent."""
        scalars = self.scale.new_zeros(3)
        scalars[0] = self.scale
        if self.teacher_scale is not None and shift is not None:
            scalars[1], scalars[2] = self.teacher_scale, shift
        return scalars

    def features(self) -> tuple[Tensor | None, ...]:
        return self.image, self.text, self.teacher_image, self.teacher_text

    def widths(self) -> tuple[int, int]:
        return self.image.shape[1], 0 if self.teacher_image is None else self.teacher_image.shape[1]

    @property
    def same_width(self) -> bool:
        """Whether student and teacher are equally wide."""
        return len(set(self.widths())) == 1

    def strides(self) -> tuple[int, ...]:
        return tuple(0 if tensor is None else tensor.stride(0) for tensor in self.features())

    def cached_rows(self, cache: Tensor) -> int:
        return self.n if is_compact(cache) else len(cache) // (4 * self.m * (1 + self.teacher))

    def kept_form(self, cache: Tensor, row: int) -> int:
        """Return WRITE_CACHE or READ_CACHE of the kernels for the tiles of this row."""
        return 0 if row >= self.cached_rows(cache) else COMPACT if is_compact(cache) else WHOLE

    def cached_tiles(self, cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the cached rows of S and of S°, float32 [cached rows, m] each; or see `compact_parts`."""
        if len(cache) == 0:
            return None, None
        if is_compact(cache):
            return compact_parts(cache, self.n, self.m, self.teacher)
        parts = cache.view(torch.float32).view(1 + self.teacher, -1, self.m)
        return parts[0], parts[1] if self.teacher else None

    def constants(self, config: Config) -> dict[str, Any]:
        """Return the compile-time arguments that the forward and the backward kernel share."""
        width, teacher_width = self.widths()
        return {
            "PLAIN": int(self.plain), "MASKED": int(self.masked), "TEACHER": int(self.teacher),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "EVEN_K": width % config.block_k == 0, "EVEN_K_TEACHER": teacher_width % config.block_k == 0,
            "PRECISION": float32_precision(), "num_warps": config.warps, "num_stages": config.stages, **OPTIONS,
        }  # fmt: skip
