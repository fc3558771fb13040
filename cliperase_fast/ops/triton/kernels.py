"""The Triton kernels of the sweep: a tile of S and S° is formed once and used for everything.

Logits are in natural units, and only their differences go over to those of exp2, which is the hardware's: a large
logit that is multiplied by log2(e) is rounded again, and an anchor made of it no longer meets it. Names: b_ a block of
values, p_ a pointer, o_ an offset, m_ a mask, i_ an index. What the numbers mean (d, r, anchors, factors) is said in
`ops/spec.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for log 0: finite, so that no difference is NaN, and far below every logit.
_LOWEST = tl.constexpr(-1.0e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Triton's interpreter multiplies the bits of bfloat16 as integers; in float32 the products are the same.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _similarity_tile(
    p_left, p_right, o_left, o_right, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<left_i, right_j> for a tile of rows and columns, accumulated in float32. o_left, o_right: int64 row offsets."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        p_l = p_left + o_left[:, None] + o_k[None, :]  # [M, K]
        p_r = p_right + o_right[None, :] + o_k[:, None]  # [K, N]
        if EVEN_K:
            b_left, b_right = tl.load(p_l), tl.load(p_r)
        else:
            m_k = o_k < width
            b_left = tl.load(p_l, mask=m_k[None, :], other=0.0)
            b_right = tl.load(p_r, mask=m_k[:, None], other=0.0)
        if _INTERPRETED:
            b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    return b_sum  # [M, N]


@triton.jit
def _exp(b_x):
    return tl.exp2(b_x * _LOG2_E)


@triton.jit
def _merge(b_max, b_sum, b_gap, b_more_max, b_more_sum, b_more_gap):
    """Two partial (maximum, sum of exp, sum of exp times gap) become one."""
    b_new = tl.maximum(b_max, b_more_max)
    b_keep, b_add = _exp(b_max - b_new), _exp(b_more_max - b_new)
    return b_new, b_sum * b_keep + b_more_sum * b_add, b_gap * b_keep + b_more_gap * b_add


@triton.jit
def _along(b_tile, b_gap, AXIS: tl.constexpr, HAS_GAP: tl.constexpr):
    """Partial (maximum, sum, gap) of a tile's rows (AXIS 1) or columns (AXIS 0)."""
    b_max = tl.max(b_tile, AXIS)
    b_exp = _exp(b_tile - tl.expand_dims(b_max, AXIS))
    b_sum = tl.sum(b_exp, AXIS)
    if HAS_GAP:
        return b_max, b_sum, tl.sum(b_exp * b_gap, AXIS)
    return b_max, b_sum, b_sum


