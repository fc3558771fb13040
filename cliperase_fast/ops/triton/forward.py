"""The forward pass: statistics of rows and columns off the diagonal.

A tile of S and S° is formed once and gives partial statistics of its rows and of its columns. The parts are merged in a
fixed order, without atomics, so that two runs are bitwise equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.calibrated import edited_entry
from cliperase_fast.ops.spec import Stats
from cliperase_fast.ops.triton.calibrated import Comparison
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.shared import (
    CHECKED_COLUMNS,
    check_kernel,
    repair_kernel,
    shared_forward_kernel,
)
from cliperase_fast.ops.triton.softmax_tiles import merge_parts, stats_tile, store_rows
from cliperase_fast.ops.triton.tiles import LOWEST, OPTIONS, Operands

_PROGRAMS = 1024  # a launch has about this many where it can: several for each multiprocessor
_MERGE_BLOCK = 256


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "pair_offset", "tiles_per_chunk"])
def forward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_row_stats,
    p_column_stats, p_cache, p_teacher_cache, strip_start, strip_stop, n, m, pair_offset, width, teacher_width,
    tiles_per_chunk, stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr,
    WRITE_CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of a strip of rows: of each row in a chunk of columns, and of each column in a block of rows.

    Row i and column i + pair_offset are a pair, and excluded. p_scalars: s, s° and the shift of the gaps.
    p_row_stats: [chunks, NUM_STATS, strip rows]; p_column_stats: [row blocks, NUM_STATS, m]. Statistics, in this order:
    PLAIN student (max, sum), MASKED student (max, sum; without entries of equal groups), TEACHER (max, sum, sum of exp
    times S° - S - shift). WRITE_CACHE: the tiles are stored in p_cache and p_teacher_cache, see `kept.py`.
    """
    i_block, i_chunk = tl.program_id(0), tl.program_id(1)
    o_row = strip_start + i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    b_scale = tl.load(p_scalars)  # []
    b_zero = tl.zeros([BLOCK_M], tl.float32)  # [M]
    b_max, b_masked_max, b_teacher_max = b_zero + LOWEST, b_zero + LOWEST, b_zero + LOWEST
    b_sum, b_masked_sum, b_teacher_sum, b_gap = b_zero, b_zero, b_zero, b_zero
    first = i_chunk * tiles_per_chunk * BLOCK_N
    last = tl.minimum(first + tiles_per_chunk * BLOCK_N, m)
    for i_column in range(first, last, BLOCK_N):
        b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap = stats_tile(
            b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row,
            i_column + tl.arange(0, BLOCK_N), i_block, p_image, p_text, p_teacher_image, p_teacher_text,
            p_row_group, p_column_group, b_scale, p_scalars, p_column_stats, p_cache, p_teacher_cache, strip_stop, n, m,
            pair_offset, width, teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text,
            PLAIN, MASKED, TEACHER, NUM_STATS, WRITE_CACHE, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_K_TEACHER,
            PRECISION,
        )  # fmt: skip
    store_rows(
        p_row_stats, b_max, b_sum, b_masked_max, b_masked_sum, b_teacher_max, b_teacher_sum, b_gap, o_row, i_chunk,
        strip_start, strip_stop, PLAIN, MASKED, TEACHER, NUM_STATS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "positions", "parts"])
