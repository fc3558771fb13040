"""What the kernels do with a tile: statistics of its rows and columns, or dS, with two exponentials for an entry.

One is relative to a number of the row, the other to one of the column, so that neither overflows nor vanishes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cliperase_fast.ops.triton.kept import load_compact, store_compact
from cliperase_fast.ops.triton.tiles import LOWEST, exp, similarity_tile, store_gradient


@triton.jit
def merge_parts(b_max, b_sum, b_gap, b_more_max, b_more_sum, b_more_gap):
    """Merge two partial (maximum, sum of exp, sum of exp times gap)."""
    b_new = tl.maximum(b_max, b_more_max)
    b_keep, b_add = exp(b_max - b_new), exp(b_more_max - b_new)
    return b_new, b_sum * b_keep + b_more_sum * b_add, b_gap * b_keep + b_more_gap * b_add


@triton.jit
def reduce_tile(b_tile, b_gap, AXIS: tl.constexpr, HAS_GAP: tl.constexpr):
    """Return the partial (maximum, sum, gap) of a tile's rows [M] (AXIS 1) or columns [N] (AXIS 0)."""
    b_max = tl.max(b_tile, AXIS)
    b_exp = exp(b_tile - tl.expand_dims(b_max, AXIS))  # [M, N]
    b_sum = tl.sum(b_exp, AXIS)
    if HAS_GAP:
        return b_max, b_sum, tl.sum(b_exp * b_gap, AXIS)
    return b_max, b_sum, b_sum


@triton.jit
def store_stats(p_stats, o_stats, m_stats, n, b_max, b_sum, b_gap, FIRST: tl.constexpr, HAS_GAP: tl.constexpr):
    """Store statistics FIRST, FIRST + 1 (and FIRST + 2) of an array [NUM_STATS, n]."""
    p_first = p_stats + o_stats + FIRST * n
    tl.store(p_first, b_max, mask=m_stats)
    tl.store(p_first + n, b_sum, mask=m_stats)
    if HAS_GAP:
        tl.store(p_first + 2 * n, b_gap, mask=m_stats)


@triton.jit
def add_stats(
    b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, b_s, b_t, m_off, o_column,
    o_safe_row, o_safe_column, i_block, p_row_group, p_column_group, p_scalars, p_column_stats, m,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr,
):  # fmt: skip
    """Store the statistics of the columns o_column [N] of a tile, and return those of its rows with the tile's added.

    b_s, b_t: S and S° [M, N]; m_off: which entries count; o_safe_row, o_safe_column: places that exist.
    """
    m_column = o_column < m
    o_stats = i_block.to(tl.int64) * NUM_STATS * m + o_column  # [N], in p_column_stats
    if TEACHER:
        b_tile_gap = tl.where(m_off, b_t - b_s - tl.load(p_scalars + 2), 0.0)  # [M, N]
        b_t = tl.where(m_off, b_t, LOWEST)
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_t, b_tile_gap, 1, True)  # [M]
        b_teacher_max, b_teacher_sum, b_gap = merge_parts(
            b_teacher_max, b_teacher_sum, b_gap, b_part_max, b_part_sum, b_part_gap
        )
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_t, b_tile_gap, 0, True)  # [N]
        store_stats(
            p_column_stats, o_stats, m_column, m, b_part_max, b_part_sum, b_part_gap, 2 * PLAIN + 2 * MASKED, True
        )
    b_s = tl.where(m_off, b_s, LOWEST)
    if PLAIN:
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_s, b_s, 1, False)  # [M]
        b_max, b_sum, _b_no_gap = merge_parts(b_max, b_sum, b_sum, b_part_max, b_part_sum, b_part_sum)
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_s, b_s, 0, False)  # [N]
        store_stats(p_column_stats, o_stats, m_column, m, b_part_max, b_part_sum, b_part_gap, 0, False)
    if MASKED:
        b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
        b_s = tl.where(b_row_group[:, None] == b_column_group[None, :], LOWEST, b_s)
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_s, b_s, 1, False)  # [M]
        b_masked_max, b_masked_sum, _b_no_gap = merge_parts(
            b_masked_max, b_masked_sum, b_masked_sum, b_part_max, b_part_sum, b_part_sum
        )
        b_part_max, b_part_sum, b_part_gap = reduce_tile(b_s, b_s, 0, False)  # [N]
        store_stats(p_column_stats, o_stats, m_column, m, b_part_max, b_part_sum, b_part_gap, 2 * PLAIN, False)
    return b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap


