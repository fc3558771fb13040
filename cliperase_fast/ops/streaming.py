"""Backend "torch": run the loss sweep in strips of rows, in plain PyTorch, on any device.

Neither pass forms an n x m matrix. Forward: each strip [h, m] of S (and S°) is formed once. Its rows are complete; its
columns are merged into running maxima and sums. O(n + m) numbers are kept. Backward: each strip is formed again and
turned into a strip of dS, from which dI = s dS T, dT = s dSᵀ I and ds = Σ_i <(dS T)_i, I_i>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.spec import (
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


class TorchKernels:
    """Implement `ops.spec.SweepKernels`. Memory: four strips [h, m]; no similarities are kept for the backward pass."""

    name = "torch"

    def cache_size(self, inputs: SimilarityInputs) -> int:
        return 0

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
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

        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h, own = rows.stop - start, start + inputs.pair_offset
            s = student.strip(start, rows.stop, strip)
            if teacher is not None and teacher_sums is not None:
                t = teacher.strip(start, rows.stop, teacher_strip)
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
        return stats, torch.empty(0, dtype=torch.uint8, device=strip.device)

    losses = losses_from_stats

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m, dtype = inputs.n, inputs.m, saved.both.dtype
        image, text = inputs.image, inputs.text
        lowest = torch.finfo(dtype).min
        student, teacher = Similarity(image, text, inputs.scale, dtype), _teacher(inputs, dtype)
        height = strip_height(n, m, inputs.strip_rows, student.text)
        strip, gradient, work = _buffers(3, height, m, student.text)
        if teacher is not None:
            (teacher_strip,) = _buffers(1, height, m, student.text)
        terms = gradient_terms(inputs, saved, weights)

        grad_image = image.new_empty(image.shape if need.image else (0,), dtype=dtype if partial else image.dtype)
        grad_text = student.text.new_zeros(text.shape if need.text else (0,))
        grad_scale = student.text.new_zeros(())
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h, own = rows.stop - start, start + inputs.pair_offset
            s, g, w = student.strip(start, rows.stop, strip), gradient[:h].zero_(), work[:h]
            s.diagonal(own).fill_(lowest)
            if terms.student is not None:
                _add_softmax(g, s, rows, w, terms.student)
            if terms.teacher is not None:
                assert teacher is not None
                t = teacher.strip(start, rows.stop, teacher_strip)
                t.diagonal(own).fill_(lowest)
                _add_softmax(g, t, rows, w, terms.teacher)
            if terms.masked is not None:
                _add_softmax(g, s.masked_fill_(_same_group(inputs, rows), lowest), rows, w, terms.masked)
            if inputs.paired:
                g.diagonal(own).copy_(terms.diagonal[rows])

            image_rows = student.image_rows(start, rows.stop)
            if need.image or need.scale:
                product = g @ student.text  # [h, D]
                if need.scale:  # before the factor s, which may be 0
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
