"""Backend "torch": the loss sweep in strips of rows, in plain PyTorch, on any device.

No N x N matrix in either direction. Forward: each strip [h, N] of S (and S°) is formed once; its rows are
complete, its columns are merged into running maxima and sums; what is kept is O(N). Backward: each strip is
formed again and turned into a strip of dS, from which dI = s dS T, dT = s dSᵀ I and ds = Σ_i <(dS T)_i, I_i>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.ops import finish
from cliperase_fast.ops.engine import Problem, Sums, as_sweep

# Bytes of one strip matrix; four are alive at once. Small strips stay in a CPU's cache; a GPU wants fewer
# launches.
_STRIP_BYTES_CPU = 8 << 20
_STRIP_BYTES_GPU = 32 << 20
_LEAST_ROWS = 64


class _Similarity:
    """Rows of S = scale * image @ textᵀ, formed on demand in `dtype`."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.image, self.text = image, text.to(dtype).contiguous()
        self.scale, self.dtype = scale.to(dtype), dtype

    def image_rows(self, start: int, stop: int) -> Tensor:
        return self.image[start:stop].to(self.dtype)  # [h, D]

    def strip(self, start: int, stop: int, out: Tensor) -> Tensor:
        rows = self.image_rows(start, stop) * self.scale  # cheaper than scaling the strip
        return torch.mm(rows, self.text.T, out=out[: stop - start])  # [h, N]