@triton.jit
def stats_tile(
    b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, o_column, i_block, p_image,
    p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, b_scale, p_scalars, p_column_stats, p_cache,
    p_teacher_cache, strip_stop, n, m, pair_offset, width, teacher_width, stride_image, stride_text,
    stride_teacher_image, stride_teacher_text, PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr,
    NUM_STATS: tl.constexpr, WRITE_CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the statistics of columns o_column [N], and return those of rows o_row [M] with the tile's added."""
    m_row, m_column = o_row < strip_stop, o_column < m
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)  # [N]
    b_s = similarity_tile(
        p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    ) * b_scale  # [M, N]  # fmt: skip
    m_tile = m_row[:, None] & m_column[None, :]  # [M, N]
    m_off = m_tile & (o_row[:, None] + pair_offset != o_column[None, :])  # [M, N]
    o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
    if WRITE_CACHE == 1:
        tl.store(p_cache + o_cache, b_s, mask=m_tile)
    b_t = b_s
    if TEACHER:
        b_t = similarity_tile(
            p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image, o_safe_column * stride_teacher_text,
            teacher_width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
        ) * tl.load(p_scalars + 1)  # [M, N]  # fmt: skip
        if WRITE_CACHE == 1:
            tl.store(p_teacher_cache + o_cache, b_t, mask=m_tile)
    if WRITE_CACHE == 2:
        store_compact(
            p_cache, p_teacher_cache, b_s, b_t, o_row, o_column, o_cache, m_tile, m_off, n, m, TEACHER, BLOCK_M, BLOCK_N
        )
    return add_stats(
        b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, b_s, b_t, m_off, o_column,
        o_safe_row, o_safe_column, i_block, p_row_group, p_column_group, p_scalars, p_column_stats, m, PLAIN, MASKED,
        TEACHER, NUM_STATS,
    )  # fmt: skip


@triton.jit
def store_rows(
    p_row_stats, b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, i_chunk,
    strip_start, strip_stop, PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr,
):  # fmt: skip
    """Store the statistics of rows o_row [M] in p_row_stats [chunks, NUM_STATS, strip rows]."""
    m_row, rows = o_row < strip_stop, strip_stop - strip_start
    o_stats = i_chunk.to(tl.int64) * NUM_STATS * rows + (o_row - strip_start)  # [M]
    if PLAIN:
        store_stats(p_row_stats, o_stats, m_row, rows, b_max, b_sum, b_sum, 0, False)
    if MASKED:
        store_stats(p_row_stats, o_stats, m_row, rows, b_masked_max, b_masked_sum, b_sum, 2 * PLAIN, False)
    if TEACHER:
        store_stats(
            p_row_stats, o_stats, m_row, rows, b_teacher_max, b_teacher_sum, b_gap, 2 * PLAIN + 2 * MASKED, True
        )


@triton.jit
def softmax_gradient(b_tile, p_softmax, o_row, m_row, o_column, m_column, n, m):
    """Return the row softmax plus the column softmax of a tile, [M, N], each times its weight.

    p_softmax: row anchors [n] and factors [n], then column anchors [m] and factors [m].
    """
    b_row_anchor = tl.load(p_softmax + o_row, mask=m_row, other=0.0)  # [M]
    b_column_anchor = tl.load(p_softmax + 2 * n + o_column, mask=m_column, other=0.0)  # [N]
    b_row_factor = tl.load(p_softmax + n + o_row, mask=m_row, other=0.0)  # [M]
    b_column_factor = tl.load(p_softmax + 2 * n + m + o_column, mask=m_column, other=0.0)  # [N]
    b_row = exp(b_tile - b_row_anchor[:, None]) * b_row_factor[:, None]  # [M, N]
    return b_row + exp(b_tile - b_column_anchor[None, :]) * b_column_factor[None, :]


@triton.jit
def gradient_tile(
    o_row, o_column,
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
    teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, READ_CACHE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form and store the tile of dS at rows o_row [M] and columns o_column [N]; see `backward_kernel`."""
    # A block ends where a tile does, or at n and m, whose divisibility the compiler knows.
    m_row, m_column = o_row < n, o_column < m
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)

    m_tile = m_row[:, None] & m_column[None, :]  # [M, N]
    o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
    if READ_CACHE == 2:
        b_s, b_t = load_compact(
            p_cache, p_teacher_cache, o_row, o_column, o_cache, m_tile, n, m, TEACHER, BLOCK_M, BLOCK_N
        )  # [M, N]
    elif READ_CACHE == 1:
        b_s = tl.load(p_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
    else:
        b_s = similarity_tile(
            p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        ) * tl.load(p_scalars)  # [M, N]  # fmt: skip
    b_gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PLAIN:
        b_gradient = softmax_gradient(b_s, p_softmax, o_row, m_row, o_column, m_column, n, m)
    if MASKED:
        b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
        b_masked = softmax_gradient(b_s, p_softmax + PLAIN * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m)
        b_gradient += tl.where(b_row_group[:, None] == b_column_group[None, :], 0.0, b_masked)
    if TEACHER:
        if READ_CACHE == 1:
            b_t = tl.load(p_teacher_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
        elif READ_CACHE == 0:
            b_t = similarity_tile(
                p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image,
                o_safe_column * stride_teacher_text, teacher_width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
            ) * tl.load(p_scalars + 1)  # [M, N]  # fmt: skip
        b_gradient += softmax_gradient(
            b_t, p_softmax + (PLAIN + MASKED) * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m
        )
    b_diagonal = tl.load(p_diagonal + o_row, mask=m_row, other=0.0)  # [M]
    b_gradient = tl.where(o_row[:, None] + pair_offset == o_column[None, :], b_diagonal[:, None], b_gradient)
    store_gradient(p_block, b_gradient, o_row - row_start, o_column - column_start, stride_block, m_tile)
