"""Variants of the forward and the backward kernel with one exponential for an entry of S, and one of S°.

exp(S_ij - c), with one reference c for a tile, serves the tile's rows and its columns. It is exact unless the entries
of some row or column lie so far below c that they vanish. In the forward pass c is the tile's maximum. Too small sums
show what it does not reach, and such tiles are formed again. In the backward pass c follows from the anchors, so it is
known before the tile is formed. Tiles out of reach have two exponentials for an entry, see `softmax_tiles.py`.

Both products of a tile are formed in one loop where student and teacher are equally wide.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.blocks import round_up
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.kept import load_compact, store_compact
from cliperase_fast.ops.triton.softmax_tiles import gradient_tile, merge_parts, stats_tile, store_rows, store_stats
from cliperase_fast.ops.triton.tiles import (
    LOWEST,
    OPTIONS,
    REACH,
    both_similarity_tiles,
    exp,
    similarity_tile,
    store_gradient,
    tile_of_program,
)

_LEAST = tl.constexpr(8.75651076269652e-27)  # exp(-REACH)
# Bits that say which statistics of a tile are missing: one for each kind of row statistics, one for all columns.
_PLAIN, _MASKED, _TEACHER, _COLUMNS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
CHECKED_COLUMNS = 2048  # of a program of `check_kernel`


@triton.jit
def _shared_stats(b_tile, b_gap, m_row, HAS_GAP: tl.constexpr):
    """Return (reference [], whether it reaches all rows, sums and gaps of rows [M] and of columns [N]) of a tile.

    What it does not reach counts as nothing in the rows.
    """
    b_top = tl.max(b_tile)  # []
    b_top = tl.where(b_top == LOWEST, 0.0, b_top)  # nothing counts: the sums must be 0
    b_exp = exp(b_tile - b_top)  # [M, N]
    b_row_sum, b_column_sum = tl.sum(b_exp, 1), tl.sum(b_exp, 0)
    b_row_gap, b_column_gap = b_row_sum, b_column_sum
    if HAS_GAP:
        b_exp *= b_gap
        b_row_gap, b_column_gap = tl.sum(b_exp, 1), tl.sum(b_exp, 0)
    # A sum is at least the exponential of the largest entry of its row. Columns: see `check_kernel`.
    m_reached = tl.min(tl.where(m_row, b_row_sum, 1.0)) >= _LEAST
    b_row_sum, b_row_gap = tl.where(m_reached, b_row_sum, 0.0), tl.where(m_reached, b_row_gap, 0.0)
    return b_top, m_reached, b_row_sum, b_row_gap, b_column_sum, b_column_gap


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "pair_offset", "tiles_per_chunk"])
def shared_forward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_row_stats,
    p_column_stats, p_missing, p_cache, p_teacher_cache, strip_start, strip_stop, n, m, pair_offset, width,
    teacher_width, tiles_per_chunk, stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr,
    WRITE_CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, SAME_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do the same as `forward_kernel`, with one exponential for an entry's row and column.

    p_missing: int32 [row blocks, tiles of columns], the kinds of statistics of a tile's rows that are left out, because
    the reference does not reach a row: bits. `check_kernel` adds those of columns; `repair_kernel` makes all good.
    """
    i_block, i_chunk = tl.program_id(0), tl.program_id(1)
    row_first = strip_start + i_block * BLOCK_M
    o_row = row_first + tl.arange(0, BLOCK_M)  # [M]
    m_row = o_row < strip_stop  # [M]
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    b_zero = tl.zeros([BLOCK_M], tl.float32)  # [M]
    b_max, b_masked_max, b_teacher_max = b_zero + LOWEST, b_zero + LOWEST, b_zero + LOWEST
    b_sum, b_masked_sum, b_teacher_sum, b_gap = b_zero, b_zero, b_zero, b_zero
    first = i_chunk * tiles_per_chunk * BLOCK_N
    last = tl.minimum(first + tiles_per_chunk * BLOCK_N, m)
    for i_column in range(first, last, BLOCK_N):
        o_column = i_column + tl.arange(0, BLOCK_N)  # [N]
        m_column = o_column < m  # [N]
        o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)  # [N]
        if TEACHER:
            b_s, b_t = both_similarity_tiles(
                p_image, p_text, p_teacher_image, p_teacher_text, o_safe_row * stride_image,
                o_safe_column * stride_text, o_safe_row * stride_teacher_image, o_safe_column * stride_teacher_text,
                width, teacher_width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_K_TEACHER, SAME_WIDTH, PRECISION,
            )  # fmt: skip
            b_s, b_t = b_s * tl.load(p_scalars), b_t * tl.load(p_scalars + 1)  # [M, N]
        else:
            b_s = similarity_tile(
                p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            ) * tl.load(p_scalars)  # [M, N]  # fmt: skip
            b_t = b_s
        if WRITE_CACHE:
            m_tile = m_row[:, None] & m_column[None, :]  # [M, N]
            o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
        if WRITE_CACHE == 1:
            tl.store(p_cache + o_cache, b_s, mask=m_tile)
            if TEACHER:
                tl.store(p_teacher_cache + o_cache, b_t, mask=m_tile)
        elif WRITE_CACHE == 2:
            m_exact = m_tile & (o_row[:, None] + pair_offset != o_column[None, :])  # [M, N]
            store_compact(
                p_cache, p_teacher_cache, b_s, b_t, o_row, o_column, o_cache, m_tile, m_exact, n, m, TEACHER, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
        # Only tiles with pairs, and the last ones, have entries that do not count.
        pair_first = row_first + pair_offset
        m_pairs = (pair_first < i_column + BLOCK_N) & (i_column < pair_first + BLOCK_M)
        if m_pairs | (i_column + BLOCK_N > m) | (row_first + BLOCK_M > strip_stop):
            m_off = (m_row[:, None] & m_column[None, :]) & (o_row[:, None] + pair_offset != o_column[None, :])  # [M, N]
            b_s = tl.where(m_off, b_s, LOWEST)
            b_t = tl.where(m_off, b_t, LOWEST)
        o_stats = i_block.to(tl.int64) * NUM_STATS * m + o_column  # [N], in p_column_stats
        missing = 0  # kinds of statistics out of reach: their rows are left out here
        if PLAIN:
            b_top, m_reached, b_row_sum, b_row_gap, b_column_sum, b_column_gap = _shared_stats(b_s, b_s, m_row, False)
            store_stats(p_column_stats, o_stats, m_column, m, b_top, b_column_sum, b_column_sum, 0, False)
            b_max, b_sum, b_row_gap = merge_parts(
                b_max, b_sum, b_sum, tl.where(m_reached, b_top, LOWEST), b_row_sum, b_row_sum
            )
            missing += tl.where(m_reached, 0, _PLAIN)
        if TEACHER:
            b_top, m_reached, b_row_sum, b_row_gap, b_column_sum, b_column_gap = _shared_stats(
                b_t, b_t - b_s - tl.load(p_scalars + 2), m_row, True
            )
            store_stats(
                p_column_stats, o_stats, m_column, m, b_top, b_column_sum, b_column_gap, 2 * PLAIN + 2 * MASKED, True
            )
            b_teacher_max, b_teacher_sum, b_gap = merge_parts(
                b_teacher_max, b_teacher_sum, b_gap, tl.where(m_reached, b_top, LOWEST), b_row_sum, b_row_gap
            )
            missing += tl.where(m_reached, 0, _TEACHER)
        if MASKED:
            b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
            b_s = tl.where(b_row_group[:, None] == b_column_group[None, :], LOWEST, b_s)
            b_top, m_reached, b_row_sum, b_row_gap, b_column_sum, b_column_gap = _shared_stats(b_s, b_s, m_row, False)
            store_stats(p_column_stats, o_stats, m_column, m, b_top, b_column_sum, b_column_sum, 2 * PLAIN, False)
            b_masked_max, b_masked_sum, b_row_gap = merge_parts(
                b_masked_max, b_masked_sum, b_masked_sum, tl.where(m_reached, b_top, LOWEST), b_row_sum, b_row_sum
            )
            missing += tl.where(m_reached, 0, _MASKED)
        tl.store(p_missing + i_block * tl.cdiv(m, BLOCK_N) + i_column // BLOCK_N, missing)
    store_rows(
        p_row_stats, b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, i_chunk,
        strip_start, strip_stop, PLAIN, MASKED, TEACHER, NUM_STATS,
    )  # fmt: skip


@triton.jit
def check_kernel(
    p_column_stats, p_missing, m, NUM_STATS: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Mark the tiles whose reference does not reach a column; a program checks TILES tiles of a block of rows."""
    i_block, i_group = tl.program_id(0), tl.program_id(1)
    o_column = i_group * TILES * BLOCK_N + tl.arange(0, TILES * BLOCK_N)
    p_sum = p_column_stats + i_block.to(tl.int64) * NUM_STATS * m + m + o_column
    b_least = tl.load(p_sum, mask=o_column < m, other=1.0)
    for i_kind in tl.static_range(1, NUM_STATS // 2):
        b_least = tl.minimum(b_least, tl.load(p_sum + 2 * i_kind * m, mask=o_column < m, other=1.0))
    b_least = tl.min(tl.reshape(b_least, [TILES, BLOCK_N]), 1)  # [TILES]
    o_tile = i_group * TILES + tl.arange(0, TILES)
    p_tile = p_missing + i_block * tl.cdiv(m, BLOCK_N) + o_tile
    m_missing = (b_least < _LEAST) & (o_tile < tl.cdiv(m, BLOCK_N))
    tl.store(p_tile, tl.load(p_tile, mask=m_missing, other=0) | _COLUMNS, mask=m_missing)


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "pair_offset", "tiles_per_chunk"])
def repair_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_row_stats,
    p_column_stats, p_missing, p_cache, p_teacher_cache, strip_start, strip_stop, n, m, pair_offset, width,
    teacher_width, tiles_per_chunk, stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr,
    WRITE_CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Form the tiles again that `shared_forward_kernel` did not reach, in halves, as `forward_kernel` does it.

    CHUNK: tiles_per_chunk, rounded up to a power of two.
    """
    i_block, i_chunk = tl.program_id(0), tl.program_id(1)
    p_missing += i_block * tl.cdiv(m, BLOCK_N) + i_chunk * tiles_per_chunk
    o_tile = tl.arange(0, CHUNK)
    m_tile = (o_tile < tiles_per_chunk) & (i_chunk * tiles_per_chunk + o_tile < tl.cdiv(m, BLOCK_N))
    if tl.max(tl.load(p_missing + o_tile, mask=m_tile, other=0)) > 0:
        o_row = strip_start + i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        m_row, rows = o_row < strip_stop, strip_stop - strip_start
        p_row = p_row_stats + i_chunk.to(tl.int64) * NUM_STATS * rows + (o_row - strip_start)  # [M]
        b_scale = tl.load(p_scalars)  # []
        b_zero = tl.zeros([BLOCK_M], tl.float32)  # [M]
        b_max, b_masked_max, b_teacher_max = b_zero + LOWEST, b_zero + LOWEST, b_zero + LOWEST
        b_sum, b_masked_sum, b_teacher_sum, b_gap = b_zero, b_zero, b_zero, b_zero
        if PLAIN:
            b_max = tl.load(p_row, mask=m_row, other=LOWEST)
            b_sum = tl.load(p_row + rows, mask=m_row, other=0.0)
        if MASKED:
            b_masked_max = tl.load(p_row + 2 * PLAIN * rows, mask=m_row, other=LOWEST)
            b_masked_sum = tl.load(p_row + (2 * PLAIN + 1) * rows, mask=m_row, other=0.0)
        if TEACHER:
            p_teacher = p_row + (2 * PLAIN + 2 * MASKED) * rows
            b_teacher_max = tl.load(p_teacher, mask=m_row, other=LOWEST)
            b_teacher_sum = tl.load(p_teacher + rows, mask=m_row, other=0.0)
            b_gap = tl.load(p_teacher + 2 * rows, mask=m_row, other=0.0)
        for i_tile in range(tl.minimum(tiles_per_chunk, tl.cdiv(m, BLOCK_N) - i_chunk * tiles_per_chunk)):
            missing = tl.load(p_missing + i_tile)
            if missing != 0:
                m_plain, m_masked = (missing & _PLAIN) != 0, (missing & _MASKED) != 0
                m_teacher = (missing & _TEACHER) != 0
                column_first = (i_chunk * tiles_per_chunk + i_tile) * BLOCK_N
                for half in range(0, BLOCK_N, BLOCK_N // 2):
                    (
                        b_max_new, b_sum_new, b_masked_max_new, b_masked_sum_new, b_teacher_max_new,
                        b_teacher_sum_new, b_gap_new,
                    ) = stats_tile(
                        b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row,
                        column_first + half + tl.arange(0, BLOCK_N // 2), i_block, p_image, p_text, p_teacher_image,
                        p_teacher_text, p_row_group, p_column_group, b_scale, p_scalars, p_column_stats, p_cache,
                        p_teacher_cache, strip_stop, n, m, pair_offset, width, teacher_width, stride_image,
                        stride_text, stride_teacher_image, stride_teacher_text, PLAIN, MASKED, TEACHER, NUM_STATS,
                        False, BLOCK_M, BLOCK_N // 2, BLOCK_K, EVEN_K, EVEN_K_TEACHER, PRECISION,
                    )  # fmt: skip
                    # The rows have the kinds of statistics that are not missing already.
                    b_max, b_sum = tl.where(m_plain, b_max_new, b_max), tl.where(m_plain, b_sum_new, b_sum)
                    b_masked_max = tl.where(m_masked, b_masked_max_new, b_masked_max)
                    b_masked_sum = tl.where(m_masked, b_masked_sum_new, b_masked_sum)
                    b_teacher_max = tl.where(m_teacher, b_teacher_max_new, b_teacher_max)
                    b_teacher_sum = tl.where(m_teacher, b_teacher_sum_new, b_teacher_sum)
                    b_gap = tl.where(m_teacher, b_gap_new, b_gap)
        store_rows(
            p_row_stats, b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, i_chunk,
            strip_start, strip_stop, PLAIN, MASKED, TEACHER, NUM_STATS,
        )  # fmt: skip


@triton.jit
def _block_anchor(b_top, b_bottom):
    """Return the anchor of a block's factors: no reference that reaches the block exceeds it, and nothing overflows."""
    return tl.minimum(b_top, b_bottom + REACH)


@triton.jit(do_not_specialize=["first"])
def anchors_kernel(p_softmax, p_moved, p_ranges, count, first, softmax_size, moved_size, BLOCK: tl.constexpr):
    """Find the largest and smallest anchor of a block of rows or columns, and the factors for an anchor of the block.

    p_softmax: anchors [count] and factors [count] from `first` on, in each row [softmax_size]. p_moved: [softmaxes,
    moved_size], 0 beyond `count`; p_ranges: [softmaxes, moved_size / BLOCK, 2], (largest, smallest).
    """
    i_block, i_softmax = tl.program_id(0), tl.program_id(1)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < count
    p_anchor = p_softmax + i_softmax.to(tl.int64) * softmax_size + first + o_n
    b_anchor = tl.load(p_anchor, mask=m_n, other=LOWEST)
    b_top = tl.max(b_anchor)  # []
    b_bottom = tl.min(tl.where(m_n, b_anchor, -LOWEST))
    b_move = exp(_block_anchor(b_top, b_bottom) - tl.where(m_n, b_anchor, b_top))
    b_factor = tl.load(p_anchor + count, mask=m_n, other=0.0) * b_move
    tl.store(p_moved + i_softmax.to(tl.int64) * moved_size + o_n, b_factor)
    p_range = p_ranges + 2 * (i_softmax * (moved_size // BLOCK) + i_block)
    tl.store(p_range, b_top)
    tl.store(p_range + 1, b_bottom)


@triton.jit
def _shared_reference(p_row_range, p_column_range):
    """Return (reference, whether it reaches all anchors, what moves the factors of rows to it, and those of columns).

    No entry of a tile exceeds the anchor of its row or of its column, so it does not exceed the smaller of their tops.
    """
    b_row_top, b_row_bottom = tl.load(p_row_range), tl.load(p_row_range + 1)
    b_column_top, b_column_bottom = tl.load(p_column_range), tl.load(p_column_range + 1)
    b_top = tl.minimum(b_row_top, b_column_top)
    m_reached = tl.minimum(b_row_bottom, b_column_bottom) >= b_top - REACH
    b_row_move = exp(b_top - _block_anchor(b_row_top, b_row_bottom))
    return b_top, m_reached, b_row_move, exp(b_top - _block_anchor(b_column_top, b_column_bottom))


@triton.jit
def _shared_softmax_gradient(b_tile, p_row_moved, p_row_range, p_column_moved, p_column_range):
    """Return what `softmax_gradient` returns, with one exponential an entry. p_row_moved: [M], p_column_moved: [N]."""
    b_top, _, b_row_move, b_column_move = _shared_reference(p_row_range, p_column_range)
    b_row_factor = tl.load(p_row_moved) * b_row_move  # [M]
    b_column_factor = tl.load(p_column_moved) * b_column_move  # [N]
    return exp(b_tile - b_top) * (b_row_factor[:, None] + b_column_factor[None, :])


@triton.jit(do_not_specialize=["row_stop", "column_stop", "pair_offset"])
def shared_backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
    teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
    p_row_moved, p_row_range, p_column_moved, p_column_range, row_size, column_size,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, READ_CACHE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, SAME_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do the same as `backward_kernel`, with one exponential for an entry of a softmax of rows and of columns.

    exp(S - c), with one reference c for a tile, serves both, unless anchors of the tile lie more than REACH below c.
    Such a tile is formed in halves, as `backward_kernel` does it. p_row_moved to p_column_range: from `anchors_kernel`;
    row_size, column_size: n and m, rounded up to whole tiles.
    """
    i_row, i_column = tile_of_program(row_stop - row_start, column_stop - column_start, GROUP_ROWS, BLOCK_M, BLOCK_N)
    row_first, column_first = row_start + i_row * BLOCK_M, column_start + i_column * BLOCK_N
    o_row = row_first + tl.arange(0, BLOCK_M)  # [M]
    p_row_range += row_first // BLOCK_M * 2
    p_column_range += column_first // BLOCK_N * 2
    row_ranges, column_ranges = row_size // BLOCK_M * 2, column_size // BLOCK_N * 2
    m_reached = True
    for i_softmax in tl.static_range(PLAIN + MASKED + TEACHER):
        _, m_one, _, _ = _shared_reference(
            p_row_range + i_softmax * row_ranges, p_column_range + i_softmax * column_ranges
        )
        m_reached = m_reached & m_one
    if m_reached:
        o_column = column_first + tl.arange(0, BLOCK_N)  # [N]
        o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
        o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)
        m_tile = (o_row < n)[:, None] & (o_column < m)[None, :]  # [M, N]
        p_rows, p_columns = p_row_moved + o_row, p_column_moved + o_column  # [M], [N]
        o_cache = o_safe_row[:, None] * m + o_column[None, :]  # [M, N]
        if READ_CACHE == 2:
            b_s, b_t = load_compact(
                p_cache, p_teacher_cache, o_row, o_column, o_cache, m_tile, n, m, TEACHER, BLOCK_M, BLOCK_N
            )  # [M, N]
        elif READ_CACHE == 1:
            b_s = tl.load(p_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
            if TEACHER:
                b_t = tl.load(p_teacher_cache + o_cache, mask=m_tile, other=0.0)  # [M, N]
        elif TEACHER:
            b_s, b_t = both_similarity_tiles(
                p_image, p_text, p_teacher_image, p_teacher_text, o_safe_row * stride_image,
                o_safe_column * stride_text, o_safe_row * stride_teacher_image, o_safe_column * stride_teacher_text,
                width, teacher_width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_K_TEACHER, SAME_WIDTH, PRECISION,
            )  # fmt: skip
            b_s, b_t = b_s * tl.load(p_scalars), b_t * tl.load(p_scalars + 1)  # [M, N]
        else:
            b_s = similarity_tile(
                p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            ) * tl.load(p_scalars)  # [M, N]  # fmt: skip
        b_gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PLAIN:
            b_gradient = _shared_softmax_gradient(b_s, p_rows, p_row_range, p_columns, p_column_range)
        if MASKED:
            b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
            b_masked = _shared_softmax_gradient(
                b_s, p_rows + PLAIN * row_size, p_row_range + PLAIN * row_ranges,
                p_columns + PLAIN * column_size, p_column_range + PLAIN * column_ranges,
            )  # fmt: skip
            b_gradient += tl.where(b_row_group[:, None] == b_column_group[None, :], 0.0, b_masked)
        if TEACHER:
            b_gradient += _shared_softmax_gradient(
                b_t, p_rows + (PLAIN + MASKED) * row_size, p_row_range + (PLAIN + MASKED) * row_ranges,
                p_columns + (PLAIN + MASKED) * column_size, p_column_range + (PLAIN + MASKED) * column_ranges,
            )  # fmt: skip
        pair_first = row_first + pair_offset
        if (pair_first < column_first + BLOCK_N) & (column_first < pair_first + BLOCK_M):
            b_diagonal = tl.load(p_diagonal + o_safe_row)  # [M]
            b_gradient = tl.where(o_row[:, None] + pair_offset == o_column[None, :], b_diagonal[:, None], b_gradient)
        store_gradient(p_block, b_gradient, o_row - row_start, o_column - column_start, stride_block, m_tile)
    else:
        PART: tl.constexpr = BLOCK_N if READ_CACHE == 2 else BLOCK_N // 2  # compact tiles are read whole
        for part in range(0, BLOCK_N, PART):
            gradient_tile(
                o_row, column_first + part + tl.arange(0, PART),
                p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax,
                p_diagonal, p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m,
                pair_offset, width, teacher_width, stride_image, stride_text, stride_teacher_image,
                stride_teacher_text, stride_block, PLAIN, MASKED, TEACHER, READ_CACHE, BLOCK_M, PART, BLOCK_K,
                EVEN_K, EVEN_K_TEACHER, PRECISION,
            )  # fmt: skip


def moved_factors(softmaxes: Tensor, n: int, m: int, config: Config) -> tuple[Tensor | int, ...]:
    """Return the last arguments of `shared_backward_kernel`; softmaxes: [terms, 2 n + 2 m], see `unit_terms`."""
    found, sizes = [], []
    for count, first, block in ((n, 0, config.block_m), (m, 2 * n, config.block_n)):
        size = round_up(count, block)
        moved = softmaxes.new_empty(len(softmaxes), size)
        ranges = softmaxes.new_empty(len(softmaxes), size // block, 2)
        anchors_kernel[(size // block, len(softmaxes))](
            softmaxes, moved, ranges, count, first, softmaxes.shape[1], size, BLOCK=block, **OPTIONS
        )
        found += [moved, ranges]
        sizes.append(size)
    return *found, *sizes
