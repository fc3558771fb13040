"""The kernels of the calibrated loss: a block of S and S°, whose entries of S° are edited where ids are equal.

They find the statistics and form dS as `softmax_tiles.py` does. Beside these they compare the cosines: C - C* is formed
from the products, before the scales, so that it is exactly 0 for a student that equals its teacher. The similarities
that are kept are cosines too, those of the teacher before the edit. See `ops/calibrated.py` and
`ops/calibrated_sweep.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.blocks import FeatureGradients, in_blocks
from cliperase_fast.ops.calibrated import Edit, Pull, calibrated_terms
from cliperase_fast.ops.spec import GradientTerms, Need, SimilarityInputs
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.softmax_tiles import add_stats, softmax_gradient, store_rows
from cliperase_fast.ops.triton.tiles import (
    GROUP_ROWS,
    LOWEST,
    Operands,
    similarity_tile,
    store_gradient,
    tile_of_program,
)


@triton.jit
def _edited(p_row_ids, p_column_ids, o_safe_row, o_safe_column):
    """Return which entries of a tile are edited, [M, N]."""
    b_row_ids, b_column_ids = tl.load(p_row_ids + o_safe_row), tl.load(p_column_ids + o_safe_column)
    return b_row_ids[:, None] == b_column_ids[None, :]


@triton.jit
def _edit(b_t, m_edit, p_row_levels, p_column_levels, o_safe_row, o_safe_column):
    """Return C* from C° [M, N]."""
    b_row, b_column = tl.load(p_row_levels + o_safe_row), tl.load(p_column_levels + o_safe_column)
    return tl.where(m_edit, b_row[:, None] + b_column[None, :], b_t)


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "pair_offset", "tiles_per_chunk"])
def calibrated_forward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_row_stats,
    p_column_stats, p_cache, p_teacher_cache, strip_start, strip_stop, n, m, pair_offset, width, teacher_width,
    tiles_per_chunk, stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    p_row_ids, p_column_ids, p_row_levels, p_column_levels, p_sums,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr, EDIT: tl.constexpr,
    WRITE_CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do what `forward_kernel` does for S and the edited S°, and sum squares of C - C* but those of pairs.

    EDIT: entries of equal ids, int64, become the sum of their levels, float32. p_sums: [2, programs], of relu(C - C*)²
    over edited entries and of (C - C*)² over the others. WRITE_CACHE: C and C° are stored.
    """
    i_block, i_chunk = tl.program_id(0), tl.program_id(1)
    o_row = strip_start + i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    m_row = o_row < strip_stop  # [M]
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    b_zero = tl.zeros([BLOCK_M], tl.float32)  # [M]
    b_max, b_masked_max, b_teacher_max = b_zero + LOWEST, b_zero + LOWEST, b_zero + LOWEST
    b_sum, b_masked_sum, b_teacher_sum, b_gap = b_zero, b_zero, b_zero, b_zero
    b_forget, b_anchor = b_zero, b_zero  # sums of squares
    first = i_chunk * tiles_per_chunk * BLOCK_N
    last = tl.minimum(first + tiles_per_chunk * BLOCK_N, m)
    for i_column in range(first, last, BLOCK_N):
        o_column = i_column + tl.arange(0, BLOCK_N)  # [N]
        o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)  # [N]
        b_s = similarity_tile(
            p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # [M, N]  # fmt: skip
        b_t = similarity_tile(
            p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image, o_safe_column * stride_teacher_text,
            teacher_width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
        )  # [M, N]  # fmt: skip
        m_tile = m_row[:, None] & (o_column < m)[None, :]  # [M, N]
        m_off = m_tile & (o_row[:, None] + pair_offset != o_column[None, :])  # [M, N]
        if WRITE_CACHE:
            o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
            tl.store(p_cache + o_cache, b_s, mask=m_tile)
            tl.store(p_teacher_cache + o_cache, b_t, mask=m_tile)
        if EDIT:
            m_edit = _edited(p_row_ids, p_column_ids, o_safe_row, o_safe_column)  # [M, N]
            b_t = _edit(b_t, m_edit, p_row_levels, p_column_levels, o_safe_row, o_safe_column)
            b_above = tl.where(m_off & m_edit, tl.maximum(b_s - b_t, 0.0), 0.0)
            b_forget += tl.sum(b_above * b_above, 1)
            b_difference = tl.where(m_off & (m_edit == 0), b_s - b_t, 0.0)  # [M, N]
        else:
            b_difference = tl.where(m_off, b_s - b_t, 0.0)
        b_anchor += tl.sum(b_difference * b_difference, 1)
        b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap = add_stats(
            b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap,
            b_s * tl.load(p_scalars), b_t * tl.load(p_scalars + 1), m_off, o_column, o_safe_row, o_safe_column,
            i_block, p_row_group, p_column_group, p_scalars, p_column_stats, m, PLAIN, MASKED, TEACHER, NUM_STATS,
        )  # fmt: skip
    store_rows(
        p_row_stats, b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, i_chunk,
        strip_start, strip_stop, PLAIN, MASKED, TEACHER, NUM_STATS,
    )  # fmt: skip
    programs = tl.num_programs(0) * tl.num_programs(1)
    p_sum = p_sums + i_block * tl.num_programs(1) + i_chunk
    tl.store(p_sum, tl.sum(b_forget))
    tl.store(p_sum + programs, tl.sum(b_anchor))


@triton.jit(do_not_specialize=["row_stop", "column_stop", "pair_offset"])
def calibrated_backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
    teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
    p_row_ids, p_column_ids, p_row_levels, p_column_levels, p_sums,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, EDIT: tl.constexpr, READ_CACHE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form a block of dS plus the pull on C, in p_block [rows, stride_block], and sum dS_ij S_ij without pairs.

    p_scalars: s, s°, and the factors of the pull on edited entries and on others. p_softmax, p_diagonal: see
    `backward_kernel`; the diagonal contains the pull. p_sums: [programs].
    """
    i_row, i_column = tile_of_program(row_stop - row_start, column_stop - column_start, GROUP_ROWS, BLOCK_M, BLOCK_N)
    o_row = row_start + i_row * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    o_column = column_start + i_column * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    m_row, m_column = o_row < n, o_column < m
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)
    m_tile = m_row[:, None] & m_column[None, :]  # [M, N]
    if READ_CACHE:
        o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
        b_s = tl.load(p_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
        b_t = tl.load(p_teacher_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
    else:
        b_s = similarity_tile(
            p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # [M, N]  # fmt: skip
        b_t = similarity_tile(
            p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image, o_safe_column * stride_teacher_text,
            teacher_width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
        )  # [M, N]  # fmt: skip
    if EDIT:
        m_edit = _edited(p_row_ids, p_column_ids, o_safe_row, o_safe_column)  # [M, N]
        b_t = _edit(b_t, m_edit, p_row_levels, p_column_levels, o_safe_row, o_safe_column)
        b_pull = tl.where(
            m_edit, tl.maximum(b_s - b_t, 0.0) * tl.load(p_scalars + 2), (b_s - b_t) * tl.load(p_scalars + 3)
        )  # [M, N]
    else:
        b_pull = (b_s - b_t) * tl.load(p_scalars + 3)
    b_s *= tl.load(p_scalars)
    b_t *= tl.load(p_scalars + 1)
    b_gradient = softmax_gradient(b_s, p_softmax, o_row, m_row, o_column, m_column, n, m)
    if MASKED:
        b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
        b_masked = softmax_gradient(b_s, p_softmax + PLAIN * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m)
        b_gradient += tl.where(b_row_group[:, None] == b_column_group[None, :], 0.0, b_masked)
    b_gradient += softmax_gradient(
        b_t, p_softmax + (PLAIN + MASKED) * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m
    )
    m_pair = o_row[:, None] + pair_offset == o_column[None, :]  # [M, N]
    tl.store(p_sums + tl.program_id(0), tl.sum(tl.where(m_tile & (m_pair == 0), b_gradient * b_s, 0.0)))
    b_diagonal = tl.load(p_diagonal + o_row, mask=m_row, other=0.0)  # [M]
    b_gradient = tl.where(m_pair, b_diagonal[:, None], b_gradient + b_pull)
    store_gradient(p_block, b_gradient, o_row - row_start, o_column - column_start, stride_block, m_tile)


class Comparison:
    """Launches the forward kernel, and adds up the sums of its programs, always in order."""

    def __init__(self, edit: Edit | None, like: Tensor) -> None:
        self.edit, self.sums = edit, like.new_zeros(2)

    def launch(self, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """arguments, constants: those of `forward_kernel`."""
        parts = self.sums.new_empty(2, grid[0] * grid[1])
        calibrated_forward_kernel[grid](
            *arguments, *_edit_arguments(self.edit), parts, EDIT=self.edit is not None, **constants
        )
        self.sums += parts.sum(1)


def _edit_arguments(edit: Edit | None) -> tuple[Tensor | None, ...]:
    return (None,) * len(Edit._fields) if edit is None else edit


def edited_diagonal(inputs: SimilarityInputs, edit: Edit | None, teacher_diagonal: Tensor | None) -> Tensor | None:
    """Return S° of own pairs after the edit, [n]; teacher_diagonal: before it."""
    if teacher_diagonal is None or edit is None:
        return teacher_diagonal
    own = slice(inputs.pair_offset, inputs.pair_offset + inputs.n)
    assert inputs.teacher_scale is not None
    level = (edit.row_levels + edit.column_levels[own]) * inputs.teacher_scale.float()
    return torch.where(edit.row_ids == edit.column_ids[own], level, teacher_diagonal)


def calibrated_gradients(
    inputs: SimilarityInputs,
    operands: Operands,
    config: Config,
    edit: Edit | None,
    terms: GradientTerms,
    pull: Pull,
    cache: Tensor,
    need: Need,
    block_columns: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `CalibratedKernels.calibrated_backward` returns; block_columns: see `backward.gradients`."""
    image, n, m = operands.image, operands.n, operands.m
    assert operands.teacher_scale is not None and operands.teacher_image is not None
    assert operands.teacher_text is not None
    features = (image, operands.text), (operands.teacher_image, operands.teacher_text)
    softmaxes, diagonal, pull, unit = calibrated_terms(features, edit, terms, pull)
    scalars = torch.stack((operands.scale, operands.teacher_scale, *pull))
    found = FeatureGradients(
        image, operands.text, inputs.image.shape[1], operands.scale * unit, need._replace(scale=False),
        (torch.float32,) * 2,
    )  # fmt: skip
    shape = operands.gradient_block(config, inputs.strip_rows, block_columns)
    buffer, cached_rows = image.new_empty(shape), operands.cached_rows(cache)
    total = scalars.new_zeros(())
    for rows, columns in in_blocks(n, m, shape, cached_rows):
        block = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        programs = triton.cdiv(block.shape[0], config.block_m) * triton.cdiv(block.shape[1], config.block_n)
        sums = scalars.new_empty(programs)
        calibrated_backward_kernel[(programs,)](
            *operands.features(), *operands.groups, scalars, softmaxes, diagonal, block,
            *operands.cached_tiles(cache), rows.start, rows.stop, columns.start, columns.stop, n, m,
            operands.pair_offset, *operands.widths(), *operands.strides(), shape[1], *_edit_arguments(edit), sums,
            EDIT=edit is not None, GROUP_ROWS=GROUP_ROWS, READ_CACHE=rows.start < cached_rows,
            **operands.constants(config),
        )  # fmt: skip
        total += sums.sum()
        found.add(rows, columns, block)
    return found.image, found.text, total * unit
