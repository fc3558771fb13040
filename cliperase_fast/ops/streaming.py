"""Backend "torch": the loss sweep in strips of rows, in plain PyTorch, on any device.

No N x N matrix in either direction. Forward: each strip [h, N] of S (and S°) is formed once; its rows are
complete, its columns are merged into running maxima and sums; what is kept is O(N). Backward: each strip is
formed again and turned into a strip of dS, from which dI = s dS T, dT = s dSᵀ I and ds = Σ_i <(dS T)_i, I_i>.
Both are custom ops, so `torch.compile` takes them as they are.

Names: r is the log-odds of the rest of a row or column against its diagonal entry (see `ops/sweep.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops import finish
from cliperase_fast.ops.sweep import compute_dtype, no_autocast

# Bytes of one strip matrix; four are alive at once. Small strips stay in a CPU's cache; a GPU wants fewer
# launches.
_STRIP_BYTES_CPU = 8 << 20
_STRIP_BYTES_GPU = 32 << 20
_LEAST_ROWS = 64

_SWEEP_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? teacher_image, Tensor? teacher_text, "
    "Tensor? teacher_logit_scale, Tensor? group_ids, bool want_retention, bool want_consistency, "
    "int strip_size"
)


def sweep(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `ops.sweep.Sweep`. strip_size: rows in a strip; 0 chooses by size. Memory: four strips [h, N]."""
    retention, consistency, _ = streamed_sweep(
        image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale, group_ids,
        want_retention, want_consistency, strip_size,
    )  # fmt: skip
    return retention, consistency


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

    def log_odds(self, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """r of the rows and of the columns, [N] each."""
        row = finish.log_odds(self.row_max, self.row_sum, diagonal)
        return row, finish.log_odds(self.column_max, self.column_sum, diagonal)

    def mean_gap(self) -> Tensor:
        return torch.stack((self.row_gap / self.row_sum, self.column_gap / self.column_sum))  # [2, N]


@torch.library.custom_op(
    "cliperase_fast::streamed_sweep",
    mutates_args=(),
    schema=f"({_SWEEP_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def streamed_sweep(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(retention, consistency, state [8, N]); see `ops/finish.py` for the state."""
    n, dtype = len(image), compute_dtype(image, text, teacher_image, teacher_text)
    lowest = torch.finfo(dtype).min
    with no_autocast(image):
        student = _Similarity(image, text, logit_scale, dtype)
        height = _strip_height(n, strip_size, student.text)
        strip, work = _buffers(2, height, n, student.text)
        state = student.text.new_zeros(8, n)
        unmasked = _OffDiagonal(n, state, with_gap=False) if want_consistency or group_ids is None else None
        masked = _OffDiagonal(n, state, with_gap=False) if want_retention and group_ids is not None else None
        if want_consistency:
            assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
            teacher = _Similarity(teacher_image, teacher_text, teacher_logit_scale, dtype)
            teacher_sums = _OffDiagonal(n, state, with_gap=True)
            teacher_strip, gap = _buffers(2, height, n, student.text)

        shift = None
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            h = rows.stop - start
            s = student.strip(start, rows.stop, strip)
            if want_consistency:
                t = teacher.strip(start, rows.stop, teacher_strip)
                g = torch.sub(t, s, out=gap[:h])
                if shift is None:
                    # Any constant would do; this one keeps the gaps small, so exact, where S° - S hardly
                    # varies.
                    shift = g[0, 0].clone()
                g.sub_(shift).diagonal(start).zero_()
                state[1, rows] = t.diagonal(start)
                t.diagonal(start).fill_(lowest)
                teacher_sums.add(t, start, work[:h], g)
            state[0, rows] = s.diagonal(start)
            s.diagonal(start).fill_(lowest)
            if unmasked is not None:
                unmasked.add(s, start, work[:h])
            if masked is not None:
                assert group_ids is not None
                masked.add(s.masked_fill_(group_ids[rows, None] == group_ids, lowest), start, work[:h])

        mean_gap = None
        if unmasked is not None:
            state[4], state[5] = unmasked.log_odds(state[0])
            state[2:4] = state[4:6]
        if masked is not None:
            state[2], state[3] = masked.log_odds(state[0])
        if want_consistency:
            state[6], state[7] = teacher_sums.log_odds(state[1])
            mean_gap = teacher_sums.mean_gap()
        retention, consistency = finish.losses(state, mean_gap, shift, want_retention, want_consistency)
        return retention, consistency, state


@torch.library.custom_op(
    "cliperase_fast::streamed_sweep_backward",
    mutates_args=(),
    schema=f"(Tensor grad_retention, Tensor grad_consistency, Tensor state, {_SWEEP_ARGUMENTS}, "
    "bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)",
)
def streamed_sweep_backward(
    grad_retention: Tensor,
    grad_consistency: Tensor,
    state: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_size: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and logit_scale, each in its own dtype; an empty tensor for one not needed."""
    n, dtype = len(image), state.dtype
    lowest = torch.finfo(dtype).min
    with no_autocast(image):
        student = _Similarity(image, text, logit_scale, dtype)
        height = _strip_height(n, strip_size, student.text)
        strip, gradient, work = _buffers(3, height, n, student.text)
        terms = finish.gradient_terms(
            state, 0.5 * grad_retention / n, grad_consistency / n,
            group_ids is not None, want_retention, want_consistency,
        )  # fmt: skip
        if want_consistency:
            assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
            teacher = _Similarity(teacher_image, teacher_text, teacher_logit_scale, dtype)
            (teacher_strip,) = _buffers(1, height, n, student.text)

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
        return grad_image, grad_text, grad_scale.to(logit_scale.dtype)


def _add_softmax(gradient: Tensor, strip: Tensor, rows: slice, work: Tensor, softmax: finish.Softmax) -> None:
    torch.sub(strip, softmax.anchor[0, rows, None], out=work).exp_()
    gradient.addcmul_(work, softmax.factor[0, rows, None])
    torch.sub(strip, softmax.anchor[1], out=work).exp_()
    gradient.addcmul_(work, softmax.factor[1])


def _strip_height(n: int, strip_size: int, like: Tensor) -> int:
    budget = _STRIP_BYTES_CPU if like.device.type == "cpu" else _STRIP_BYTES_GPU
    return min(n, strip_size or max(_LEAST_ROWS, budget // (n * like.element_size())))


def _buffers(count: int, height: int, n: int, like: Tensor) -> list[Tensor]:
    return [like.new_empty(height, n) for _ in range(count)]


@streamed_sweep.register_fake
def _(image: Tensor, text: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(image, text, arguments[1], arguments[2])
    state = image.new_empty((8, image.shape[0]), dtype=dtype)
    return state.new_empty(()), state.new_empty(()), state


@streamed_sweep_backward.register_fake
def _(
    grad_retention: Tensor,
    grad_consistency: Tensor,
    state: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_image, need_text = arguments[-3:-1]
    return (
        image.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
        logit_scale.new_empty(()),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.want_retention, ctx.want_consistency, ctx.strip_size = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx: Any, grad_retention: Tensor, grad_consistency: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    state, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = streamed_sweep_backward(
        grad_retention, grad_consistency, state, *tensors,
        ctx.want_retention, ctx.want_consistency, ctx.strip_size, *need,
    )  # fmt: skip
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, need, strict=True))
    return *wanted, *[None] * 7


streamed_sweep.register_autograd(_backward, setup_context=_keep_for_backward)
