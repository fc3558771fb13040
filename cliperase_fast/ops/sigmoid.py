"""The sigmoid loss over all pairs of a batch (SigLIP, arXiv 2303.15343), in strips of rows.

With X = s I Tᵀ + b [n, m] and Y = X, but -X on the diagonal where the pairs match,

    loss  Σ_ij log(1 + exp(Y_ij)) / n        dY_ij  sigmoid(Y_ij) / n

No [n, m] matrix in either direction: the gradients form their strip of Y again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.streaming import Similarity, strip_height
from cliperase_fast.ops.sweep import compute_dtype, no_autocast

_ARGUMENTS = "Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, bool negative_only, int strip_rows"


def _strips(
    similarity: Similarity, bias: Tensor, negative_only: bool, strip_rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, Y of them), strip by strip."""
    n, m = len(similarity.image), len(similarity.text)
    height = strip_height(n, m, strip_rows, similarity.text)
    buffer = similarity.text.new_empty(height, m)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        strip = similarity.strip(rows.start, rows.stop, buffer).add_(bias)  # [h, m]
        if not negative_only:
            strip.diagonal(start).neg_()
        yield rows, strip


def _forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, negative_only: bool, strip_rows: int) -> Tensor:
    with no_autocast(image):
        similarity = Similarity(image, text, scale, compute_dtype(image, text))
        losses = similarity.text.new_empty(len(image))
        for rows, strip in _strips(similarity, bias.to(similarity.dtype), negative_only, strip_rows):
            losses[rows] = F.softplus(strip).sum(1)
        return losses.mean()


def _backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, negative_only: bool, strip_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(image):
        similarity = Similarity(image, text, scale, compute_dtype(image, text))
        grad_image = image.new_empty(image.shape)
        grad_text = torch.zeros_like(similarity.text)
        grad_scale, grad_bias = grad.new_zeros(()), grad.new_zeros(())
        for rows, strip in _strips(similarity, bias.to(similarity.dtype), negative_only, strip_rows):
            gradient = strip.sigmoid_().mul_(grad / len(image))
            if not negative_only:
                gradient.diagonal(rows.start).neg_()
            grad_bias += gradient.sum()
            image_rows = similarity.image_rows(rows.start, rows.stop)
            product = gradient @ similarity.text  # [h, D]
            grad_scale += (product * image_rows).sum()  # before the factor s, which may be 0
            grad_image[rows] = product.mul_(similarity.scale)
            grad_text.addmm_(gradient.T, image_rows)
        grad_text = grad_text.mul_(similarity.scale).to(text.dtype)
        return grad_image, grad_text, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)


_forward_op = torch.library.custom_op(
    "cliperase_fast::sigmoid_loss", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_backward_op = torch.library.custom_op(
    "cliperase_fast::sigmoid_loss_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(image: Tensor, text: Tensor, *rest: Any) -> Tensor:
    return image.new_empty((), dtype=compute_dtype(image, text))


@_backward_op.register_fake
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in rest[:4])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, negative_only, strip_rows = inputs
    ctx.options = (negative_only, strip_rows)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)


def sigmoid_sweep(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, negative_only: bool, strip_rows: int = 0
) -> Tensor:
    """The loss, 0-d in `compute_dtype`; see the head of this file. Differentiable in all four tensors.

    image: [n, D], n >= 1; text: [m, D], m = n unless negative_only. logit_scale, logit_bias: 0-d. The caller checks.
    """
    return _forward_op(image, text, logit_scale, logit_bias, negative_only, strip_rows)
