"""Run the backend "native" on a GPU: torch's matrix products, and `csrc/cuda` for everything between them.

S and S° are formed in blocks, float32 and unscaled. One pass over a block updates the stats of its rows and columns, in
a fixed order and without atomics, so two runs are bitwise equal. Backward: the gradients come from a block of dS in the
dtype of the features. The blocks' memory does not grow with N, and the host never waits for the device. Products that
are kept (`blocks.kept_bytes`) stay in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep, strip_bytes
from cliperase_fast.ops.blocks import FeatureGradients, block_shape, full_wave, in_blocks, kept_bytes, round_up
from cliperase_fast.ops.matmul import as_pair, product
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.extension import as_buffer_or_none
from cliperase_fast.ops.spec import (
    Need,
    SavedStats,
    SimilarityInputs,
    Stats,
    Weights,
    losses_from_stats,
    unit_terms,
)

_FLOAT = 4  # bytes
_LN_2 = 0.6931471805599453
_UNITS = (64, 128)  # rows and columns that both kernels process at once
_VECTOR = 4  # entries that a kernel reads and writes at once
_ALIGNMENT = 8  # entries: a row of every dtype begins at a multiple of 16 bytes


class CudaKernels:
    """Implement `ops.spec.SweepKernels`, except for float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied. Memory: a block of CLIPERASE_STRIP_MIB, O(N D), and the cache.
    """

    def __init__(self, kernels: Any = None, name: str = "native_cuda", block_columns: int = 0) -> None:
        """Use `kernels` instead of the extension's. block_columns: of the widest block; 0: chosen from its memory."""
        self.name = name
        self._kernels = kernels
        self._block_columns = block_columns

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """Return the bytes of the float32 products of student and teacher; see `blocks.kept_bytes`."""
        return kept_bytes(inputs, _FLOAT * _leading(inputs.m) * (1 + inputs.want_consistency))

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands, n, m, device = _Operands(inputs), inputs.n, inputs.m, inputs.image.device
            cache = torch.empty(cache_size, dtype=torch.uint8, device=device)
            shift = operands.shift()
            blocks = _Blocks(self, operands, inputs.strip_rows, cache, shift)
            blocks.kept[..., m:].zero_()  # so that equal calls keep equal bytes
            diagonals = torch.empty(1 + operands.teacher, n, dtype=torch.float32, device=device)
            # maxima in units of log 2
            of_rows = torch.empty(inputs.num_stats, n, dtype=torch.float32, device=device)
            of_columns = torch.empty(inputs.num_stats, m, dtype=torch.float32, device=device)
            workspace = torch.empty(0, dtype=torch.float32, device=device)
            for rows, columns, block in blocks:
                needed = blocks.kernels.forward_workspace(block)
                if len(workspace) < needed:
                    workspace = torch.empty(needed, dtype=torch.float32, device=device)
                blocks.kernels.forward(
                    block,
                    row_stats=blocks.buffer(of_rows[:, rows]),
                    row_fresh=columns.start == 0,
                    column_stats=blocks.buffer(of_columns[:, columns]),
                    column_fresh=rows.start == 0,
                    diagonal=blocks.buffer(diagonals[0, rows]),
                    teacher_diagonal=blocks.buffer(diagonals[1, rows] if operands.teacher else None),
                    workspace=blocks.buffer(workspace),
                    stream=_stream(device),
                )
            maxima = [0] * inputs.plain + [2 * inputs.plain] * inputs.masked
            for stat in [*maxima, *(inputs.num_stats - 3, inputs.num_stats - 1) * operands.teacher]:
                of_rows[stat] *= _LN_2
                of_columns[stat] *= _LN_2
            diagonal = diagonals[0] if inputs.paired else None
            teacher_diagonal = diagonals[1] if inputs.paired and operands.teacher else None
            return Stats(of_rows, of_columns, diagonal, teacher_diagonal, shift), cache

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands, image, n, m = _Operands(inputs), inputs.image, inputs.n, inputs.m
            softmaxes, diagonal, unit = unit_terms(
                inputs, saved, Weights(weights.retention.float(), weights.consistency.float()),
                loss_scale=2.0**13 if operands.image.dtype == torch.float16 else 1.0,
            )  # fmt: skip
            # anchors and factors: [2 terms, n] and [2 terms, m]
            row_terms, column_terms = softmaxes[:, : 2 * n].reshape(-1, n), softmaxes[:, 2 * n :].reshape(-1, m)
            dtypes = (image.dtype, inputs.text.dtype, inputs.scale.dtype)
            if partial:
                dtypes = (torch.float32,) * 3
            factor = unit * operands.scale
            found = FeatureGradients(operands.image, operands.text, image.shape[1], factor, need, dtypes)
            blocks = _Blocks(self, operands, inputs.strip_rows, saved.cache, None, gradient=True)
            kernels = blocks.kernels
            for rows, columns, block in blocks:
                padded = blocks.gradient_block(rows, columns)
                gradient = padded[:, : columns.stop - columns.start]
                kernels.backward(
                    block,
                    row_terms=blocks.buffer(row_terms[:, rows]),
                    column_terms=blocks.buffer(column_terms[:, columns]),
                    diagonal=blocks.buffer(diagonal[rows]),
                    gradient=blocks.buffer(padded),
                    stream=_stream(image.device),
                )
                found.add(rows, columns, gradient)
            return found.image, found.text, (found.scale * unit).to(dtypes[2])


