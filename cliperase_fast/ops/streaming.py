"""Backend "torch": run the loss sweep in strips of rows, in plain PyTorch, on any device.

Neither pass forms an n x m matrix. Forward: each strip [h, m] of S (and S°) is formed once. Its rows are complete; its
columns are merged into running maxima and sums. O(n + m) numbers are kept. Backward: each strip is formed again and
turned into a strip of dS, from which dI = s dS T, dT = s dSᵀ I and ds = Σ_i <(dS T)_i, I_i>.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.calibrated import Edit, Pull
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.calibrated_sweep import gradients_by_blocks, losses_by_blocks
from cliperase_fast.ops.spec import (
    GradientTerms,
    Need,
    SavedStats,
    SimilarityInputs,
    Softmax,
    Stats,
    Weights,
    gradient_terms,
    losses_from_stats,
)

# Bytes of one strip matrix; four are alive at once. Small strips stay in a CPU's cache; large ones save launches on a
# GPU.
_STRIP_BYTES_CPU = 8 << 20
_STRIP_BYTES_GPU = 32 << 20
_LEAST_ROWS = 64


class Similarity:
    """Form rows of S = scale * image @ textᵀ on demand, in `dtype`."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.image, self.text = image, text.to(dtype).contiguous()
        self.scale, self.dtype = scale.to(dtype), dtype

    def image_rows(self, start: int, stop: int) -> Tensor:
        return self.image[start:stop].to(self.dtype)  # [h, D]

    def strip(self, start: int, stop: int, out: Tensor) -> Tensor:
        rows = self.image_rows(start, stop) * self.scale  # cheaper than scaling the strip
        return torch.mm(rows, self.text.T, out=out[: stop - start])  # [h, m]


class _OffDiagonal:
    """Collect the stats of the rows and columns of a matrix given in strips; excluded entries hold the lowest number.

    With a second matrix `gap`, also sum it weighted by each row's and column's exponentials.
    """

    def __init__(self, inputs: SimilarityInputs, like: Tensor, with_gap: bool) -> None:
        n, m = inputs.n, inputs.m
        self.row_max, self.row_sum, self.column_sum = like.new_empty(n), like.new_empty(n), like.new_zeros(m)
        self.column_max = like.new_full((m,), torch.finfo(like.dtype).min)
        self.row_gap = like.new_empty(n) if with_gap else None
        self.column_gap = like.new_zeros(m) if with_gap else None

    def add(self, strip: Tensor, start: int, work: Tensor, gap: Tensor | None = None) -> None:
        rows = slice(start, start + len(strip))
        torch.amax(strip, 1, out=self.row_max[rows])
        torch.sub(strip, self.row_max[rows, None], out=work).exp_()
        torch.sum(work, 1, out=self.row_sum[rows])
        if gap is not None and self.row_gap is not None:
            torch.sum(work.mul_(gap), 1, out=self.row_gap[rows])

        column_max = torch.maximum(self.column_max, strip.amax(0))
        shrink = (self.column_max - column_max).exp_()
        self.column_max = column_max
        torch.sub(strip, column_max, out=work).exp_()
        self.column_sum.mul_(shrink).add_(work.sum(0))
        if gap is not None and self.column_gap is not None:
            self.column_gap.mul_(shrink).add_(work.mul_(gap).sum(0))

    def rows(self) -> list[Tensor]:
        return [stat for stat in (self.row_max, self.row_sum, self.row_gap) if stat is not None]

    def columns(self) -> list[Tensor]:
        return [stat for stat in (self.column_max, self.column_sum, self.column_gap) if stat is not None]


