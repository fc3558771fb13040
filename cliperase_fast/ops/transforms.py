"""What torch may put around a call beyond plain autograd: inference tensors, function transforms, second derivatives.

The streamed backends have a first derivative, backward. Under a transform of `torch.func` (grad, vmap, jvp, ...) or
forward-mode AD the losses are computed as by the backend "eager", whose operations are torch's own, at the cost of
its N x N matrices. A second derivative is refused with an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cliperase_fast.errors import InputError, UnlearningError

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

_REMEDY = "use backend='eager' (or CLIPERASE_BACKEND=eager) without a process_group"


def savable(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor itself, or an equal one that autograd can save and that lies in memory as it reads."""
    # torch.compile traces neither question, and its graphs resolve negated views themselves.
    if tensor is None or torch.compiler.is_compiling():
        return tensor
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


def transformed(*tensors: Tensor | None) -> bool:
    """Whether these are computed under a transform of `torch.func`, or carry tangents of forward-mode AD."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_on_ranks(*tensors: Tensor | None) -> None:
    """Raise InputError where these are computed under a transform: ranks cannot exchange what has no values yet."""
    if transformed(*tensors):
        raise InputError(
            "a process_group does not work under transforms of torch.func or forward-mode AD; use backward() or "
            "torch.autograd.grad, or give the whole batch to one process"
        )


def batched(*tensors: Tensor | None) -> bool:
    """Whether a vmap stands over any of these: that of `torch.func`, or `is_grads_batched` of `torch.autograd.grad`."""
    is_batched, is_legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(tensor is not None and (is_batched(tensor) or is_legacy(tensor)) for tensor in tensors)


def refuse_second_derivative(op: Any, remedy: str = _REMEDY) -> None:
    """Register an autograd formula for a custom op that computes gradients: an error in place of a derivative."""
    op.register_autograd(lambda ctx, *_: _refuse(remedy))


def _refuse(remedy: str = _REMEDY) -> Any:
    raise UnlearningError(f"second derivatives of this loss are not supported by the streamed backends; {remedy}")


class _Refusing(torch.autograd.Function):
    """The first `count` tensors, as if they depended on the others in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _refuse()


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate the backward of an autograd function whose inputs are among what it saved: (ctx, saved, *gradients).

    What is saved is unpacked once, as checkpointing wants it. As torch's `once_differentiable`, but with an error that
    helps; and torch.autograd.grad meets it too, where the other leaves the second derivative out without a word.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward(ctx, saved, *gradients)
        if not torch.is_grad_enabled():
            return found
        sources = [t for t in (*saved, *gradients) if t is not None and t.requires_grad]
        return _Refusing.apply(len(found), *found, *sources) if sources else found

    return run
