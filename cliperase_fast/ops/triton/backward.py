"""The backward pass: a block of dS at a time, in the dtype of the features, and the gradients from it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.blocks import FeatureGradients, in_blocks
from cliperase_fast.ops.spec import Need, SavedStats, SimilarityInputs, Weights, unit_terms
from cliperase_fast.ops.triton.configs import Config
from cliperase_fast.ops.triton.shared import moved_factors, shared_backward_kernel
from cliperase_fast.ops.triton.softmax_tiles import gradient_tile
from cliperase_fast.ops.triton.tiles import GROUP_ROWS, Operands, tile_of_program


@triton.jit(do_not_specialize=["row_stop", "column_stop", "pair_offset"])
def backward_kernel(
    p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
    p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
    teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, TEACHER: tl.constexpr, READ_CACHE: tl.constexpr,
    GROUP_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_K_TEACHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of dL/dS (up to one common factor), all terms together, into p_block [rows, stride_block], in its dtype.

    Row i and column i + pair_offset are a pair. row_start and column_start are multiples of a tile: the compiler takes
    them, and with them the addresses, as multiples of 16. p_softmax: [PLAIN + MASKED + TEACHER, 2 n + 2 m], see
    `softmax_gradient`; p_diagonal: [n], dS of the pairs. READ_CACHE: the tiles of S and S° are read from where the
    forward kernel has stored them, see `kept.py`.
    """
    i_row, i_column = tile_of_program(row_stop - row_start, column_stop - column_start, GROUP_ROWS, BLOCK_M, BLOCK_N)
    o_row = row_start + i_row * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    o_column = column_start + i_column * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    gradient_tile(
        o_row, o_column,
        p_image, p_text, p_teacher_image, p_teacher_text, p_row_group, p_column_group, p_scalars, p_softmax, p_diagonal,
        p_block, p_cache, p_teacher_cache, row_start, row_stop, column_start, column_stop, n, m, pair_offset, width,
        teacher_width, stride_image, stride_text, stride_teacher_image, stride_teacher_text, stride_block,
        PLAIN, MASKED, TEACHER, READ_CACHE, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_K_TEACHER, PRECISION,
    )  # fmt: skip


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
    kernel, constants = backward_kernel, operands.constants(config)
    moved: tuple[Tensor | int, ...] = ()
    if config.shared:
        kernel, constants["SAME_WIDTH"] = shared_backward_kernel, operands.same_width
        moved = moved_factors(softmaxes, n, m, config)
    cached_rows = operands.cached_rows(saved.cache)
    for rows, columns in in_blocks(n, m, shape, cached_rows):
        block = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        kernel[(triton.cdiv(block.shape[0], config.block_m) * triton.cdiv(block.shape[1], config.block_n),)](
            *operands.features(), *operands.groups, scalars, softmaxes, diagonal, block,
            *operands.cached_tiles(saved.cache), rows.start, rows.stop, columns.start, columns.stop, n, m,
            operands.pair_offset, *operands.widths(), *operands.strides(), shape[1], *moved, GROUP_ROWS=GROUP_ROWS,
            READ_CACHE=operands.kept_form(saved.cache, rows.start), **constants,
        )  # fmt: skip
        found.add(rows, columns, block)
    return found.image, found.text, (found.scale * unit).to(dtypes[2])
