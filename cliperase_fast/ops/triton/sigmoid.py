"""The sigmoid loss of the backend "triton": one kernel forms a tile of S, sums its losses and stores dS.

A block of dS is formed in the dtype of the features, within the memory for strips, and multiplied by the features as in
the sweep. Sums of tiles are added in a fixed order, without atomics. No n x m tensor, no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cliperase_fast.ops.blocks import FeatureGradients, in_blocks
from cliperase_fast.ops.sigmoid import SigmoidParts, as_sigmoid
from cliperase_fast.ops.spec import Need, SimilarityInputs
from cliperase_fast.ops.triton.sweep import choose_configs
from cliperase_fast.ops.triton.tiles import (
    GROUP_ROWS,
    LOG2_E,
    Operands,
    similarity_tile,
    store_gradient,
    tile_of_program,
)

# dS lies between -1 and 1, mostly near 0: float16 would lose small entries without a factor.
_FLOAT16_LOSS_SCALE = 2.0**13


@triton.jit
def _softplus(b_y):
    """Return log(1 + exp(y)) and its slope 1 / (1 + exp(-y)).

    e = exp(-|y|) does not overflow; log(1 + e) = 2 artanh(z), z = e / (2 + e) <= 1/3, is exact where e is tiny.
    artanh(z) = z (1 + z² q(z²)), q a least-squares fit of degree 3, to 5e-9 of the whole.
    """
    b_e = tl.exp2(-tl.abs(b_y) * LOG2_E)
    b_z = b_e / (2 + b_e)
    b_t = b_z * b_z
    b_q = 0.333332082 + b_t * (0.200107606 + b_t * (0.140009576 + b_t * 0.14005699))
    b_slope = 1 / (1 + b_e)
    return tl.maximum(b_y, 0.0) + 2 * (b_z + b_z * b_t * b_q), tl.where(b_y < 0, b_e * b_slope, b_slope)


@triton.jit(do_not_specialize=["row_stop", "column_stop", "pair_offset"])
def sigmoid_kernel(
    p_image, p_text, p_scalars, p_sums, p_block, row_start, row_stop, column_start, column_stop, n, m, pair_offset,
    width, stride_image, stride_text, stride_block, GRADIENT: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of a tile's losses and, with GRADIENT, its dS and the sum of that.

    Row i and column i + pair_offset are a pair. p_scalars: s, b and the factor of dS in p_block [rows, stride_block].
    p_sums: [2, programs], of the losses and of dS.
    """
    i_row, i_column = tile_of_program(row_stop - row_start, column_stop - column_start, GROUP_ROWS, BLOCK_M, BLOCK_N)
    o_row = row_start + i_row * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    o_column = column_start + i_column * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    o_safe_row = tl.minimum(o_row, n - 1).to(tl.int64)  # beyond the end: the last row again, masked below
    o_safe_column = tl.minimum(o_column, m - 1).to(tl.int64)
    m_tile = (o_row < n)[:, None] & (o_column < m)[None, :]  # [M, N]
    m_pair = o_row[:, None] + pair_offset == o_column[None, :]  # [M, N]
    b_x = similarity_tile(
        p_image, p_text, o_safe_row * stride_image, o_safe_column * stride_text, width,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    ) * tl.load(p_scalars) + tl.load(p_scalars + 1)  # [M, N]  # fmt: skip
    b_loss, b_slope = _softplus(tl.where(m_pair, -b_x, b_x))  # [M, N]
    p_sum = p_sums + tl.program_id(0)
    tl.store(p_sum, tl.sum(tl.where(m_tile, b_loss, 0.0)))
    if GRADIENT:
        b_gradient = tl.where(m_tile, tl.where(m_pair, -b_slope, b_slope), 0.0)  # [M, N]
        tl.store(p_sum + tl.num_programs(0), tl.sum(b_gradient))
        b_gradient *= tl.load(p_scalars + 2)
        store_gradient(p_block, b_gradient, o_row - row_start, o_column - column_start, stride_block, m_tile)


class TritonSigmoid:
    """Implements `ops.sigmoid.SigmoidKernels`; not for float64. dS is rounded to the features' dtype."""

    def __init__(self, name: str = "triton", block_columns: int = 0) -> None:
        """block_columns: of a block of dS; 0: chosen from its memory."""
        self.name, self.block_columns = name, block_columns

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        assert inputs.bias is not None
        with torch.cuda.device_of(inputs.image):
            operands, n, m = Operands(inputs), inputs.n, inputs.m
            image, text, config = operands.image, operands.text, choose_configs(operands).backward
            gradient = any(need)
            loss_scale = _FLOAT16_LOSS_SCALE if image.dtype == torch.float16 else 1.0
            scalars = operands.scale.new_full((3,), loss_scale)
            scalars[0], scalars[1] = operands.scale, inputs.bias
            loss, grad_bias = scalars.new_zeros(()), scalars.new_zeros(())
            constants = {key: value for key, value in operands.constants(config).items() if key not in _SWEEP_CONSTANTS}
            factor = operands.scale / loss_scale
            found = FeatureGradients(image, text, inputs.image.shape[1], factor, need, (torch.float32,) * 2)
            shape = operands.gradient_block(config, inputs.strip_rows, self.block_columns)
            buffer = image.new_empty(shape if gradient else (0, 0))
            for rows, columns in in_blocks(n, m, shape, 0):
                block = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
                tiles_m = triton.cdiv(rows.stop - rows.start, config.block_m)
                programs = tiles_m * triton.cdiv(columns.stop - columns.start, config.block_n)
                sums = scalars.new_empty(1 + gradient, programs)
                sigmoid_kernel[(programs,)](
                    image, text, scalars, sums, block, rows.start, rows.stop, columns.start, columns.stop, n, m,
                    inputs.pair_offset, image.shape[1], image.stride(0), text.stride(0), shape[1], GRADIENT=gradient,
                    GROUP_ROWS=GROUP_ROWS, **constants,
                )  # fmt: skip
                loss += sums[0].sum()
                if gradient:
                    found.add(rows, columns, block)
                    if need.scale:
                        grad_bias += sums[1].sum()
            return SigmoidParts(loss, found.image, found.text, found.scale / loss_scale, grad_bias)


_SWEEP_CONSTANTS = ("PLAIN", "MASKED", "TEACHER", "EVEN_K_TEACHER")  # not of this kernel

sigmoid = as_sigmoid(TritonSigmoid())
