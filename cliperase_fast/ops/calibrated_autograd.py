"""Make the differentiable calibrated loss of a backend's `CalibratedKernels`, as `autograd.py` makes a sweep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import watched
from cliperase_fast.ops.calibrated import Calibrated, CalibratedInputs, CalibratedKernels
from cliperase_fast.ops.spec import NUM_SAVED, Need, SimilarityInputs, no_autocast
from cliperase_fast.ops.transforms import batched, refuse_second_derivative

_TENSORS = 10
_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor scale, Tensor teacher_image, Tensor teacher_text, Tensor teacher_scale, "
    "Tensor forget_mask, Tensor background_image, Tensor background_text, Tensor? group_ids, int strip_rows"
)
_FORWARD_SCHEMA = f"({_ARGUMENTS}, int cache_size) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_terms, Tensor saved, Tensor factors, Tensor cache, {_ARGUMENTS}, bool need_image, bool need_text, "
    "bool need_scale) -> (Tensor, Tensor, Tensor)"
)


def as_calibrated(kernels: CalibratedKernels) -> Calibrated:
    """Register the custom ops `cliperase_fast::NAME_calibrated` and `..._backward`, and return the loss made of them.

    Call it once for each `kernels`.
    """

    def forward_body(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = CalibratedInputs(*arguments[:-1])
        with no_autocast(inputs.image):
            return kernels.calibrated_losses(inputs, arguments[-1])

    def backward_body(grads: Tensor, saved: Tensor, factors: Tensor, cache: Tensor, *arguments: Any) -> Any:
        inputs, need = CalibratedInputs(*arguments[:-3]), Need(*arguments[-3:])
        with no_autocast(inputs.image):
            image, text, scale = kernels.calibrated_gradients(inputs, saved, factors * grads, cache, need)
        return image.to(inputs.image.dtype), text.to(inputs.text.dtype), scale.to(inputs.scale.dtype)

    name = f"cliperase_fast::{kernels.name}_calibrated"
    forward_op = torch.library.custom_op(name, forward_body, mutates_args=(), schema=_FORWARD_SCHEMA)
    backward_op = torch.library.custom_op(f"{name}_backward", backward_body, mutates_args=(), schema=_BACKWARD_SCHEMA)
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    refuse_second_derivative(backward_op)

    def differentiate(ctx: Any, need: Need, grad: Tensor, body: Any) -> tuple[Tensor | None, ...]:
        saved, factors, cache, *tensors = ctx.saved_tensors
        found = body(grad, saved, factors, cache, *tensors, ctx.strip_rows, *need)
        return tuple(gradient if needed else None for gradient, needed in zip(found, need, strict=True))

    def save(ctx: Any, flat: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        ctx.strip_rows = flat[-1]
        ctx.save_for_backward(*outputs[1:], *flat[:-1])

    def op_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        found = differentiate(ctx, Need(*ctx.needs_input_grad[:3]), grad, backward_op)
        return *found, *[None] * (_TENSORS - 3), None, None

    forward_op.register_autograd(op_backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs[:-1], output))

    class Directly(torch.autograd.Function):
        """Call the kernels without the ops, which take longer than the loss of a small batch."""

        @staticmethod
        def forward(ctx: Any, strip_rows: int, cache_size: int, *tensors: Tensor) -> Tensor:
            outputs = forward_body(*tensors, strip_rows, cache_size)
            save(ctx, (*tensors, strip_rows), outputs)
            return outputs[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            body = backward_op if torch.is_grad_enabled() or batched(grad) else backward_body
            need = Need(*ctx.needs_input_grad[2:5])
            return None, None, *differentiate(ctx, need, grad, body), *[None] * (_TENSORS - 3)

    def loss(inputs: CalibratedInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat = flatten(inputs)
        differentiable = any(tensor.requires_grad for tensor in flat[:3]) and torch.is_grad_enabled()
        cache_size = 0
        if differentiable:
            teacher = inputs.teacher_image, inputs.teacher_text, inputs.teacher_scale
            whole = SimilarityInputs(inputs.image, inputs.text, inputs.scale, *teacher, keep=inputs.keep)
            cache_size = kernels.blocks_cache_size(whole)
        if torch.compiler.is_compiling() or inputs.image.is_meta or watched(flat[:-1]):
            terms = forward_op(*flat, cache_size)[0]
        else:
            terms = Directly.apply(inputs.strip_rows, cache_size, *flat[:-1])
        return terms.unbind()

    return Calibrated(loss, kernels)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, cache_size = CalibratedInputs(*arguments[:-1]), arguments[-1]
    terms = inputs.image.new_empty(4, dtype=inputs.dtype)
    saved = terms.new_empty(NUM_SAVED + 1, 2 * len(inputs.image))
    return terms, saved, terms.new_empty(4), terms.new_empty(cache_size, dtype=torch.uint8)


def _fake_backward(
    grads: Tensor, saved: Tensor, factors: Tensor, cache: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = arguments[:3]
    need = Need(*arguments[-3:])
    return (
        image.new_empty(image.shape if need.image else (0,)),
        text.new_empty(text.shape if need.text else (0,)),
        scale.new_empty(()),
    )


def flatten(inputs: CalibratedInputs) -> tuple[Any, ...]:
    return (
        inputs.image, inputs.text, inputs.scale, inputs.teacher_image, inputs.teacher_text, inputs.teacher_scale,
        inputs.forget_mask, inputs.background_image, inputs.background_text, inputs.group_ids, inputs.strip_rows,
    )  # fmt: skip