def merge_kernel(
    p_parts, p_stats, n, start, positions, parts,
    FRESH: tl.constexpr, STUDENTS: tl.constexpr, TEACHER: tl.constexpr, NUM_STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge parts [parts, NUM_STATS, positions] into p_stats [NUM_STATS, n] from position `start` on, always in order.

    FRESH: p_stats is uninitialised. STUDENTS: the number of (max, sum) pairs before the teacher's three statistics.
    """
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_n = o_n < positions
    for i_kind in tl.static_range(STUDENTS + TEACHER):  # the teacher's is the last and has a gap
        p_kind = p_stats + (start + o_n + 2 * i_kind * n)
        b_max = tl.zeros([BLOCK], tl.float32) + LOWEST
        b_sum, b_gap = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if not FRESH:
            b_max = tl.load(p_kind, mask=m_n, other=LOWEST)
            b_sum = tl.load(p_kind + n, mask=m_n, other=0.0)
            if i_kind == STUDENTS:
                b_gap = tl.load(p_kind + 2 * n, mask=m_n, other=0.0)
        for i_part in range(parts):
            p_part = p_parts + tl.cast(i_part, tl.int64) * NUM_STATS * positions + 2 * i_kind * positions + o_n
            b_part_max = tl.load(p_part, mask=m_n, other=LOWEST)
            b_part_sum = tl.load(p_part + positions, mask=m_n, other=0.0)
            b_part_gap = b_part_sum
            if i_kind == STUDENTS:
                b_part_gap = tl.load(p_part + 2 * positions, mask=m_n, other=0.0)
            b_max, b_sum, b_gap = merge_parts(b_max, b_sum, b_gap, b_part_max, b_part_sum, b_part_gap)
        tl.store(p_kind, b_max, mask=m_n)
        tl.store(p_kind + n, b_sum, mask=m_n)
        if i_kind == STUDENTS:
            tl.store(p_kind + 2 * n, b_gap, mask=m_n)


@triton.jit
def pair_dot_kernel(
    p_left, p_right, p_out, n, width, stride_left, stride_right,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[i] = <left_i, right_i> in float32."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    m_row = o_row < n
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)  # [K]
        m_k = (o_k < width)[None, :]  # [1, K]
        b_left = tl.load(p_left + (o_safe_row * stride_left)[:, None] + o_k[None, :], mask=m_k, other=0.0)  # [M, K]
        b_right = tl.load(p_right + (o_safe_row * stride_right)[:, None] + o_k[None, :], mask=m_k, other=0.0)
        b_sum += tl.sum(b_left.to(tl.float32) * b_right.to(tl.float32), 1)
    tl.store(p_out + o_row, b_sum, mask=m_row)


def forward_stats(
    operands: Operands, config: Config, strip_rows: int, cache: Tensor, comparison: Comparison | None = None
) -> Stats:
    """Return the statistics of a sweep; fills `cache`, uint8. strip_rows: see `Operands.strips`.

    comparison: of the calibrated loss, whose edit the statistics then follow, but not the entries of pairs.
    """
    diagonal, teacher_diagonal, shift = _diagonals(operands)
    if comparison is not None:
        shift = _shift(operands, comparison)
    rows, columns = _off_diagonal(operands, operands.scalars(shift), config, strip_rows, cache, comparison)
    return Stats(rows, columns, diagonal, teacher_diagonal, shift)


def _diagonals(operands: Operands) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the entries of the pairs in S and in S°, [n] each, and the shift of the gaps, []; None where absent."""
    paired = operands.pair_offset < operands.m
    # The shift may be any constant. An entry keeps the gaps small, and so exact, where S° - S hardly varies.
    left, right = slice(1), slice(1)
    if paired:
        left, right = slice(None), slice(operands.pair_offset, operands.pair_offset + operands.n)
    student = teacher = shift = None
    if paired or operands.teacher:
        student = _pair_dot(operands.image[left], operands.text[right], operands.scale)
    if operands.teacher_image is not None and operands.teacher_text is not None and operands.teacher_scale is not None:
        assert student is not None
        teacher = _pair_dot(operands.teacher_image[left], operands.teacher_text[right], operands.teacher_scale)
        shift = teacher[0] - student[0]
    return (student, teacher, shift) if paired else (None, None, shift)


def _shift(operands: Operands, comparison: Comparison) -> Tensor:
    """Return the shift of the gaps for an edited S°: not that of a pair, which may be edited where most are not."""
    teacher_image, teacher_text, teacher_scale = operands.teacher_image, operands.teacher_text, operands.teacher_scale
    assert teacher_image is not None and teacher_text is not None and teacher_scale is not None
    student = _pair_dot(operands.image[:1], operands.text[-1:], operands.scale)
    teacher = _pair_dot(teacher_image[:1], teacher_text[-1:], teacher_scale)
    return edited_entry(comparison.edit, 0, -1, teacher[0], teacher_scale) - student[0]


def _pair_dot(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Return scale <left_i, right_i>, float32 [n]."""
    n, width = left.shape
    out = scale.new_empty(n)
    block_m, block_k = 16, min(256, triton.next_power_of_2(width))
    pair_dot_kernel[(triton.cdiv(n, block_m),)](
        left, right, out, n, width, left.stride(0), right.stride(0), BLOCK_M=block_m, BLOCK_K=block_k, **OPTIONS
    )
    return out.mul_(scale)


def _off_diagonal(
    operands: Operands, scalars: Tensor, config: Config, strip_rows: int, cache: Tensor, comparison: Comparison | None
) -> tuple[Tensor, Tensor]:
    """Return the statistics of rows, [num_stats, n], and of columns, [num_stats, m]."""
    n, m, num_stats = operands.n, operands.m, operands.num_stats
    rows, columns = scalars.new_empty(num_stats, n), scalars.new_empty(num_stats, m)
    tiles = triton.cdiv(m, config.block_n)
    cached_rows = operands.cached_rows(cache)
    constants = operands.constants(config)
    buffer = scalars.new_empty(0)  # one for all strips: two would be alive at a time
    for start, stop in operands.strips(4 * num_stats * m / config.block_m, config, strip_rows, cached_rows):
        blocks = triton.cdiv(stop - start, config.block_m)
        tiles_per_chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
        chunks = triton.cdiv(tiles, tiles_per_chunk)
        row_parts = scalars.new_empty(chunks, num_stats, stop - start)
        if len(buffer) < blocks * num_stats * m:
            buffer = scalars.new_empty(blocks * num_stats * m)
        column_parts = buffer[: blocks * num_stats * m].view(blocks, num_stats, m)
        shares = config.shared and comparison is None
        missing = scalars.new_empty(blocks, tiles, dtype=torch.int32) if shares else None
        arguments = (
            *operands.features(), *operands.groups, scalars, row_parts, column_parts,
            *(() if missing is None else (missing,)), *operands.cached_tiles(cache), start, stop, n, m,
            operands.pair_offset, *operands.widths(), tiles_per_chunk, *operands.strides(),
        )  # fmt: skip
        constants = {**constants, "NUM_STATS": num_stats, "WRITE_CACHE": operands.kept_form(cache, start)}
        if missing is not None:
            shared_forward_kernel[(blocks, chunks)](*arguments, SAME_WIDTH=operands.same_width, **constants)
            group = max(1, CHECKED_COLUMNS // config.block_n)
            check_kernel[(blocks, triton.cdiv(tiles, group))](
                column_parts, missing, m, NUM_STATS=num_stats, BLOCK_N=config.block_n, TILES=group, **OPTIONS
            )
            repair_kernel[(blocks, chunks)](*arguments, CHUNK=triton.next_power_of_2(tiles_per_chunk), **constants)
        elif comparison is not None:
            comparison.launch((blocks, chunks), arguments, constants)
        else:
            forward_kernel[(blocks, chunks)](*arguments, **constants)
        _merge_into(rows, row_parts, start, operands, fresh=True)
        _merge_into(columns, column_parts, 0, operands, fresh=start == 0)
    return rows, columns


def _merge_into(stats: Tensor, parts: Tensor, start: int, operands: Operands, fresh: bool) -> None:
    """Merge parts [parts, num_stats, positions] into stats [num_stats, n or m], from position `start` on."""
    count, num_stats, positions = parts.shape
    merge_kernel[(triton.cdiv(positions, _MERGE_BLOCK),)](
        parts, stats, stats.shape[1], start, positions, count, FRESH=fresh,
        STUDENTS=operands.plain + operands.masked, TEACHER=int(operands.teacher), NUM_STATS=num_stats,
        BLOCK=_MERGE_BLOCK, **OPTIONS,
    )  # fmt: skip