class _OffDiagonal:
    """Log-sum-exp of the rows and columns of a matrix that comes in strips, their diagonal filled with
    `lowest`.

    With a second matrix `gap`, also its mean under each row's and column's softmax.
    """

    def __init__(self, n: int, like: Tensor, with_gap: bool) -> None:
        self.row_max, self.row_sum, self.column_sum = like.new_empty(n), like.new_empty(n), like.new_zeros(n)
        self.column_max = like.new_full((n,), torch.finfo(like.dtype).min)
        self.row_gap = like.new_empty(n if with_gap else 0)
        self.column_gap = like.new_zeros(n if with_gap else 0)

    def add(self, strip: Tensor, start: int, work: Tensor, gap: Tensor | None = None) -> None:
        rows = slice(start, start + len(strip))
        torch.amax(strip, 1, out=self.row_max[rows])
        torch.sub(strip, self.row_max[rows, None], out=work).exp_()
        torch.sum(work, 1, out=self.row_sum[rows])
        if gap is not None:
            torch.sum(work.mul_(gap), 1, out=self.row_gap[rows])

        column_max = torch.maximum(self.column_max, strip.amax(0))
        shrink = (self.column_max - column_max).exp_()
        self.column_max = column_max
        torch.sub(strip, column_max, out=work).exp_()
        self.column_sum.mul_(shrink).add_(work.sum(0))
        if gap is not None:
            self.column_gap.mul_(shrink).add_(work.mul_(gap).sum(0))

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Maximum, total and gap, [2, N] each: of the rows, of the columns."""
        return (
            torch.stack((self.row_max, self.column_max)),
            torch.stack((self.row_sum, self.column_sum)),
            torch.stack((self.row_gap, self.column_gap)),
        )


class _TorchEngine:
    """See `ops.engine.Engine`. Memory: four strips [h, N]; it keeps nothing for the backward pass."""

    name = "torch"

    def check(self, problem: Problem) -> None:
        """Takes everything."""

    def kept_bytes(self, problem: Problem, keep: str) -> int:
        return 0

    def forward(self, problem: Problem, strip_rows: int, kept_bytes: int) -> tuple[Sums, Tensor]:
        n, dtype, group_ids = problem.n, problem.compute_dtype(), problem.group_ids
        lowest = torch.finfo(dtype).min
        student = _Similarity(problem.image, problem.text, problem.scale, dtype)
        height = _strip_height(n, strip_rows, student.text)
        strip, work = _buffers(2, height, n, student.text)
        diagonal = strip.new_empty(n)
        plain = _OffDiagonal(n, strip, with_gap=False) if problem.plain else None
        masked = _OffDiagonal(n, strip, with_gap=False) if problem.masked else None
        teacher = _teacher(problem, dtype)
        teacher_diagonal = shift = None
        if teacher is not None:
            teacher_diagonal = strip.new_empty(n)
            teacher_sums = _OffDiagonal(n, strip, with_gap=True)
            teacher_strip, gap = _buffers(2, height, n, strip)

        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h = rows.stop - start
            s = student.strip(start, rows.stop, strip)
            if teacher is not None and teacher_diagonal is not None:
                t = teacher.strip(start, rows.stop, teacher_strip)
                g = torch.sub(t, s, out=gap[:h])
                if shift is None:
                    # Any constant would do; this one keeps the gaps small, so exact, where S° - S hardly varies.
                    shift = g[0, 0].clone()
                g.sub_(shift).diagonal(start).zero_()
                teacher_diagonal[rows] = t.diagonal(start)
                t.diagonal(start).fill_(lowest)
                teacher_sums.add(t, start, work[:h], g)
            diagonal[rows] = s.diagonal(start)
            s.diagonal(start).fill_(lowest)
            if plain is not None:
                plain.add(s, start, work[:h])
            if masked is not None:
                assert group_ids is not None
                masked.add(s.masked_fill_(group_ids[rows, None] == group_ids, lowest), start, work[:h])

        sums = Sums(
            diagonal,
            teacher_diagonal,
            shift,
            None if plain is None else plain.sums()[:2],
            None if masked is None else masked.sums()[:2],
            None if teacher is None else teacher_sums.sums(),
        )
        return sums, torch.empty(0, dtype=torch.uint8, device=strip.device)

    def backward(
        self,
        problem: Problem,
        state: Tensor,
        weight_retention: Tensor,
        weight_consistency: Tensor,
        strip_rows: int,
        kept: Tensor,
        need_image: bool,
        need_text: bool,
        need_scale: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, dtype, group_ids = problem.n, state.dtype, problem.group_ids
        image, text = problem.image, problem.text
        lowest = torch.finfo(dtype).min
        student, teacher = _Similarity(image, text, problem.scale, dtype), _teacher(problem, dtype)
        height = _strip_height(n, strip_rows, student.text)
        strip, gradient, work = _buffers(3, height, n, student.text)
        if teacher is not None:
            (teacher_strip,) = _buffers(1, height, n, student.text)
        terms = finish.gradient_terms(
            state, weight_retention, weight_consistency,
            problem.masked, problem.want_retention, problem.want_consistency,
        )  # fmt: skip

        grad_image = image.new_empty(image.shape if need_image else (0,))
        grad_text = student.text.new_zeros(text.shape if need_text else (0,))
        grad_scale = state.new_zeros(())
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h = rows.stop - start
            s, g, w = student.strip(start, rows.stop, strip), gradient[:h].zero_(), work[:h]
            s.diagonal(start).fill_(lowest)
            if terms.student is not None:
                _add_softmax(g, s, rows, w, terms.student)
            if terms.teacher is not None:
                assert teacher is not None
                t = teacher.strip(start, rows.stop, teacher_strip)
                t.diagonal(start).fill_(lowest)
                _add_softmax(g, t, rows, w, terms.teacher)
            if terms.masked is not None:
                assert group_ids is not None
                s.masked_fill_(group_ids[rows, None] == group_ids, lowest)
                _add_softmax(g, s, rows, w, terms.masked)
            g.diagonal(start).copy_(terms.diagonal[rows])

            image_rows = student.image_rows(start, rows.stop)
            if need_image or need_scale:
                product = g @ student.text  # [h, D]
                if need_scale:  # before the factor s, which may be 0
                    grad_scale += (product * image_rows).sum()
                if need_image:
                    grad_image[rows] = product.mul_(student.scale)
            if need_text:
                grad_text.addmm_(g.T, image_rows)
        grad_text = grad_text.mul_(student.scale).to(text.dtype)
        return grad_image, grad_text, grad_scale.to(problem.scale.dtype)


def _teacher(problem: Problem, dtype: torch.dtype) -> _Similarity | None:
    if problem.teacher_image is None or problem.teacher_text is None or problem.teacher_scale is None:
        return None
    return _Similarity(problem.teacher_image, problem.teacher_text, problem.teacher_scale, dtype)


def _add_softmax(gradient: Tensor, strip: Tensor, rows: slice, work: Tensor, softmax: finish.Softmax) -> None:
    torch.sub(strip, softmax.anchor[0, rows, None], out=work).exp_()
    gradient.addcmul_(work, softmax.factor[0, rows, None])
    torch.sub(strip, softmax.anchor[1], out=work).exp_()
    gradient.addcmul_(work, softmax.factor[1])


def _strip_height(n: int, strip_rows: int, like: Tensor) -> int:
    budget = _STRIP_BYTES_CPU if like.device.type == "cpu" else _STRIP_BYTES_GPU
    return min(n, strip_rows or max(_LEAST_ROWS, budget // (n * like.element_size())))


def _buffers(count: int, height: int, n: int, like: Tensor) -> list[Tensor]:
    return [like.new_empty(height, n) for _ in range(count)]


sweep = as_sweep(_TorchEngine())
