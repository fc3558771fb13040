"""The backward pass: a strip of dS at a time, in the dtype of the features, and the gradients from it.

dI = s dS T and dT = s dSᵀ I, where dT is accumulated in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.matmul import add_product, product
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


@triton.jit(do_not_specialize=["strip_start", "strip_stop", "pair_offset"])
def backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_strip, p_cache, p_teacher_cache, strip_start, strip_stop, n, m, pair_offset, width, teacher_width,
    stride_image, stride_text, stride_teacher_image, stride_teacher_text,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, READ_CACHE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of dL/dS (up to one common factor), all terms together, into p_strip [strip rows, m], in its dtype.

    Row i and column i + pair_offset are a pair. p_softmax: [PLAIN + MASKED + TEACHER, 2 n + 2 m], see
    `_softmax_gradient`; p_diagonal: [n], dS of the pairs. READ_CACHE: the tiles of S and S° are read from where the
    forward kernel has stored them.
    """
    o_row, o_column = tile_of_program(strip_start, strip_stop, m, GROUP_ROWS, BLOCK_M, BLOCK_N)  # [M], [N]
    m_row, m_column = o_row < strip_stop, o_column < m
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
    store_gradient(p_strip, b_gradient, o_row - strip_start, o_column, m, m_tile)


def gradients(
    inputs: SimilarityInputs,
    operands: Operands,
    config: Config,
    saved: SavedStats,
    weights: Weights,
    need: Need,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of image, text and scale, see `ops.spec.SweepKernels.backward`."""
    image, text, n, m = operands.image, operands.text, operands.n, operands.m
    softmaxes, diagonal, unit = unit_terms(
        inputs, saved, Weights(weights.retention.float(), weights.consistency.float()),
        loss_scale=2.0**13 if image.dtype == torch.float16 else 1.0,
    )  # fmt: skip
    scalars = operands.scalars(unit)  # the shift is not used here
    image_dtype, text_dtype, scale_dtype = inputs.image.dtype, inputs.text.dtype, inputs.scale.dtype
    if partial:
        image_dtype = text_dtype = scale_dtype = torch.float32
    grad_image = image.new_empty(image.shape if need.image else (0,), dtype=image_dtype)
    grad_text = diagonal.new_zeros(text.shape if need.text else (0,))
    grad_scale = diagonal.new_zeros(())
    strip = image.new_empty(0, m)
    cached_rows = operands.cached_rows(saved.cache)
    for start, stop in operands.strips(m * image.itemsize, config, inputs.strip_rows, cached_rows):
        if len(strip) < stop - start:
            strip = image.new_empty(stop - start, m)
        rows = strip[: stop - start]  # [h, m]
        backward_kernel[(triton.cdiv(stop - start, config.block_m) * triton.cdiv(m, config.block_n),)](
            *operands.features(), *operands.groups, scalars, softmaxes, diagonal, rows,
            *operands.cached_tiles(saved.cache), start, stop, n, m, operands.pair_offset, *operands.widths(),
            *operands.strides(), GROUP_ROWS=GROUP_ROWS, READ_CACHE=start < cached_rows, **operands.constants(config),
        )  # fmt: skip
        image_rows = image[start:stop]
        if need.image or need.scale:
            towards_text = product(rows, text)  # [h, D]
            if need.scale:  # before the factor s, which may be 0
                grad_scale += (towards_text * image_rows).sum()
            if need.image:
                grad_image[start:stop] = towards_text.mul_(unit * operands.scale)
        if need.text:
            add_product(grad_text, rows.T, image_rows)
    grad_text = grad_text.mul_(unit * operands.scale).to(text_dtype)
    return grad_image, grad_text, (grad_scale * unit).to(scale_dtype)