@triton.jit
def _store(p_partial, o_partial, m_partial, n, b_max, b_sum, b_gap, KIND: tl.constexpr, HAS_GAP: tl.constexpr):
    """Into planes KIND, KIND + 1 (and KIND + 2) of a [planes, n] array."""
    p_plane = p_partial + o_partial + KIND * n
    tl.store(p_plane, b_max, mask=m_partial)
    tl.store(p_plane + n, b_sum, mask=m_partial)
    if HAS_GAP:
        tl.store(p_plane + 2 * n, b_gap, mask=m_partial)


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "offset", "tiles_per_chunk"])
def forward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_row, p_column,
    p_kept, p_kept_teacher, strip_start, strip_stop, n, m, offset, width, teacher_width, tiles_per_chunk,
    stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, PLANES: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Off-diagonal statistics of a strip of rows: of each row in a chunk of columns, of each column in a block of rows.

    p_scalars: s, s° and the gap's shift. p_row: [chunks, PLANES, strip rows]; p_column: [row blocks,
    PLANES, m]. Row i and column i + offset are a pair. Planes, in this order and as far as asked for: PLAIN student
    (max, sum), MASKED student (max, sum; pairs of one group left out), TEACHER (max, sum, sum of exp times
    S° - S - shift). KEEP: the tiles themselves go to p_kept and p_kept_teacher, [kept rows, m].
    """
    i_block, i_chunk = tl.program_id(0), tl.program_id(1)
    o_row = strip_start + i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < strip_stop
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    b_scale = tl.load(p_scalars)
    o_image = o_safe_row * stride_image
    if MASKED:
        b_row_group = tl.load(p_row_group + o_safe_row)
    if TEACHER:
        b_teacher_scale = tl.load(p_scalars + 1)
        b_shift = tl.load(p_scalars + 2)
        o_teacher_image = o_safe_row * stride_teacher_image

    b_zero = tl.zeros([BLOCK_M], tl.float32)
    b_max, b_sum, b_no_gap = b_zero + _LOWEST, b_zero, b_zero
    b_masked_max, b_masked_sum = b_zero + _LOWEST, b_zero
    b_teacher_max, b_teacher_sum, b_gap = b_zero + _LOWEST, b_zero, b_zero

    first = i_chunk * tiles_per_chunk * BLOCK_N
    last = tl.minimum(first + tiles_per_chunk * BLOCK_N, m)
    for i_column in range(first, last, BLOCK_N):
        o_column = i_column + tl.arange(0, BLOCK_N)
        m_column = o_column < m
        o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)
        b_s = _similarity_tile(
            p_image, p_text, o_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        ) * b_scale  # fmt: skip
        m_tile = m_row[:, None] & m_column[None, :]
        m_off = m_tile & (o_row[:, None] + offset != o_column[None, :])
        if KEEP:
            o_kept = o_safe_row[:, None] * m + o_column[None, :]
            tl.store(p_kept + o_kept, b_s, mask=m_tile)
        # Partials of columns: [row blocks, PLANES, m]
        o_partial = i_block.to(tl.int64) * PLANES * m + o_column
        b_tile_gap = b_s
        if TEACHER:
            b_t = _similarity_tile(
                p_teacher_image, p_teacher_text, o_teacher_image, o_safe_column * stride_teacher_text, teacher_width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
            ) * b_teacher_scale  # fmt: skip
            if KEEP:
                tl.store(p_kept_teacher + o_kept, b_t, mask=m_tile)
            b_tile_gap = tl.where(m_off, b_t - b_s - b_shift, 0.0)
            b_t = tl.where(m_off, b_t, _LOWEST)
            b_part_max, b_part_sum, b_part_gap = _along(b_t, b_tile_gap, 1, True)
            b_teacher_max, b_teacher_sum, b_gap = _merge(
                b_teacher_max, b_teacher_sum, b_gap, b_part_max, b_part_sum, b_part_gap
            )
            b_part_max, b_part_sum, b_part_gap = _along(b_t, b_tile_gap, 0, True)
            _store(p_column, o_partial, m_column, m, b_part_max, b_part_sum, b_part_gap, 2 * PLAIN + 2 * MASKED, True)
        b_s = tl.where(m_off, b_s, _LOWEST)
        if PLAIN:
            b_part_max, b_part_sum, b_part_gap = _along(b_s, b_s, 1, False)
            b_max, b_sum, b_no_gap = _merge(b_max, b_sum, b_no_gap, b_part_max, b_part_sum, b_no_gap)
            b_part_max, b_part_sum, b_part_gap = _along(b_s, b_s, 0, False)
            _store(p_column, o_partial, m_column, m, b_part_max, b_part_sum, b_part_gap, 0, False)
        if MASKED:
            b_column_group = tl.load(p_column_group + o_safe_column)
            b_s = tl.where(b_row_group[:, None] == b_column_group[None, :], _LOWEST, b_s)
            b_part_max, b_part_sum, b_part_gap = _along(b_s, b_s, 1, False)
            b_masked_max, b_masked_sum, b_no_gap = _merge(
                b_masked_max, b_masked_sum, b_no_gap, b_part_max, b_part_sum, b_no_gap
            )
            b_part_max, b_part_sum, b_part_gap = _along(b_s, b_s, 0, False)
            _store(p_column, o_partial, m_column, m, b_part_max, b_part_sum, b_part_gap, 2 * PLAIN, False)

    rows = strip_stop - strip_start
    o_partial = i_chunk.to(tl.int64) * PLANES * rows + (o_row - strip_start)
    if PLAIN:
        _store(p_row, o_partial, m_row, rows, b_max, b_sum, b_sum, 0, False)
    if MASKED:
        _store(p_row, o_partial, m_row, rows, b_masked_max, b_masked_sum, b_sum, 2 * PLAIN, False)
    if TEACHER:
        _store(p_row, o_partial, m_row, rows, b_teacher_max, b_teacher_sum, b_gap, 2 * PLAIN + 2 * MASKED, True)


@triton.jit(do_not_specialize=["first", "positions", "parts"])
def merge_kernel(
    p_partial, p_merged, n, first, positions, parts,
    FRESH: tl.constexpr, STUDENTS: tl.constexpr, TEACHER: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge partials [parts, PLANES, positions] into p_merged [PLANES, n] from column `first` on, always in one order.

    FRESH: p_merged holds nothing yet. STUDENTS: how many (max, sum) pairs of planes come before the teacher's three.
    """
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < positions
    for i_kind in tl.static_range(STUDENTS + TEACHER):  # the teacher's is the last and has a gap
        p_kind = p_merged + (first + o_n + 2 * i_kind * n)
        b_max = tl.zeros([BLOCK], tl.float32) + _LOWEST
        b_sum, b_gap = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if not FRESH:
            b_max = tl.load(p_kind, mask=m_n, other=_LOWEST)
            b_sum = tl.load(p_kind + n, mask=m_n, other=0.0)
            if i_kind == STUDENTS:
                b_gap = tl.load(p_kind + 2 * n, mask=m_n, other=0.0)
        for i_part in range(parts):
            p_part = p_partial + tl.cast(i_part, tl.int64) * PLANES * positions + 2 * i_kind * positions + o_n
            b_part_max = tl.load(p_part, mask=m_n, other=_LOWEST)
            b_part_sum = tl.load(p_part + positions, mask=m_n, other=0.0)
            b_part_gap = b_part_sum
            if i_kind == STUDENTS:
                b_part_gap = tl.load(p_part + 2 * positions, mask=m_n, other=0.0)
            b_max, b_sum, b_gap = _merge(b_max, b_sum, b_gap, b_part_max, b_part_sum, b_part_gap)
        tl.store(p_kind, b_max, mask=m_n)
        tl.store(p_kind + n, b_sum, mask=m_n)
        if i_kind == STUDENTS:
            tl.store(p_kind + 2 * n, b_gap, mask=m_n)


