"""Cross-entropies of rectangular similarities [n, N], by row, in strips of rows: a rank's own pairs against everyone's.

With S = s Q Kᵀ and pair i's own key in column offset + i, per row and as in `ops/spec.py` (r: log-odds of the rest):

    contrastive  -log softmax(S_i)_own = log(1 + exp(r_i))
    distill      -Σ_j P°_ij log P_ij = log(1 + exp(r_i)) - Σ_{j≠own} P°_ij (S_ij - S_i,own)

No [n, N] matrix in either direction: a strip is complete in itself, and formed again for the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops import eager, softmax_stats
from cliperase_fast.ops.spec import compute_dtype, no_autocast
from cliperase_fast.ops.streaming import Similarity, strip_height
from cliperase_fast.ops.transforms import refuse_second_derivative, transformed

# The rows of the state [6, n]: r, anchor and factor as in `ops/softmax_stats.py`, of S and of S°, 0 without a teacher.
_STUDENT, _TEACHER = slice(0, 3), slice(3, 6)

_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor logit_scale, Tensor? teacher_query, Tensor? teacher_keys, "
    "Tensor? teacher_logit_scale, int offset, int strip_rows"
)


class _Rows:
    """Strips of S and of S°, their own entries taken out (set to the lowest number)."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        scale: Tensor,
        teacher_query: Tensor | None,
        teacher_keys: Tensor | None,
        teacher_scale: Tensor | None,
        offset: int,
        strip_rows: int,
    ) -> None:
        self.dtype = compute_dtype(query, keys, teacher_query, teacher_keys)
        self.n, self.offset = len(query), offset
        self.student = Similarity(query, keys, scale, self.dtype)
        self.teacher = None
        if teacher_query is not None and teacher_keys is not None and teacher_scale is not None:
            self.teacher = Similarity(teacher_query, teacher_keys, teacher_scale, self.dtype)
        self.height = strip_height(self.n, len(keys), strip_rows, self.student.text)
        count = 1 if self.teacher is None else 2
        self._buffers = [self.student.text.new_empty(self.height, len(keys)) for _ in range(count)]

    def __iter__(self) -> Any:
        """(rows, S without own, own of S, S° without own, own of S°) strip by strip; the teacher's are None, None."""
        for start in range(0, self.n, self.height):
            rows = slice(start, min(start + self.height, self.n))
            strip, own = self._strip(self.student, rows, self._buffers[0])
            teacher_strip = teacher_own = None
            if self.teacher is not None:
                teacher_strip, teacher_own = self._strip(self.teacher, rows, self._buffers[1])
            yield rows, strip, own, teacher_strip, teacher_own

    def own(self, strip: Tensor, rows: slice) -> Tensor:
        """The entries of the rows' own keys, a view [h]."""
        return strip.diagonal(self.offset + rows.start)

    def _strip(self, similarity: Similarity, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        strip = similarity.strip(rows.start, rows.stop, buffer)  # [h, N]
        own = self.own(strip, rows).clone()
        self.own(strip, rows).fill_(torch.finfo(self.dtype).min)
        return strip, own


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(arguments[0]):
        problem = _Rows(*arguments)
        state = problem.student.text.new_zeros(6, problem.n)
        distill = state.new_zeros(problem.n)
        for rows, strip, own, teacher_strip, teacher_own in problem:
            state[_STUDENT, rows] = _anchored(strip, own)
            if teacher_strip is not None:
                state[_TEACHER, rows] = _anchored(teacher_strip, teacher_own)
                p_teacher = _softmax(teacher_strip, state[_TEACHER, rows])
                problem.own(strip, rows).copy_(own)  # weighed by a probability of 0
                expected = p_teacher.mul_(strip.sub_(own[:, None])).sum(1)  # [h]
                distill[rows] = softmax_stats.log1p_exp(state[0, rows]) - expected
        contrastive = softmax_stats.log1p_exp(state[0])
        return contrastive.mean(), distill.mean(), state


def _backward(
    grad_contrastive: Tensor, grad_distill: Tensor, state: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, scale = arguments[:3]
    with no_autocast(query):
        problem = _Rows(*arguments)
        student = problem.student
        weight_distill = grad_distill / problem.n if problem.teacher is not None else torch.zeros_like(grad_distill)
        weight_contrastive = grad_contrastive / problem.n
        rest, teacher_rest = softmax_stats.rest(state[_STUDENT][0]), softmax_stats.rest(state[_TEACHER][0])  # [n]
        of_own = weight_distill * (teacher_rest - rest) - weight_contrastive * rest  # [n]
        grad_query = query.new_empty(query.shape)
        grad_keys = torch.zeros_like(student.text)
        grad_scale = state.new_zeros(())
        for rows, strip, _, teacher_strip, _ in problem:
            gradient = _softmax(strip, state[_STUDENT, rows], weight_contrastive + weight_distill)  # [h, N]
            if teacher_strip is not None:
                gradient -= _softmax(teacher_strip, state[_TEACHER, rows], weight_distill)
            problem.own(gradient, rows).copy_(of_own[rows])
            query_rows = student.image_rows(rows.start, rows.stop)
            product = gradient @ student.text  # [h, D]
            grad_scale += (product * query_rows).sum()  # before the factor s, which may be 0
            grad_query[rows] = product.mul_(student.scale)
            grad_keys.addmm_(gradient.T, query_rows)
        return grad_query, grad_keys.mul_(student.scale).to(keys.dtype), grad_scale.to(scale.dtype)


def _anchored(strip: Tensor, own: Tensor) -> Tensor:
    """[3, h], see `softmax_stats.anchored`."""
    maximum = strip.amax(1)
    return torch.stack(softmax_stats.anchored(maximum, (strip - maximum[:, None]).exp_().sum(1), own))


def _softmax(strip: Tensor, state: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The weight times each row's softmax, 0 at its own entry; in place of the strip. state: [3, h]."""
    _, anchor, factor = state
    return strip.sub_(anchor[:, None]).exp_().mul_((weight * factor)[:, None])


_forward_op = torch.library.custom_op(
    "cliperase_fast::row_losses",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "cliperase_fast::row_losses_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad_contrastive, Tensor grad_distill, Tensor state, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(query: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    state = query.new_empty((6, len(query)), dtype=compute_dtype(query, keys, *rest[1:3]))
    return state.new_empty(()), state.new_empty(()), state


@_backward_op.register_fake
def _(grad_contrastive: Tensor, grad_distill: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, scale = rest[:3]
    return query.new_empty(query.shape), keys.new_empty(keys.shape), scale.new_empty(())


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, offset, strip_rows = inputs
    ctx.options = (offset, strip_rows)
    ctx.save_for_backward(output[2], *tensors)


def _differentiate(ctx: Any, grad_contrastive: Tensor, grad_distill: Tensor, _state: Tensor | None) -> tuple[Any, ...]:
    state, *tensors = ctx.saved_tensors
    gradients = _backward_op(grad_contrastive, grad_distill, state, *tensors, *ctx.options)
    return *gradients, *[None] * 5


_forward_op.register_autograd(_differentiate, setup_context=_keep)
refuse_second_derivative(_backward_op, "compute the whole batch with clip_loss(..., backend='eager')")


def row_losses(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor | None,
    teacher_keys: Tensor | None,
    teacher_logit_scale: Tensor | None,
    offset: int,
    strip_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """(contrastive, distill), means over the rows, 0-d in `compute_dtype`; see the head of this file.

    query: [n, D], n >= 1; keys: [N, D] with offset + n <= N; teacher_*: [n, D°] and [N, D°], or all None (distill is
    then 0), without gradient. Scales: 0-d. Differentiable in query, keys and logit_scale. The caller has checked.
    """
    tensors = (query, keys, logit_scale, teacher_query, teacher_keys, teacher_logit_scale)
    if transformed(*tensors):
        return eager.row_losses(*tensors, offset)
    contrastive, distill, _ = _forward_op(*tensors, offset, strip_rows)
    return contrastive, distill
