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
from cliperase_fast.ops.blocks import (
    FeatureGradients,
    block_shape,
    full_wave,
    in_blocks,
    kept_bytes,
    kept_share,
    round_up,
)
from cliperase_fast.ops.calibrated import Edit, Pull, calibrated_terms, edited_entry
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.calibrated_sweep import gradients_by_blocks, losses_by_blocks
from cliperase_fast.ops.matmul import as_pair, batched_product, product
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.extension import as_buffer_or_none
from cliperase_fast.ops.spec import (
    GradientTerms,
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
    """Implement `ops.spec.SweepKernels` and `ops.calibrated.CalibratedKernels`, except for float64.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied. Memory: a block of CLIPERASE_STRIP_MIB, O(N D), and the cache.
    """

    def __init__(
        self,
        kernels: Any = None,
        name: str = "native_cuda",
        block_columns: int = 0,
        batched: bool = False,
        block_bytes: int = 0,
    ) -> None:
        """Use `kernels` instead of the extension's.

        block_columns: of the widest block; 0: chosen from its memory. batched: the products of student and teacher are
        one call where their widths and dtypes are equal, which takes copies of all features. block_bytes: memory of a
        block; 0: CLIPERASE_STRIP_MIB.
        """
        self.name = name
        self.batched = batched
        self._kernels = kernels
        self._block_columns = block_columns
        self._block_bytes = block_bytes

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """Return the bytes of the float32 products of student and teacher; see `blocks.kept_bytes`."""
        return kept_bytes(inputs, _kept_row_bytes(inputs))

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        cache = self.workspace(cache_size, inputs.image.device)
        return self._forward(inputs, cache, None), cache

    losses = losses_from_stats

    def blocks_cache_size(self, inputs: SimilarityInputs) -> int:
        return kept_bytes(inputs, _kept_row_bytes(inputs, _ALIGNMENT))  # each kind of columns has its own padding

    def cache_share(self, inputs: SimilarityInputs, available: int) -> int:
        return kept_share(inputs.n, _kept_row_bytes(inputs), available)

    def workspace(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    calibrated_losses, calibrated_gradients = losses_by_blocks, gradients_by_blocks

    def calibrated_forward(self, inputs: SimilarityInputs, edit: Edit | None, cache: Tensor) -> tuple[Stats, Tensor]:
        comparison = _Comparison(edit, inputs.image.device)
        return self._forward(inputs, cache, comparison), comparison.sums.float()

    def _forward(self, inputs: SimilarityInputs, cache: Tensor, comparison: _Comparison | None) -> Stats:
        with torch.cuda.device_of(inputs.image):
            operands, n, m, device = _Operands(inputs, self.batched), inputs.n, inputs.m, inputs.image.device
            shift = operands.shift(comparison)
            blocks = _Blocks(self, operands, inputs.strip_rows, cache, shift, comparison)
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
                squares = None if comparison is None else comparison.parts(blocks.kernels.forward_programs(block))
                blocks.kernels.forward(
                    block,
                    row_stats=blocks.buffer(of_rows[:, rows]),
                    row_fresh=columns.start == 0,
                    column_stats=blocks.buffer(of_columns[:, columns]),
                    column_fresh=rows.start == 0,
                    diagonal=blocks.buffer(diagonals[0, rows]),
                    teacher_diagonal=blocks.buffer(diagonals[1, rows] if operands.teacher else None),
                    workspace=blocks.buffer(workspace),
                    squares=blocks.buffer(squares),
                    stream=_stream(device),
                )
                if comparison is not None and squares is not None:
                    comparison.add(squares)
            maxima = [0] * inputs.plain + [2 * inputs.plain] * inputs.masked
            for stat in [*maxima, *(inputs.num_stats - 3, inputs.num_stats - 1) * operands.teacher]:
                of_rows[stat] *= _LN_2
                of_columns[stat] *= _LN_2
            diagonal = diagonals[0] if inputs.paired else None
            teacher_diagonal = diagonals[1] if inputs.paired and operands.teacher else None
            return Stats(of_rows, of_columns, diagonal, teacher_diagonal, shift)

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands, scale = _Operands(inputs, self.batched), inputs.scale
            softmaxes, diagonal, unit = unit_terms(
                inputs, saved, Weights(weights.retention.float(), weights.consistency.float()),
                loss_scale=2.0**13 if operands.image.dtype == torch.float16 else 1.0,
            )  # fmt: skip
            dtypes = (torch.float32,) * 3 if partial else (inputs.image.dtype, inputs.text.dtype, scale.dtype)
            found = FeatureGradients(
                operands.image, operands.text, inputs.image.shape[1], unit * operands.scale, need, dtypes
            )
            blocks = _Blocks(self, operands, inputs.strip_rows, saved.cache, gradient=True)
            self._add_blocks(found, blocks, softmaxes, diagonal)
            return found.image, found.text, (found.scale * unit).to(dtypes[2])

    def calibrated_backward(
        self, inputs: SimilarityInputs, edit: Edit | None, terms: GradientTerms, pull: Pull, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(inputs.image):
            operands = _Operands(inputs, self.batched)
            softmaxes, diagonal, pull, unit = calibrated_terms(operands.pairs, edit, terms, pull)
            comparison = _Comparison(edit, inputs.image.device, pull)
            found = FeatureGradients(
                operands.image, operands.text, inputs.image.shape[1], unit * operands.scale, need._replace(scale=False),
                (torch.float32,) * 2,
            )  # fmt: skip
            blocks = _Blocks(self, operands, inputs.strip_rows, cache, comparison=comparison, gradient=True)
            self._add_blocks(found, blocks, softmaxes, diagonal)
            return found.image, found.text, comparison.sums[0].float() * unit

    def _add_blocks(self, found: FeatureGradients, blocks: _Blocks, softmaxes: Tensor, diagonal: Tensor) -> None:
        """Add the gradients from all blocks; softmaxes: [terms, 2 n + 2 m], diagonal: [n], see `unit_terms`."""
        kernels, comparison, n, m = blocks.kernels, blocks.comparison, blocks.operands.n, blocks.operands.m
        # anchors and factors: [2 terms, n] and [2 terms, m]
        row_terms, column_terms = softmaxes[:, : 2 * n].reshape(-1, n), softmaxes[:, 2 * n :].reshape(-1, m)
        for rows, columns, block in blocks:
            padded = blocks.gradient_block(rows, columns)
            dots = None if comparison is None else comparison.parts(kernels.backward_programs(block))
            kernels.backward(
                block,
                row_terms=blocks.buffer(row_terms[:, rows]),
                column_terms=blocks.buffer(column_terms[:, columns]),
                diagonal=blocks.buffer(diagonal[rows]),
                gradient=blocks.buffer(padded),
                pull=blocks.buffer(None if comparison is None else comparison.pull),
                dots=blocks.buffer(None if dots is None else dots[0]),
                stream=_stream(diagonal.device),
            )
            if comparison is not None and dots is not None:
                comparison.add(dots)
            found.add(rows, columns, padded[:, : columns.stop - columns.start])


class _Comparison:
    """What the calibrated loss adds to a sweep: the edit, the pull and the sums of all blocks, always in order."""

    def __init__(self, edit: Edit | None, device: torch.device, pull: Pull | None = None) -> None:
        self.edit = None if edit is None else Edit(*(tensor.contiguous() for tensor in edit))
        self.pull = None if pull is None else torch.stack(pull)
        self.sums = torch.zeros(2 if pull is None else 1, dtype=torch.float64, device=device)

    def parts(self, programs: int) -> Tensor:
        return torch.empty(len(self.sums), programs, dtype=torch.float32, device=self.sums.device)

    def add(self, parts: Tensor) -> None:
        self.sums += parts.sum(1, dtype=self.sums.dtype)


class _Operands:
    """Convert the inputs for the products and kernels. batched: see `CudaKernels`."""

    def __init__(self, inputs: SimilarityInputs, batched: bool = False) -> None:
        self.n, self.m, self.pair_offset = inputs.n, inputs.m, inputs.pair_offset
        self.scale = inputs.scale.float()
        self.pairs = [as_pair(inputs.image, inputs.text)]
        self.scales = [self.scale]
        if inputs.teacher is not None:
            image, text, scale = inputs.teacher
            self.pairs.append(as_pair(image, text))
            self.scales.append(scale.float())
        self._stacked = _stacked(self.pairs) if batched else None
        if self._stacked is not None:
            self.pairs = list(zip(*self._stacked, strict=True))  # so that the features are not held twice
        self.image, self.text = self.pairs[0]
        self.row_groups, self.column_groups = (
            None if ids is None else ids.contiguous() for ids in (inputs.group_ids, inputs.column_groups)
        )
        self.teacher = inputs.want_consistency

    def shift(self, comparison: _Comparison | None) -> Tensor | None:
        """Return S° - S of an entry. Any constant works; this keeps gaps exact if S° - S hardly varies.

        With a comparison it is not that of a pair, which may be edited where most entries are not.
        """
        if not self.teacher:
            return None
        column = 0 if comparison is None else -1
        student, teacher = (
            scale * (left[0].float() * right[column].float()).sum()
            for scale, (left, right) in zip(self.scales, self.pairs, strict=True)
        )
        edit = None if comparison is None else comparison.edit
        return edited_entry(edit, 0, column, teacher, self.scales[1]) - student

    def multiply(self, rows: slice, columns: slice, out: Tensor) -> None:
        """Form a block of the products of student and teacher; out: [1 or 2, rows, columns]."""
        if self._stacked is not None:
            images, texts = self._stacked
            batched_product(images[:, rows], texts[:, columns].mT, out)
            return
        for into, (left, right) in zip(out, self.pairs, strict=True):
            product(left[rows], right[columns].T, out=into)


def _stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return the images [2, n, D'] and texts [2, m, D'] of student and teacher; None if their products differ."""
    images, texts = zip(*pairs, strict=True)
    first, last = images[0], images[-1]
    if len(images) == 1 or first.shape != last.shape or first.dtype != last.dtype:
        return None
    return torch.stack(images), torch.stack(texts)


class _Blocks:
    """Forms the products a block at a time; yields (rows, columns, block for the kernels)."""

    def __init__(
        self,
        owner: CudaKernels,
        operands: _Operands,
        strip_rows: int,
        cache: Tensor,
        shift: Tensor | None = None,
        comparison: _Comparison | None = None,
        gradient: bool = False,
    ) -> None:
        self.kernels = owner._kernels if owner._kernels is not None else extension.load().cuda
        self.operands, self.comparison, n, m = operands, comparison, operands.n, operands.m
        matrices, dtype = 1 + operands.teacher, operands.image.dtype
        pair_bytes = matrices * _FLOAT + gradient * dtype.itemsize
        wave = full_wave(operands.image.device, operands.image.shape[1])
        self.rows, self.columns = block_shape(
            n, m, pair_bytes, owner._block_bytes or strip_bytes(), _UNITS, wave, strip_rows, owner._block_columns
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
            self.operands.multiply(rows, columns, matrices[..., :width])
        row_groups, column_groups = self.operands.row_groups, self.operands.column_groups
        edit = None if self.comparison is None else self.comparison.edit
        edited = {}
        if edit is not None:
            edited = {
                "row_ids": self.buffer(edit.row_ids[rows]), "column_ids": self.buffer(edit.column_ids[columns]),
                "row_levels": self.buffer(edit.row_levels[rows]),
                "column_levels": self.buffer(edit.column_levels[columns]),
            }  # fmt: skip
        return self.kernels.Block(
            columns=width,
            pair_offset=rows.start + self.operands.pair_offset - columns.start,
            student=self.buffer(matrices[0]),
            teacher=self.buffer(matrices[1] if self.operands.teacher else None),
            scalars=self.buffer(self.scalars),
            row_groups=self.buffer(None if row_groups is None else row_groups[rows]),
            column_groups=self.buffer(None if column_groups is None else column_groups[columns]),
            compares=self.comparison is not None,
            **edited,
        )


def _leading(n: int) -> int:
    return round_up(n, _ALIGNMENT)


def _kept_row_bytes(inputs: SimilarityInputs, more: int = 0) -> int:
    """Return the bytes of a row of the products, with `more` entries of padding in each."""
    return _FLOAT * (_leading(inputs.m) + more) * (1 + inputs.want_consistency)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


kernels = CudaKernels()
sweep = as_sweep(kernels)
calibrated = as_calibrated(kernels)