class _Comparison:
    """Compare strips of S and S° for the calibrated loss: edit S°, and form C - C*, with 0 for own pairs."""

    def __init__(self, inputs: SimilarityInputs, edit: Edit | None, height: int, like: Tensor) -> None:
        assert inputs.teacher_scale is not None
        self.pair_offset, self.edit = inputs.pair_offset, edit
        self.teacher_scale = inputs.teacher_scale.to(like.dtype)
        self.to_cosine = inputs.scale.to(like.dtype).reciprocal()
        self.minus_to_cosine = -self.teacher_scale.reciprocal()
        (self.buffer,) = _buffers(1, height, inputs.m, like)
        self.sums = like.new_zeros(2)

    def difference(self, strip: Tensor, teacher: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Edit the teacher's strip in place; return (C - C*, which entries are edited, None for none)."""
        edited = None
        if self.edit is not None:
            edited = self.edit.row_ids[rows, None] == self.edit.column_ids  # [h, m]
            level = (self.edit.row_levels[rows, None] + self.edit.column_levels).mul_(self.teacher_scale)
            teacher.copy_(torch.where(edited, level, teacher))
        difference = torch.mul(strip, self.to_cosine, out=self.buffer[: len(strip)])
        difference.addcmul_(teacher, self.minus_to_cosine)
        difference.diagonal(rows.start + self.pair_offset).zero_()
        return difference, edited

    def add_squares(self, strip: Tensor, teacher: Tensor, rows: slice) -> None:
        """Edit the teacher's strip, and sum relu(C - C*)² where it is edited and (C - C*)² elsewhere."""
        difference, edited = self.difference(strip, teacher, rows)
        if edited is not None:
            self.sums[0] += difference.masked_fill(~edited, 0).clamp_(min=0).square_().sum()
            difference.masked_fill_(edited, 0)
        self.sums[1] += difference.square_().sum()

    def add_pull(self, gradient: Tensor, difference: Tensor, edited: Tensor | None, pull: Pull) -> None:
        if edited is not None:
            forget = difference.clamp(min=0).mul_(pull.forget)
            gradient.add_(forget.masked_fill_(~edited, 0))
            difference.masked_fill_(edited, 0)
        gradient.addcmul_(difference, pull.anchor)


class TorchKernels:
    """Implement `ops.spec.SweepKernels` and `ops.calibrated.CalibratedKernels`.

    Memory: four strips [h, m], five for the calibrated loss; no similarities are kept for the backward pass.
    """

    name = "torch"

    def cache_size(self, inputs: SimilarityInputs) -> int:
        return 0

    def blocks_cache_size(self, inputs: SimilarityInputs) -> int:
        return 0

    def cache_share(self, inputs: SimilarityInputs, available: int) -> int:
        return 0

    calibrated_losses, calibrated_gradients = losses_by_blocks, gradients_by_blocks

    def workspace(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=device)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        stats, _ = self._forward(inputs, lambda *_: None)
        return stats, self.workspace(0, inputs.image.device)

    def calibrated_forward(self, inputs: SimilarityInputs, edit: Edit | None, cache: Tensor) -> tuple[Stats, Tensor]:
        stats, comparison = self._forward(inputs, partial(_Comparison, inputs, edit))
        assert comparison is not None
        return stats, comparison.sums

    def _forward(
        self, inputs: SimilarityInputs, compare: Callable[[int, Tensor], _Comparison | None]
    ) -> tuple[Stats, _Comparison | None]:
        n, m, dtype = inputs.n, inputs.m, inputs.dtype
        lowest = torch.finfo(dtype).min
        student, teacher = Similarity(inputs.image, inputs.text, inputs.scale, dtype), _teacher(inputs, dtype)
        height = strip_height(n, m, inputs.strip_rows, student.text)
        strip, work = _buffers(2, height, m, student.text)
        plain = _OffDiagonal(inputs, strip, with_gap=False) if inputs.plain else None
        masked = _OffDiagonal(inputs, strip, with_gap=False) if inputs.masked else None
        diagonal = strip.new_empty(n) if inputs.paired else None
        teacher_sums = teacher_diagonal = shift = None
        if teacher is not None:
            teacher_sums = _OffDiagonal(inputs, strip, with_gap=True)
            teacher_diagonal = strip.new_empty(n) if inputs.paired else None
            teacher_strip, gap = _buffers(2, height, m, strip)
        comparison = compare(height, strip)

        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h, own = rows.stop - start, start + inputs.pair_offset
            s = student.strip(start, rows.stop, strip)
            if teacher is not None and teacher_sums is not None:
                t = teacher.strip(start, rows.stop, teacher_strip)
                if comparison is not None:
                    comparison.add_squares(s, t, rows)
                g = torch.sub(t, s, out=gap[:h])
                if shift is None:
                    # Any constant works; this one keeps the gaps small, and so exact, if S° - S hardly varies.
                    shift = g[0, 0].clone()
                g.sub_(shift).diagonal(own).zero_()
                if teacher_diagonal is not None:
                    teacher_diagonal[rows] = t.diagonal(own)
                t.diagonal(own).fill_(lowest)
                teacher_sums.add(t, start, work[:h], g)
            if diagonal is not None:
                diagonal[rows] = s.diagonal(own)
            s.diagonal(own).fill_(lowest)
            if plain is not None:
                plain.add(s, start, work[:h])
            if masked is not None:
                masked.add(s.masked_fill_(_same_group(inputs, rows), lowest), start, work[:h])

        parts = [part for part in (plain, masked, teacher_sums) if part is not None]
        stats = Stats(
            torch.stack([stat for part in parts for stat in part.rows()]),
            torch.stack([stat for part in parts for stat in part.columns()]),
            diagonal,
            teacher_diagonal,
            shift,
        )
        return stats, comparison

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(inputs, gradient_terms(inputs, saved, weights), need, partial)

    def calibrated_backward(
        self, inputs: SimilarityInputs, edit: Edit | None, terms: GradientTerms, pull: Pull, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(inputs, terms, need, True, (edit, pull))

    def _backward(
        self,
        inputs: SimilarityInputs,
        terms: GradientTerms,
        need: Need,
        partial: bool,
        calibrated: tuple[Edit | None, Pull] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m, dtype = inputs.n, inputs.m, terms.diagonal.dtype
        image, text = inputs.image, inputs.text
        lowest = torch.finfo(dtype).min
        student, teacher = Similarity(image, text, inputs.scale, dtype), _teacher(inputs, dtype)
        height = strip_height(n, m, inputs.strip_rows, student.text)
        strip, gradient, work = _buffers(3, height, m, student.text)
        if teacher is not None:
            (teacher_strip,) = _buffers(1, height, m, student.text)
        if calibrated is not None:
            edit, pull = calibrated
            comparison = _Comparison(inputs, edit, height, student.text)

        grad_image = image.new_empty(image.shape if need.image else (0,), dtype=dtype if partial else image.dtype)
        grad_text = student.text.new_zeros(text.shape if need.text else (0,))
        grad_scale = student.text.new_zeros(())
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h, own = rows.stop - start, start + inputs.pair_offset
            s, g, w = student.strip(start, rows.stop, strip), gradient[:h].zero_(), work[:h]
            if terms.teacher is not None:
                assert teacher is not None
                t = teacher.strip(start, rows.stop, teacher_strip)
                if calibrated is not None:
                    difference, edited = comparison.difference(s, t, rows)
                t.diagonal(own).fill_(lowest)
            s.diagonal(own).fill_(lowest)
            if terms.student is not None:
                _add_softmax(g, s, rows, w, terms.student)
            if terms.teacher is not None:
                _add_softmax(g, t, rows, w, terms.teacher)
            if terms.masked is not None:
                masked = s if calibrated is None else s.clone()  # the gradient of the scale needs S as it is
                _add_softmax(g, masked.masked_fill_(_same_group(inputs, rows), lowest), rows, w, terms.masked)
            if calibrated is not None:
                if need.scale:
                    grad_scale += torch.mul(g, s, out=w).sum()
                comparison.add_pull(g, difference, edited, pull)
            if inputs.paired:
                g.diagonal(own).copy_(terms.diagonal[rows])

            image_rows = student.image_rows(start, rows.stop)
            if need.image or (need.scale and calibrated is None):
                product = g @ student.text  # [h, D]
                if need.scale and calibrated is None:  # before the factor s, which may be 0
                    grad_scale += (product * image_rows).sum()
                if need.image:
                    grad_image[rows] = product.mul_(student.scale)
            if need.text:
                grad_text.addmm_(g.T, image_rows)
        grad_text = grad_text.mul_(student.scale).to(dtype if partial else text.dtype)
        return grad_image, grad_text, grad_scale.to(dtype if partial else inputs.scale.dtype)


def _teacher(inputs: SimilarityInputs, dtype: torch.dtype) -> Similarity | None:
    return None if inputs.teacher is None else Similarity(*inputs.teacher, dtype)


def _same_group(inputs: SimilarityInputs, rows: slice) -> Tensor:
    row_groups, column_groups = inputs.group_ids, inputs.column_groups
    assert row_groups is not None and column_groups is not None
    return row_groups[rows, None] == column_groups  # [h, m]


def _add_softmax(gradient: Tensor, strip: Tensor, rows: slice, work: Tensor, softmax: Softmax) -> None:
    anchor, factor = softmax.rows
    torch.sub(strip, anchor[rows, None], out=work).exp_()
    gradient.addcmul_(work, factor[rows, None])
    anchor, factor = softmax.columns
    torch.sub(strip, anchor, out=work).exp_()
    gradient.addcmul_(work, factor)


def strip_height(n: int, m: int, strip_rows: int, like: Tensor) -> int:
    """Return the number of rows of an [n, m] matrix to form at a time; strip_rows: a given number, 0 for none."""
    budget = _STRIP_BYTES_CPU if like.device.type == "cpu" else _STRIP_BYTES_GPU
    return min(n, strip_rows or max(_LEAST_ROWS, budget // (m * like.element_size())))


def _buffers(count: int, height: int, width: int, like: Tensor) -> list[Tensor]:
    return [like.new_empty(height, width) for _ in range(count)]


kernels = TorchKernels()
sweep = as_sweep(kernels)
calibrated = as_calibrated(kernels)