@triton.jit
def _tile_of_program(
    strip_start, strip_stop, m, GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Rows and columns of this program's tile of a strip of dS.

    Programs of GROUP_ROWS row blocks walk the columns together, so that their text tiles are read from the cache.
    """
    blocks_m, blocks_n = tl.cdiv(strip_stop - strip_start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    i_program = tl.program_id(0)
    i_group = i_program // (GROUP_ROWS * blocks_n)
    rows_here = tl.minimum(blocks_m - i_group * GROUP_ROWS, GROUP_ROWS)
    i_row = i_group * GROUP_ROWS + (i_program % (GROUP_ROWS * blocks_n)) % rows_here
    i_column = (i_program % (GROUP_ROWS * blocks_n)) // rows_here
    o_row = strip_start + i_row * BLOCK_M + tl.arange(0, BLOCK_M)
    return o_row, i_column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _store_gradient(p_strip, b_gradient, o_row_in_strip, o_column, m, m_tile):
    """A tile of dS into the strip [strip rows, m], in its dtype."""
    if p_strip.dtype.element_ty != tl.float32:
        b_gradient = b_gradient.to(p_strip.dtype.element_ty, fp_downcast_rounding="rtne")
    tl.store(p_strip + o_row_in_strip.to(tl.int64)[:, None] * m + o_column[None, :], b_gradient, mask=m_tile)


@triton.jit
def _softmax_gradient(b_tile, p_softmax, o_row, m_row, o_column, m_column, n, m):
    """Row softmax plus column softmax of a tile, each with its weight: row anchors [n] and factors [n], then column
    anchors [m] and factors [m]."""
    b_row_anchor = tl.load(p_softmax + o_row, mask=m_row, other=0.0)
    b_column_anchor = tl.load(p_softmax + 2 * n + o_column, mask=m_column, other=0.0)
    b_row_factor = tl.load(p_softmax + n + o_row, mask=m_row, other=0.0)
    b_column_factor = tl.load(p_softmax + 2 * n + m + o_column, mask=m_column, other=0.0)
    b_row = _exp(b_tile - b_row_anchor[:, None]) * b_row_factor[:, None]
    return b_row + _exp(b_tile - b_column_anchor[None, :]) * b_column_factor[None, :]


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "offset"])
def backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_strip, p_kept, p_kept_teacher, strip_start, strip_stop, n, m, offset, width, teacher_width,
    stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, KEPT: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of dL/dS (up to one common factor) in p_strip's dtype, [strip rows, m], all terms together.

    p_softmax: [PLAIN + MASKED + TEACHER, 2 n + 2 m], see `_softmax_gradient`; p_diagonal: [n], the own gradient of the
    pairs, row i and column i + offset.
    KEPT: the tiles of S and S° are read where the forward kernel has put them.
    """
    o_row, o_column = _tile_of_program(strip_start, strip_stop, m, GROUP_ROWS, BLOCK_M, BLOCK_N)
    m_row, m_column = o_row < strip_stop, o_column < m
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)

    m_tile = m_row[:, None] & m_column[None, :]
    if KEPT:
        o_kept = o_safe_row[:, None] * m + o_column[None, :]
        b_s = tl.load(p_kept + o_kept, mask=m_tile, other=0.0)
    else:
        b_s = _similarity_tile(
            p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        ) * tl.load(p_scalars)  # fmt: skip
    b_gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PLAIN:
        b_gradient = _softmax_gradient(b_s, p_softmax, o_row, m_row, o_column, m_column, n, m)
    if MASKED:
        b_row_group, b_column_group = tl.load(p_row_group + o_safe_row), tl.load(p_column_group + o_safe_column)
        b_masked = _softmax_gradient(b_s, p_softmax + PLAIN * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m)
        b_gradient += tl.where(b_row_group[:, None] == b_column_group[None, :], 0.0, b_masked)
    if TEACHER:
        if KEPT:
            b_t = tl.load(p_kept_teacher + o_kept, mask=m_tile, other=0.0)
        else:
            b_t = _similarity_tile(
                p_teacher_image, p_teacher_text, o_safe_row * stride_teacher_image,
                o_safe_column * stride_teacher_text, teacher_width,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K_TEACHER, PRECISION,
            ) * tl.load(p_scalars + 1)  # fmt: skip
        b_gradient += _softmax_gradient(
            b_t, p_softmax + (PLAIN + MASKED) * (2 * n + 2 * m), o_row, m_row, o_column, m_column, n, m
        )
    b_diagonal = tl.load(p_diagonal + o_row, mask=m_row, other=0.0)
    b_gradient = tl.where(o_row[:, None] + offset == o_column[None, :], b_diagonal[:, None], b_gradient)
    _store_gradient(p_strip, b_gradient, o_row - strip_start, o_column, m, m_tile)


