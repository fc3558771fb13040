"""The backward pass: a block of dS at a time, in the dtype of the features, and the gradients from it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.blocks import FeatureGradients, in_blocks
from cliperase_fast.ops.spec import Need, SavedStats, SimilarityInputs, Weights, unit_terms
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.tiles import (
    GROUP_ROWS,
    Operands,
    exp,
    similarity_tile,
    store_gradient,
    tile_of_program,
)


@triton.jit
def _softmax_gradient(b_tile, p_softmax, o_row, m_row, o_column, m_column, n, m):
    """Return the row softmax plus the column softmax of a tile, [M, N], each times its weight.

    p_softmax: row anchors [n] and factors [n], then column anchors [m] and factors [m].
    """
    b_row_anchor = tl.load(p_softmax + o_row, mask=m_row, other=0.0)  # [M]
    b_column_anchor = tl.load(p_softmax + 2 * n + o_column, mask=m_column, other=0.0)  # [N]
    b_row_factor = tl.load(p_softmax + n + o_row, mask=m_row, other=0.0)  # [M]
    b_column_factor = tl.load(p_softmax + 2 * n + m + o_column, mask=m_column, other=0.0)  # [N]
    b_row = exp(b_tile - b_row_anchor[:, None]) * b_row_factor[:, None]  # [M, N]
    return b_row + exp(b_tile - b_column_anchor[None, :]) * b_column_factor[None, :]


@triton.jit(do_not_specialize=["row_start", "row_stop", "column_start", "column_stop", "pair_offset"])
def backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
    teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, READ_CACHE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of dL/dS (up to one common factor), all terms together, into p_block [rows, stride_block], in its dtype.

    Row i and column i + pair_offset are a pair. p_softmax: [PLAIN + MASKED + TEACHER, 2 n + 2 m], see
    `_softmax_gradient`; p_diagonal: [n], dS of the pairs. READ_CACHE: the tiles of S and S° are read from where the
    forward kernel has stored them.
    """
    o_row, o_column = tile_of_program(
        row_start, row_stop, column_start, column_stop, GROUP_ROWS, BLOCK_M, BLOCK_N
    )  # [M], [N]
    m_row, m_column = o_row < row_stop, o_column < column_stop
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)

    m_tile = m_row[:, None] & m_column[None, :]  # [M, N]
    if READ_CACHE:
        o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
        b_s = tl.load(p_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
    else:
        b_s = similarity_tile(
            p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        ) * tl.load(p_scalars)  # [M, N]  # fmt: skip
    b_gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PLAIN:
        b_gradient = _softmax_gradient(b_s, p_softmax, o_row, m_row, o_column, m_column, n, m)
    if MASKED:
        b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
        b_masked = _softmax_gradient(b_s, p_softmax + PLAIN * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m)
        b_gradient += tl.where(b_row_group[:, None] == b_column_group[None, :], 0.0, b_masked)
    if TEACHER:
        if READ_CACHE:
            b_t = tl.load(p_teacher_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
        else:
            b_t = similarity_tile(
                p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image,
                o_safe_column * stride_teacher_text, teacher_width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
            ) * tl.load(p_scalars + 1)  # [M, N]  # fmt: skip
        b_gradient += _softmax_gradient(
            b_t, p_softmax + (PLAIN + MASKED) * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m
        )
    b_diagonal = tl.load(p_diagonal + o_row, mask=m_row, other=0.0)  # [M]
    b_gradient = tl.where(o_row[:, None] + pair_offset == o_column[None, :], b_diagonal[:, None], b_gradient)
    store_gradient(p_block, b_gradient, o_row - row_start, o_column - column_start, stride_block, m_tile)


def gradients(
    inputs: SimilarityInputs,
    operands: Operands,
    config: Config,
    saved: SavedStats,
    weights: Weights,
    need: Need,
    partial: bool,
    block_columns: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of image, text and scale, see `ops.spec.SweepKernels.backward`.

    block_columns: of a block of dS; 0: chosen from its memory.
    """
    image, n, m = operands.image, operands.n, operands.m
    softmaxes, diagonal, unit = unit_terms(
        inputs, saved, Weights(weights.retention.float(), weights.consistency.float()),
        loss_scale=2.0**13 if image.dtype == torch.float16 else 1.0,
    )  # fmt: skip
    scalars = operands.scalars(unit)  # the shift is not used here
    dtypes = (inputs.image.dtype, inputs.text.dtype, inputs.scale.dtype)
    if partial:
        dtypes = (torch.float32,) * 3
    found = FeatureGradients(image, operands.text, inputs.image.shape[1], unit * operands.scale, need, dtypes)
    shape = operands.gradient_block(config, inputs.strip_rows, block_columns)
    buffer = image.new_empty(shape)
    cached_rows = operands.cached_rows(saved.cache)
    for rows, columns in in_blocks(n, m, shape, cached_rows):
        block = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        backward_kernel[(triton.cdiv(block.shape[0], config.block_m) * triton.cdiv(block.shape[1], config.block_n),)](
            *operands.features(), *operands.groups, scalars, softmaxes, diagonal, block,
            *operands.cached_tiles(saved.cache), rows.start, rows.stop, columns.start, columns.stop, n, m,
            operands.pair_offset, *operands.widths(), *operands.strides(), shape[1], GROUP_ROWS=GROUP_ROWS,
            READ_CACHE=rows.start < cached_rows, **operands.constants(config),
        )  # fmt: skip
        found.add(rows, columns, block)
    return found.image, found.text, (found.scale * unit).to(dtypes[2])