class _Operands:
    """Convert the inputs for the products and kernels."""

    def __init__(self, inputs: SimilarityInputs) -> None:
        self.n, self.m, self.pair_offset = inputs.n, inputs.m, inputs.pair_offset
        self.image, self.text = as_pair(inputs.image, inputs.text)
        self.scale = inputs.scale.float()
        self.pairs = [(self.image, self.text)]
        self.scales = [self.scale]
        if inputs.teacher is not None:
            image, text, scale = inputs.teacher
            self.pairs.append(as_pair(image, text))
            self.scales.append(scale.float())
        self.row_groups, self.column_groups = (
            None if ids is None else ids.contiguous() for ids in (inputs.group_ids, inputs.column_groups)
        )
        self.teacher = inputs.want_consistency

    def shift(self) -> Tensor | None:
        """Return S° - S of the first pair. Any constant works; this keeps gaps exact if S° - S hardly varies."""
        if not self.teacher:
            return None
        student, teacher = (
            scale * (left[0].float() * right[0].float()).sum()
            for scale, (left, right) in zip(self.scales, self.pairs, strict=True)
        )
        return teacher - student


class _Blocks:
    """Forms the products a block at a time; yields (rows, columns, block for the kernels)."""

    def __init__(
        self,
        owner: CudaKernels,
        operands: _Operands,
        strip_rows: int,
        cache: Tensor,
        shift: Tensor | None,
        gradient: bool = False,
    ) -> None:
        self.kernels = owner._kernels if owner._kernels is not None else extension.load().cuda
        self.operands, n, m = operands, operands.n, operands.m
        matrices, dtype = 1 + operands.teacher, operands.image.dtype
        pair_bytes = matrices * _FLOAT + gradient * dtype.itemsize
        wave = full_wave(operands.image.device, operands.image.shape[1])
        self.rows, self.columns = block_shape(
            n, m, pair_bytes, strip_bytes(), _UNITS, wave, strip_rows, owner._block_columns
        )
        self.kept = cache.view(torch.float32).view(matrices, -1, _leading(m))  # [matrices, kept rows, m and padding]
        device = operands.image.device
        self.kept_rows = self.kept.shape[1]
        # Kept rows are formed where they stay.
        rows = 0 if self.kept_rows >= n else self.rows
        self.products = torch.empty(matrices, rows, self.columns, dtype=torch.float32, device=device)
        self.gradient = torch.empty(self.rows if gradient else 0, self.columns, dtype=dtype, device=device)
        self.form_kept = not gradient
        self.scalars = torch.zeros(3, dtype=torch.float32, device=device)
        for place, scalar in enumerate([*operands.scales, *([] if shift is None else [shift])]):
            self.scalars[place] = scalar

    def gradient_block(self, rows: slice, columns: slice) -> Tensor:
        """Return the block of dS, [rows, columns and their padding]."""
        return self.gradient[: rows.stop - rows.start, : round_up(columns.stop - columns.start, _VECTOR)]

    def buffer(self, tensor: Tensor | None) -> Any:
        return as_buffer_or_none(self.kernels, tensor)

    def __iter__(self) -> Iterator[tuple[slice, slice, Any]]:
        shape = self.rows, self.columns
        for rows, columns in in_blocks(self.operands.n, self.operands.m, shape, self.kept_rows):
            yield rows, columns, self._block(rows, columns, rows.start < self.kept_rows)

    def _block(self, rows: slice, columns: slice, kept: bool) -> Any:
        count, width = rows.stop - rows.start, columns.stop - columns.start
        padded = round_up(width, _VECTOR)  # kernels read and write whole vectors
        if kept:
            matrices = self.kept[:, rows, columns.start : columns.start + padded]
        else:
            matrices = self.products[:, :count, :padded]
        if self.form_kept or not kept:
            for out, (left, right) in zip(matrices, self.operands.pairs, strict=True):
                product(left[rows], right[columns].T, out=out[:, :width])
        row_groups, column_groups = self.operands.row_groups, self.operands.column_groups
        return self.kernels.Block(
            columns=width,
            pair_offset=rows.start + self.operands.pair_offset - columns.start,
            student=self.buffer(matrices[0]),
            teacher=self.buffer(matrices[1] if self.operands.teacher else None),
            scalars=self.buffer(self.scalars),
            row_groups=self.buffer(None if row_groups is None else row_groups[rows]),
            column_groups=self.buffer(None if column_groups is None else column_groups[columns]),
        )


def _leading(n: int) -> int:
    return round_up(n, _ALIGNMENT)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


kernels = CudaKernels()
sweep = as_sweep(kernels)