@triton.jit
def _softplus(b_y):
    """log(1 + exp(y)), and its slope 1 / (1 + exp(-y)).

    e = exp(-|y|) overflows nothing; log(1 + e) = 2 artanh(z), z = e / (2 + e) <= 1/3, keeps its digits where e is tiny.
    artanh(z) = z (1 + z² q(z²)), q a least-squares fit of degree 3, to 5e-9 of the whole.
    """
    b_e = tl.exp2(-tl.abs(b_y) * _LOG2_E)
    b_z = b_e / (2 + b_e)
    b_t = b_z * b_z
    b_q = 0.333332082 + b_t * (0.200107606 + b_t * (0.140009576 + b_t * 0.14005699))
    b_slope = 1 / (1 + b_e)
    return tl.maximum(b_y, 0.0) + 2 * (b_z + b_z * b_t * b_q), tl.where(b_y < 0, b_e * b_slope, b_slope)


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "offset"])
def sigmoid_kernel(
    p_image, p_text, p_scalars, p_sums, p_strip, strip_start, strip_stop, n, m, offset, width, stride_image,
    stride_text, GRADIENT: tl.constexpr, GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the losses' sum, and with GRADIENT of dS and its sum. Row i and column i + offset are a pair.

    p_scalars: s, b and the factor of dS in p_strip, [strip rows, m]. p_sums: [2, programs], of the loss and of dS.
    """
    o_row, o_column = _tile_of_program(strip_start, strip_stop, m, GROUP_ROWS, BLOCK_M, BLOCK_N)
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)
    m_tile = (o_row < strip_stop)[:, None] & (o_column < m)[None, :]
    m_pair = o_row[:, None] + offset == o_column[None, :]
    b_x = _similarity_tile(
        p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    ) * tl.load(p_scalars) + tl.load(p_scalars + 1)  # fmt: skip
    b_loss, b_slope = _softplus(tl.where(m_pair, -b_x, b_x))
    p_sum = p_sums + tl.program_id(0)
    tl.store(p_sum, tl.sum(tl.where(m_tile, b_loss, 0.0)))
    if GRADIENT:
        b_gradient = tl.where(m_tile, tl.where(m_pair, -b_slope, b_slope), 0.0)
        tl.store(p_sum + tl.num_programs(0), tl.sum(b_gradient))
        b_gradient *= tl.load(p_scalars + 2)
        _store_gradient(p_strip, b_gradient, o_row - strip_start, o_column, m, m_tile)


@triton.jit
def pair_dot_kernel(
    p_left, p_right, p_out, n, width, stride_left, stride_right,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[i] = <left_i, right_i> in float32."""
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < n
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = (o_k < width)[None, :]
        b_left = tl.load(p_left + (o_safe_row * stride_left)[:, None] + o_k[None, :], mask=m_k, other=0.0)
        b_right = tl.load(p_right + (o_safe_row * stride_right)[:, None] + o_k[None, :], mask=m_k, other=0.0)
        b_sum += tl.sum(b_left.to(tl.float32) * b_right.to(tl.float32), 1)
    tl.store(p_out + o_row, b_sum, mask=m_row)


@triton.jit
def _expm1(b_x):
    """exp(x) - 1; the series near 0, where the difference would lose its digits."""
    b_series = b_x * (1 + b_x * (1 / 2 + b_x * (1 / 6 + b_x * (1 / 24 + b_x * (1 / 120 + b_x * (1 / 720))))))
    return tl.where(tl.abs(b_x) < 0.3, b_series, tl.exp2(b_x * _LOG2_E) - 1)


@triton.jit
def _excess(b_x):
    """exp(x) - 1 - x, likewise."""
    b_inner = 1 / 24 + b_x * (1 / 120 + b_x * (1 / 720 + b_x * (1 / 5040)))
    b_series = b_x * b_x * (1 / 2 + b_x * (1 / 6 + b_x * b_inner))
    return tl.where(tl.abs(b_x) < 0.3, b_series, tl.exp2(b_x * _LOG2_E) - 1 - b_x)


@triton.jit
def features_kl_kernel(
    p_student, p_teacher, p_kl, p_gradient, p_weight, n, width,
    stride_student, stride_student_k, stride_teacher, stride_teacher_k,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL of the softmaxes over the width, kl[i] of ROWS rows a program; BACKWARD: weight times its gradient [n, width].

    With the gaps g_j = x°_j - x_j, E the mean under p° = softmax(x°) and c_j = g_j - E[g],

        KL(p° || p) = E[g] + log E[exp(-g)] = log(1 + E[exp(-c) - 1 + c])

    where every term of the last mean is positive: nothing cancels, though KLs of normalised features are tiny. The
    gradient with respect to x_j is p_j - p°_j = p°_j (exp(-c_j - KL) - 1). Both overflow, and p° underflows,
    where the two are far apart; there stand E[g] + log Σ exp(x) - log Σ exp(x°) and p_j - p°_j.
    """
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = tl.arange(0, BLOCK).to(tl.int64)
    m_k = (o_k < width)[None, :]
    m_tile = m_k & (o_row < n)[:, None]
    p_s = p_student + o_row[:, None] * stride_student + (o_k * stride_student_k)[None, :]
    p_t = p_teacher + o_row[:, None] * stride_teacher + (o_k * stride_teacher_k)[None, :]
    b_s = tl.load(p_s, mask=m_tile, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_student_max = tl.max(tl.where(m_k, b_s, float("-inf")), 1)
    b_student_total = tl.sum(tl.where(m_k, _exp(b_s - b_student_max[:, None]), 0.0), 1)
    b_t = tl.load(p_t, mask=m_tile, other=0.0).to(tl.float32)
    b_max = tl.max(tl.where(m_k, b_t, float("-inf")), 1)
    b_exp = tl.where(m_k, _exp(b_t - b_max[:, None]), 0.0)
    b_total = tl.sum(b_exp, 1)
    b_p = b_exp / b_total[:, None]
    b_gap = b_t - b_s
    b_mean_gap = tl.sum(b_p * b_gap, 1)
    b_c = b_gap - b_mean_gap[:, None]
    # a term so small that its weight vanishes in float32 may be infinite: its product is 0, not NaN
    b_mean = tl.sum(tl.where(b_p > 0, b_p * _excess(-b_c), 0.0), 1)
    # log(1 + mean), the mean's digits kept where it is small: log(u) mean / (u - 1) with u the rounded 1 + mean
    b_u = 1 + b_mean
    b_kl = tl.where(b_u == 1, b_mean, tl.log(b_u) * (b_mean / tl.where(b_u == 1, 1.0, b_u - 1)))
    b_plain = b_mean_gap + (b_student_max - b_max) + (tl.log(b_student_total) - tl.log(b_total))
    b_kl = tl.where(tl.max(tl.where(m_k, tl.abs(b_c), 0.0), 1) < 40, b_kl, b_plain)
    if BACKWARD:
        b_apart = -b_c - b_kl[:, None]
        # loaded again: to hold it from above takes more registers than there are
        b_again = tl.load(p_s, mask=m_tile, other=0.0).to(tl.float32)
        b_student_p = _exp(b_again - b_student_max[:, None]) / b_student_total[:, None]
        b_change = tl.where(tl.abs(b_apart) < 1, b_p * _expm1(b_apart), b_student_p - b_p)
        b_gradient = tl.load(p_weight) * b_change
        p_out = p_gradient + o_row[:, None] * width + o_k[None, :]
        tl.store(p_out, b_gradient.to(p_gradient.dtype.element_ty), mask=m_tile)
    else:
        tl.store(p_kl + o_row, b_kl, mask=o_row < n)
