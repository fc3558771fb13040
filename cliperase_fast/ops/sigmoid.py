"""Compute the sigmoid loss over all pairs of a batch (SigLIP, arXiv 2303.15343); make an op of a backend's kernels.

With X = s I Tᵀ + b [n, m] and Y = X, but -X where row i and column i + pair_offset are a pair,

    loss  Σ_ij log(1 + exp(Y_ij)) / n        dY_ij  sigmoid(Y_ij) / n

Each entry of dX depends on its own X only, so one pass forms X, sums the losses and multiplies dX with the features:
three products instead of four. The gradients for a grad_output of 1 are kept for the backward pass, O((n + m) D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.autograd import watched
from cliperase_fast.ops.spec import Need, SimilarityInputs, compute_dtype, no_autocast
from cliperase_fast.ops.streaming import Similarity, strip_height
from cliperase_fast.ops.transforms import first_derivative_only


class SigmoidParts(NamedTuple):
    """Hold sums over all entries, not divided by n, in the computing dtype; gradients not needed are empty tensors."""

    loss: Tensor  # []
    grad_image: Tensor  # [n, D]
    grad_text: Tensor  # [m, D]
    grad_scale: Tensor  # []
    grad_bias: Tensor  # []


class SigmoidKernels(Protocol):
    """Define what a streamed backend provides; `as_sigmoid` makes a differentiable loss of it."""

    name: str  # of its custom op

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        """Return the sums for image, text, scale, bias and pair_offset of `inputs`. need.scale covers the bias too."""
        ...


class Sigmoid(NamedTuple):
    """Hold the sigmoid loss of a backend."""

    loss: Callable[[SimilarityInputs], Tensor]  # 0-d, differentiable in image, text, scale and bias
    kernels: SigmoidKernels | None = None  # for a sharded batch; None: not supported


class _TorchSigmoid:
    """Work in strips of rows, in plain PyTorch, on any device. Memory: two strips [h, m]."""

    name = "torch"

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        assert inputs.bias is not None
        n, m, dtype = inputs.n, inputs.m, inputs.dtype
        similarity = Similarity(inputs.image, inputs.text, inputs.scale, dtype)
        text, bias = similarity.text, inputs.bias.to(dtype)
        height = strip_height(n, m, inputs.strip_rows, text)
        strip = text.new_empty(height, m)
        grad_image = text.new_empty(inputs.image.shape if need.image else (0,))
        grad_text = text.new_zeros(text.shape if need.text else (0,))
        loss, grad_scale, grad_bias = (text.new_zeros(()) for _ in range(3))
        for start in range(0, n, height):
            rows = slice(start, min(start + height, n))
            own = start + inputs.pair_offset
            y = similarity.strip(start, rows.stop, strip).add_(bias)  # [h, m]
            y.diagonal(own).neg_()
            loss += F.softplus(y, threshold=40).sum()  # above 40, log(1 + exp(y)) is y in float64 too
            if not any(need):
                continue
            y.sigmoid_().diagonal(own).neg_()
            image_rows = similarity.image_rows(start, rows.stop)
            if need.image or need.scale:
                product = y @ text  # [h, D]
                if need.scale:
                    grad_scale += (product * image_rows).sum()  # before the factor s, which may be 0
                    grad_bias += y.sum()
                if need.image:
                    grad_image[rows] = product.mul_(similarity.scale)
            if need.text:
                grad_text.addmm_(y.T, image_rows)
        return SigmoidParts(loss, grad_image, grad_text.mul_(similarity.scale), grad_scale, grad_bias)


_SCHEMA = (
    "(Tensor image, Tensor text, Tensor scale, Tensor bias, int pair_offset, bool need_image, bool need_text, "
    "bool need_scalars, int strip_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def as_sigmoid(kernels: SigmoidKernels) -> Sigmoid:
    """Register the custom op `cliperase_fast::NAME_sigmoid`, and return the loss made of it.

    Call it once for each `kernels`.
    """

    def run(inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        with no_autocast(inputs.image):
            return kernels.sigmoid(inputs, need)

    def body(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pair_offset: int, *needs_and_strip_rows: Any
    ) -> SigmoidParts:
        *needs, strip_rows = needs_and_strip_rows
        inputs = SimilarityInputs(image, text, scale, bias=bias, pair_offset=pair_offset, strip_rows=strip_rows)
        return run(inputs, Need(*needs))

    op = torch.library.custom_op(f"cliperase_fast::{kernels.name}_sigmoid", body, mutates_args=(), schema=_SCHEMA)
    op.register_fake(_fake)
    op.register_autograd(
        lambda ctx, grad, *_: (*_gradients(ctx, grad), *[None] * 5),
        setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:4], output),
    )

    class Directly(torch.autograd.Function):
        """Call the kernels without the op, which takes longer than the loss of a small batch."""

        @staticmethod
        def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *given: Any) -> Tensor:
            parts = run(*given)
            _save(ctx, (image, text, scale, bias), parts)
            return parts.loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
            return *_gradients(ctx, grad), None, None

    def loss(inputs: SimilarityInputs) -> Tensor:
        assert inputs.bias is not None
        tensors = (inputs.image, inputs.text, inputs.scale, inputs.bias)
        image, text, scale, bias = (tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors)
        need = Need(image, text, scale or bias)
        if torch.compiler.is_compiling() or watched(tensors):
            return op(*tensors, inputs.pair_offset, *need, inputs.strip_rows)[0] / inputs.n
        return Directly.apply(*tensors, inputs, need) / inputs.n

    return Sigmoid(loss, kernels)


def _fake(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pair_offset: int,
    need_image: bool,
    need_text: bool,
    *others: Any,
) -> SigmoidParts:
    like = image.new_empty((), dtype=compute_dtype(image, text))
    shapes = ((), image.shape if need_image else (0,), text.shape if need_text else (0,), (), ())
    return SigmoidParts(*(like.new_empty(shape) for shape in shapes))


def _save(ctx: Any, tensors: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.set_materialize_grads(False)  # else autograd allocates zeros as large as the saved tensors
    ctx.save_for_backward(*parts[1:], *tensors)  # `first_derivative_only` needs the inputs


@first_derivative_only
def _gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of image, text, scale and bias, None where not needed."""
    found: list[Tensor | None] = [None] * 4
    if grad is not None:
        for place in range(4):
            if ctx.needs_input_grad[place]:
                found[place] = (saved[place] * grad).to(ctx.dtypes[place])
    return tuple(found)


sigmoid = as_sigmoid(_TorchSigmoid())
