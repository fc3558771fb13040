"""Derivatives that the streamed backends do not have: a second one is refused with an error that names the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import UnlearningError

_REMEDY = "use backend='eager' (or CLIPERASE_BACKEND=eager) without a process_group"


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
