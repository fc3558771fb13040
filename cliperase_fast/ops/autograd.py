"""Make a differentiable sweep of a backend's `SweepKernels`.

All backends share the two custom ops (forward and backward), their shapes for `torch.compile`, and the saved tensors.
If nothing traces or counts operations, the kernels are called without the ops, which take longer than the losses of a
small batch. `SimilarityInputs` is flattened only here, for the ops and for autograd.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    Need,
    SavedStats,
    SimilarityInputs,
    Sweep,
    SweepKernels,
    no_autocast,
    pair_weights,
)
from cliperase_fast.ops.transforms import batched, refuse_second_derivative

STRIP_VARIABLE = "CLIPERASE_STRIP_MIB"  # memory of the strips of a sweep on a GPU
KEEP_VARIABLE = "CLIPERASE_KEEP_MIB"  # memory limit of keep="similarities"
_STRIP_MIB = 128
_KEEP_MIB = {"cpu": 1024, "cuda": 8192}


def strip_bytes() -> int:
    """Return the bytes for strips on a GPU, from the environment."""
    return _mebibytes(STRIP_VARIABLE, _STRIP_MIB) << 20


def cache_budget(device: torch.device) -> int:
    """Return the maximum number of bytes that keep="similarities" keeps, from the environment."""
    return _mebibytes(KEEP_VARIABLE, _KEEP_MIB.get(device.type, _KEEP_MIB["cpu"])) << 20


def _mebibytes(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{variable}={text} must be a whole number of MiB, at least 1; unset it to use {default}")
    return int(text)


_FLAT_SCHEMA = (
    "Tensor image, Tensor text, Tensor scale, Tensor? teacher_image, Tensor? teacher_text, Tensor? teacher_scale, "
    "Tensor? group_ids, bool want_retention, int strip_rows"
)
_TENSORS, _FLAT = 7, 9  # how many of the arguments are tensors, and how many there are
_FORWARD_SCHEMA = f"({_FLAT_SCHEMA}, int cache_size) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_retention, Tensor grad_consistency, Tensor saved, Tensor cache, {_FLAT_SCHEMA}, "
    "bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)"
)


def flatten(inputs: SimilarityInputs) -> tuple[Any, ...]:
    """Return the arguments of a custom op for a batch that is not sharded; tensors come first."""
    return (
        inputs.image, inputs.text, inputs.scale, inputs.teacher_image, inputs.teacher_text, inputs.teacher_scale,
        inputs.group_ids, inputs.want_retention, inputs.strip_rows,
    )  # fmt: skip


def unflatten(*arguments: Any) -> SimilarityInputs:
    """Rebuild the inputs from what `flatten` returned."""
    return SimilarityInputs(*arguments)


def flat_tensors(inputs: SimilarityInputs) -> tuple[Tensor | None, ...]:
    """Return the tensors of `flatten`."""
    return flatten(inputs)[:_TENSORS]


def as_sweep(kernels: SweepKernels) -> Sweep:
    """Register the custom ops `cliperase_fast::NAME_sweep` and `..._backward`, and return the sweep made of them.

    The ops return (retention, consistency, saved [NUM_SAVED, 2 N], cache uint8) and the gradients. Call it once for
    each `kernels`.
    """

    def run_forward(inputs: SimilarityInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with no_autocast(inputs.image):
            return kernels.losses(inputs, cache_size)

    def run_backward(
        grads: tuple[Tensor, Tensor], saved: Tensor, cache: Tensor, inputs: SimilarityInputs, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(inputs.image):
            weights = pair_weights(*grads, inputs.n)
            return kernels.backward(inputs, SavedStats(saved, inputs.n, cache), weights, need)

    def forward_body(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run_forward(unflatten(*arguments[:_FLAT]), arguments[_FLAT])

    def backward_body(
        grad_retention: Tensor, grad_consistency: Tensor, saved: Tensor, cache: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, need = unflatten(*arguments[:_FLAT]), Need(*arguments[_FLAT:])
        return run_backward((grad_retention, grad_consistency), saved, cache, inputs, need)

    name = f"cliperase_fast::{kernels.name}_sweep"
    forward_op = torch.library.custom_op(name, forward_body, mutates_args=(), schema=_FORWARD_SCHEMA)
    backward_op = torch.library.custom_op(f"{name}_backward", backward_body, mutates_args=(), schema=_BACKWARD_SCHEMA)
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    refuse_second_derivative(backward_op)

    def call_backward_op(
        grads: tuple[Tensor, Tensor], saved: Tensor, cache: Tensor, inputs: SimilarityInputs, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward_op(*grads, saved, cache, *flatten(inputs), *need)

    def op_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        need = Need(*ctx.needs_input_grad[:3])
        return *_gradients(ctx, call_backward_op, need, *gradients[:2]), *[None] * (_FLAT - 2)

    forward_op.register_autograd(
        op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs[:_FLAT], *output[2:])
    )

    class Directly(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, inputs: SimilarityInputs, cache_size: int, image: Tensor, text: Tensor, scale: Tensor
        ) -> tuple[Tensor, Tensor]:
            retention, consistency, saved, cache = run_forward(inputs, cache_size)
            _save(ctx, flatten(inputs), saved, cache)
            return retention, consistency

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            # With create_graph use the op, which refuses differentiation; for batched gradients too, as vmap knows it.
            by_op = torch.is_grad_enabled() or batched(*gradients)
            need = Need(*ctx.needs_input_grad[2:])
            return None, None, *_gradients(ctx, call_backward_op if by_op else run_backward, need, *gradients)

    def sweep(inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
        """Implement `ops.spec.Sweep`."""
        differentiable = inputs.image.requires_grad or inputs.text.requires_grad or inputs.scale.requires_grad
        cache_size = kernels.cache_size(inputs) if differentiable and torch.is_grad_enabled() else 0
        if torch.compiler.is_compiling() or watched(flat_tensors(inputs)):
            retention, consistency, _, _ = forward_op(*flatten(inputs), cache_size)
            return retention, consistency
        return Directly.apply(inputs, cache_size, inputs.image, inputs.text, inputs.scale)

    return sweep


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def watched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether operations on these tensors are intercepted: by a tracer, a counter or fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(tensor) not in _PLAIN for tensor in tensors)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = unflatten(*arguments[:_FLAT])
    saved = inputs.image.new_empty((NUM_SAVED, 2 * inputs.n), dtype=inputs.dtype)
    return saved.new_empty(()), saved.new_empty(()), saved, saved.new_empty(arguments[_FLAT], dtype=torch.uint8)


def _fake_backward(
    grad_retention: Tensor, grad_consistency: Tensor, saved: Tensor, cache: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = arguments[:3]
    need = Need(*arguments[_FLAT:])
    return (
        image.new_empty(image.shape if need.image else (0,)),
        text.new_empty(text.shape if need.text else (0,)),
        scale.new_empty(()),
    )


def _gradients(
    ctx: Any, run: Any, need: Need, grad_retention: Tensor | None, grad_consistency: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of image, text and scale, None where not needed."""
    saved, cache, *tensors = ctx.saved_tensors
    zero = saved.new_zeros(()) if grad_retention is None or grad_consistency is None else None
    grads = tuple(zero if grad is None else grad for grad in (grad_retention, grad_consistency))
    gradients = run(grads, saved, cache, unflatten(*tensors, *ctx.options), need)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, need, strict=True))


def _save(ctx: Any, flat: tuple[Any, ...], saved: Tensor, cache: Tensor) -> None:
    ctx.options = flat[_TENSORS:]
    ctx.set_materialize_grads(False)  # else autograd allocates zeros as large as the saved tensors
    ctx.save_for_backward(saved, cache, *flat[:_TENSORS])
