"""Compute row cross-entropies of similarities [n, N], in strips of rows: a rank's own pairs against all ranks' keys.

With S = s Q Kᵀ and pair i's own key in column pair_offset + i, per row and as in `ops/spec.py`:

    contrastive  -log softmax(S_i)_own = log(1 + exp(r_i))
    distill      -Σ_j P°_ij log P_ij = log(1 + exp(r_i)) - Σ_{j≠own} P°_ij (S_ij - S_i,own)

Neither pass forms an [n, N] matrix: each strip is complete in itself, and is formed again for the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.spec import SimilarityInputs, anchored, compute_dtype, log1p_exp, no_autocast, one_minus_p
from cliperase_fast.ops.streaming import Similarity, strip_height
from cliperase_fast.ops.transforms import refuse_second_derivative

# Rows of the saved stats [6, n]: r, anchor and factor as in `ops/spec.py`, of S and of S°; 0 without a teacher.
_STUDENT, _TEACHER = slice(0, 3), slice(3, 6)

_ARGUMENTS = (
    "Tensor query, Tensor keys, Tensor scale, Tensor? teacher_query, Tensor? teacher_keys, Tensor? teacher_scale, "
    "int pair_offset, int strip_rows"
)


def _flatten(inputs: SimilarityInputs) -> tuple[Any, ...]:
    return (
        inputs.image, inputs.text, inputs.scale, inputs.teacher_image, inputs.teacher_text, inputs.teacher_scale,
        inputs.pair_offset, inputs.strip_rows,
    )  # fmt: skip


def _unflatten(*arguments: Any) -> SimilarityInputs:
    query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset, strip_rows = arguments
    return SimilarityInputs(
        query, keys, scale, teacher_query, teacher_keys, teacher_scale, pair_offset=pair_offset, strip_rows=strip_rows
    )


class _Rows:
    """Form strips of S and of S°, with the own entries excluded (set to the lowest number)."""

    def __init__(self, inputs: SimilarityInputs) -> None:
        self.dtype = inputs.dtype
        self.n, self.pair_offset = inputs.n, inputs.pair_offset
        self.student = Similarity(inputs.image, inputs.text, inputs.scale, self.dtype)
        self.teacher = None if inputs.teacher is None else Similarity(*inputs.teacher, self.dtype)
        self.height = strip_height(self.n, inputs.m, inputs.strip_rows, self.student.text)
        count = 1 if self.teacher is None else 2
        self._buffers = [self.student.text.new_empty(self.height, inputs.m) for _ in range(count)]

    def __iter__(self) -> Any:
        """Yield (rows, S without own, own of S, S° without own, own of S°) for each strip; None without a teacher."""
        for start in range(0, self.n, self.height):
            rows = slice(start, min(start + self.height, self.n))
            strip, own = self._strip(self.student, rows, self._buffers[0])
            teacher_strip = teacher_own = None
            if self.teacher is not None:
                teacher_strip, teacher_own = self._strip(self.teacher, rows, self._buffers[1])
            yield rows, strip, own, teacher_strip, teacher_own

    def own(self, strip: Tensor, rows: slice) -> Tensor:
        """Return the entries of the rows' own keys, a view [h]."""
        return strip.diagonal(self.pair_offset + rows.start)

    def _strip(self, similarity: Similarity, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        strip = similarity.strip(rows.start, rows.stop, buffer)  # [h, N]
        own = self.own(strip, rows).clone()
        self.own(strip, rows).fill_(torch.finfo(self.dtype).min)
        return strip, own


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _unflatten(*arguments)
    with no_autocast(inputs.image):
        similarities = _Rows(inputs)
        saved = similarities.student.text.new_zeros(6, inputs.n)
        distill = saved.new_zeros(inputs.n)
        for rows, strip, own, teacher_strip, teacher_own in similarities:
            saved[_STUDENT, rows] = _anchored(strip, own)
            if teacher_strip is not None:
                saved[_TEACHER, rows] = _anchored(teacher_strip, teacher_own)
                p_teacher = _softmax(teacher_strip, saved[_TEACHER, rows])
                similarities.own(strip, rows).copy_(own)  # weighted by a probability of 0
                expected = p_teacher.mul_(strip.sub_(own[:, None])).sum(1)  # [h]
                distill[rows] = log1p_exp(saved[0, rows]) - expected
        return log1p_exp(saved[0]).mean(), distill.mean(), saved


def _backward(
    grad_contrastive: Tensor, grad_distill: Tensor, saved: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _unflatten(*arguments)
    with no_autocast(inputs.image):
        similarities = _Rows(inputs)
        student = similarities.student
        weight_distill = grad_distill / inputs.n if inputs.teacher is not None else torch.zeros_like(grad_distill)
        weight_contrastive = grad_contrastive / inputs.n
        of_student, of_teacher = one_minus_p(saved[_STUDENT][0]), one_minus_p(saved[_TEACHER][0])  # [n]
        of_own = weight_distill * (of_teacher - of_student) - weight_contrastive * of_student  # [n]
        grad_query = inputs.image.new_empty(inputs.image.shape)
        grad_keys = torch.zeros_like(student.text)
        grad_scale = saved.new_zeros(())
        for rows, strip, _, teacher_strip, _ in similarities:
            gradient = _softmax(strip, saved[_STUDENT, rows], weight_contrastive + weight_distill)  # [h, N]
            if teacher_strip is not None:
                gradient -= _softmax(teacher_strip, saved[_TEACHER, rows], weight_distill)
            similarities.own(gradient, rows).copy_(of_own[rows])
            query_rows = student.image_rows(rows.start, rows.stop)
            product = gradient @ student.text  # [h, D]
            grad_scale += (product * query_rows).sum()  # before the factor s, which may be 0
            grad_query[rows] = product.mul_(student.scale)
            grad_keys.addmm_(gradient.T, query_rows)
        grad_keys = grad_keys.mul_(student.scale).to(inputs.text.dtype)
        return grad_query, grad_keys, grad_scale.to(inputs.scale.dtype)


def _anchored(strip: Tensor, own: Tensor) -> Tensor:
    """Return r, anchor and factor [3, h], see `ops.spec.anchored`."""
    maximum = strip.amax(1)
    return torch.stack(anchored(maximum, (strip - maximum[:, None]).exp_().sum(1), own))


def _softmax(strip: Tensor, saved: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Replace the strip by the weight times each row's softmax, 0 at its own entry. saved: [3, h]."""
    _, anchor, factor = saved
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
    schema=f"(Tensor grad_contrastive, Tensor grad_distill, Tensor saved, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(query: Tensor, keys: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = query.new_empty((6, len(query)), dtype=compute_dtype(query, keys, *others[1:3]))
    return saved.new_empty(()), saved.new_empty(()), saved


@_backward_op.register_fake
def _(grad_contrastive: Tensor, grad_distill: Tensor, saved: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, scale = others[:3]
    return query.new_empty(query.shape), keys.new_empty(keys.shape), scale.new_empty(())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, pair_offset, strip_rows = inputs
    ctx.options = (pair_offset, strip_rows)
    ctx.save_for_backward(output[2], *tensors)


def _differentiate(ctx: Any, grad_contrastive: Tensor, grad_distill: Tensor, _saved: Tensor | None) -> tuple[Any, ...]:
    saved, *tensors = ctx.saved_tensors
    gradients = _backward_op(grad_contrastive, grad_distill, saved, *tensors, *ctx.options)
    return *gradients, *[None] * 5


_forward_op.register_autograd(_differentiate, setup_context=_save)
refuse_second_derivative(_backward_op, "compute the whole batch with clip_loss(..., backend='eager')")


def row_losses(inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
    """Return (contrastive, distill), means over the rows, 0-d in `inputs.dtype`; see the head of this file.

    inputs: image is the queries [n, D], n >= 1, and text the keys [N, D] with pair_offset + n <= N; distill is 0
    without a teacher. Differentiable in queries, keys and scale. The caller must have checked the inputs.
    """
    contrastive, distill, _ = _forward_op(*_flatten(inputs))
    return contrastive, distill
