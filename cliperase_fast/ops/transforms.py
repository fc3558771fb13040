"""Refuse derivatives that the streamed backends do not have: a second one raises an error with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import UnlearningError

_REMEDY = "use backend='eager' (or CLIPERASE_BACKEND=eager) without a process_group"


def batched(*tensors: Tensor | None) -> bool:
    """Return whether a vmap covers any of these: of `torch.func`, or `is_grads_batched` of `torch.autograd.grad`."""
    is_batched, is_legacy = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    return any(tensor is not None and (is_batched(tensor) or is_legacy(tensor)) for tensor in tensors)


def refuse_second_derivative(op: Any, remedy: str = _REMEDY) -> None:
    """Register an autograd formula that raises, for a custom op that computes gradients."""
    op.register_autograd(lambda ctx, *_: _refuse(remedy))


def _refuse(remedy: str = _REMEDY) -> Any:
    raise UnlearningError(f"second derivatives of this loss are not supported by the streamed backends; {remedy}")


class _Refusing(torch.autograd.Function):
    """Return the first `count` tensors, as functions of the others that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _refuse()


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorate the backward of an autograd function that saves its inputs: (ctx, saved, *gradients).

    The saved tensors are unpacked once, as checkpointing requires. This is like torch's `once_differentiable`, but the
    error names the remedy, and torch.autograd.grad raises it too, where the other silently omits the second derivative.
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
