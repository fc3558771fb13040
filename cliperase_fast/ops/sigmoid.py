"""The sigmoid loss over all pairs of a batch (SigLIP, arXiv 2303.15343): what its backends do, and the op made of it.

With X = s I Tᵀ + b [n, m] and Y = X, but -X where row i and column i + offset are a pair,

    loss  Σ_ij log(1 + exp(Y_ij)) / n        dY_ij  sigmoid(Y_ij) / n

An entry of dX needs nothing of the others, so one pass forms X, sums the losses and multiplies dX with the features:
three products in place of four. What is kept for the backward pass is the gradients for a grad_output of 1,
O((n + m) D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.autograd import watched
from cliperase_fast.ops.spec import SimilarityInputs, compute_dtype, no_autocast
from cliperase_fast.ops.streaming import Similarity, strip_height
from cliperase_fast.ops.transforms import first_derivative_only


class SigmoidParts(NamedTuple):
    """Stats over all entries, not divided by n, in the computing dtype; of a gradient not needed an empty tensor."""

    loss: Tensor  # []
    grad_image: Tensor  # [n, D]
    grad_text: Tensor  # [m, D]
    grad_scale: Tensor  # []
    grad_bias: Tensor  # []


class SigmoidKernels(Protocol):
    """What a streamed backend does itself."""

    name: str

    def sigmoid(
        self,
        problem: SimilarityInputs,
        bias: Tensor,
        need_image: bool,
        need_text: bool,
        need_scalars: bool,
        strip_rows: int,
    ) -> SigmoidParts:
        """problem: image, text, scale and offset count. need_scalars: of scale and bias. strip_rows: 0, any."""
        ...


class Sigmoid(NamedTuple):
    """What a backend brings. engine: what computes the shards of a batch; None: it cannot."""

    loss: Callable[..., Tensor]  # (image, text, logit_scale, logit_bias, offset, strip_rows=0) -> 0-d, see `as_sigmoid`
    engine: SigmoidKernels | None = None


def sigmoid_problem(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> SimilarityInputs:
    """offset: row i and column i + offset are a pair; m: there are no pairs."""
    return SimilarityInputs(image, text, scale, None, None, None, None, True, False, None, offset)


class _TorchSigmoid:
    """In strips of rows, in plain PyTorch, on any device. Memory: two strips [h, m]."""

    name = "torch"

    def sigmoid(
        self,
        problem: SimilarityInputs,
        bias: Tensor,
        need_image: bool,
        need_text: bool,
        need_scalars: bool,
        strip_rows: int,
    ) -> SigmoidParts:
        n, m, dtype = problem.n, problem.m, problem.compute_dtype()
        similarity = Similarity(problem.image, problem.text, problem.scale, dtype)
        text, bias = similarity.text, bias.to(dtype)
        height = strip_height(n, m, strip_rows, text)
        strip = text.new_empty(height, m)
        grad_image = text.new_empty(problem.image.shape if need_image else (0,))
        grad_text = text.new_zeros(text.shape if need_text else (0,))
        loss, grad_scale, grad_bias = (text.new_zeros(()) for _ in range(3))
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            own = start + problem.offset
            y = similarity.strip(start, rows.stop, strip).add_(bias)  # [h, m]
            y.diagonal(own).neg_()
            loss += F.softplus(y, threshold=40).sum()  # beyond it log(1 + exp(y)) is y, in float64 too
            if not (need_image or need_text or need_scalars):
                continue
            y.sigmoid_().diagonal(own).neg_()
            image_rows = similarity.image_rows(start, rows.stop)
            if need_image or need_scalars:
                product = y @ text  # [h, D]
                if need_scalars:
                    grad_scale += (product * image_rows).sum()  # before the factor s, which may be 0
                    grad_bias += y.sum()
                if need_image:
                    grad_image[rows] = product.mul_(similarity.scale)
            if need_text:
                grad_text.addmm_(y.T, image_rows)
        return SigmoidParts(loss, grad_image, grad_text.mul_(similarity.scale), grad_scale, grad_bias)


_SCHEMA = (
    "(Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, int offset, bool need_image, bool need_text, "
    "bool need_scalars, int strip_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def as_sigmoid(engine: SigmoidKernels) -> Sigmoid:
    """Register the custom op `cliperase_fast::NAME_sigmoid`; returns the loss on it. Called once an engine."""

    def run(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, *needs_and_strip_rows: Any
    ) -> SigmoidParts:
        with no_autocast(image):
            return engine.sigmoid(sigmoid_problem(image, text, scale, offset), bias, *needs_and_strip_rows)

    op = torch.library.custom_op(f"cliperase_fast::{engine.name}_sigmoid", run, mutates_args=(), schema=_SCHEMA)
    op.register_fake(_fake)
    op.register_autograd(lambda ctx, grad, *_: _gradients(ctx, grad), setup_context=_keep)

    class Directly(torch.autograd.Function):
        """Without the op, which costs a small batch more than its loss does."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            parts = run(*arguments)
            _keep(ctx, arguments, parts)
            return parts.loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
            return _gradients(ctx, grad)

    def loss(
        image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, strip_rows: int = 0
    ) -> Tensor:
        """The loss, 0-d in `compute_dtype`; see the head of this file. Differentiable in all four tensors.

        image: [n, D], n >= 1; text: [m, D]; logit_scale, logit_bias: 0-d. offset: row i and column i + offset are a
        pair; m: there are no pairs. The caller checks.
        """
        tensors = (image, text, logit_scale, logit_bias)
        image_too, text_too, scale_too, bias_too = (
            tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors
        )
        arguments = (*tensors, offset, image_too, text_too, scale_too or bias_too, strip_rows)
        if torch.compiler.is_compiling() or watched(tensors):
            return op(*arguments)[0] / len(image)
        return Directly.apply(*arguments) / len(image)

    return Sigmoid(loss, engine)


def _fake(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, need_image: bool, need_text: bool, *rest: Any
) -> SigmoidParts:
    like = image.new_empty((), dtype=compute_dtype(image, text))
    shapes = ((), image.shape if need_image else (0,), text.shape if need_text else (0,), (), ())
    return SigmoidParts(*(like.new_empty(shape) for shape in shapes))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [tensor.dtype for tensor in inputs[:4]]
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as what is kept
    ctx.save_for_backward(*output[1:], *inputs[:4])  # the inputs only for what `first_derivative_only` asks of them


@first_derivative_only
def _gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Any, ...]:
    """Of each argument of the op."""
    found: list[Tensor | None] = [None] * 9
    if grad is not None:
        for place in range(4):
            if ctx.needs_input_grad[place]:
                found[place] = (saved[place] * grad).to(ctx.dtypes[place])
    return tuple(found)


sigmoid = as_sigmoid(_TorchSigmoid())
