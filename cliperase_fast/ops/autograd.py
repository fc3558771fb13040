"""A backend that never holds an N x N matrix brings an `SweepKernels`; `as_sweep` makes the differentiable sweep of it.

The two custom ops of a backend (one each way), their shapes for `torch.compile`, and what is saved between them are the
same for all, and so are the state and the losses made of the sums (`ops/softmax_stats.py`). Where nothing traces or
counts operations, the two functions are called without the ops, which cost a small batch more than its losses do.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.ops import softmax_stats
from cliperase_fast.ops.spec import SavedStats, SimilarityInputs, Stats, Sweep, no_autocast
from cliperase_fast.ops.transforms import batched, refuse_second_derivative

STRIP_VARIABLE = "CLIPERASE_STRIP_MIB"  # memory of the strips of a sweep on a GPU
KEEP_VARIABLE = "CLIPERASE_KEEP_MIB"  # most that keep="similarities" keeps
_STRIP_MIB = 128
_KEEP_MIB = {"cpu": 1024, "cuda": 8192}


class SweepKernels(Protocol):
    """What a streamed backend does itself."""

    name: str

    def check(self, problem: SimilarityInputs) -> None:
        """Raise InputError for what this backend cannot take, before anything runs."""
        ...

    def cache_size(self, problem: SimilarityInputs, keep: str) -> int:
        """How many bytes the forward pass keeps for the backward one, 0: none. keep: auto, nothing or similarities."""
        ...

    def forward(self, problem: SimilarityInputs, strip_rows: int, cache_size: int) -> tuple[Stats, Tensor]:
        """The sums, and what is kept, uint8 [cache_size]. strip_rows: rows formed at a time, 0 for its own choice."""
        ...

    def losses(
        self, problem: SimilarityInputs, strip_rows: int, cache_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(retention, consistency, state [9, 2 n], what is kept) of a batch in one piece.

        `softmax_stats.losses_of_sums`, unless the backend has something faster.
        """
        ...

    def backward(
        self,
        problem: SimilarityInputs,
        state: SavedStats,
        weight_retention: Tensor,
        weight_consistency: Tensor,
        strip_rows: int,
        kept: Tensor,
        need_image: bool,
        need_text: bool,
        need_scale: bool,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of image, text and scale, in their dtypes; an empty tensor for one not needed (but 0-d for scale).

        state and the weights [] are as `softmax_stats.gradient_terms` takes them. partial: the gradients are summands
        of larger sums, so they stay in the computing dtype.
        """
        ...


def strip_bytes() -> int:
    """The memory for strips on a GPU, from the environment."""
    return _mebibytes(STRIP_VARIABLE, _STRIP_MIB) << 20


def cache_budget(device: torch.device) -> int:
    """The most that keep="similarities" keeps, from the environment."""
    return _mebibytes(KEEP_VARIABLE, _KEEP_MIB.get(device.type, _KEEP_MIB["cpu"])) << 20


def _mebibytes(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{variable}={text} must be a whole number of MiB, at least 1; unset it for {default}")
    return int(text)


_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? teacher_image, Tensor? teacher_text, "
    "Tensor? teacher_logit_scale, Tensor? group_ids, bool want_retention, bool want_consistency, int strip_rows"
)
_FORWARD_SCHEMA = f"({_ARGUMENTS}, int cache_size) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_retention, Tensor grad_consistency, Tensor state, Tensor kept, {_ARGUMENTS}, "
    "bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)"
)
_PROBLEM = 9  # how many of the arguments make the problem


def as_sweep(engine: SweepKernels) -> Sweep:
    """Register the custom ops `cliperase_fast::NAME_sweep` and `..._backward`; returns the sweep on them.

    The ops return (retention, consistency, state [9, 2 N], kept uint8) and the gradients. Called once an engine.
    """

    def run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem = SimilarityInputs(*arguments[:_PROBLEM])
        strip_rows, cache_size = arguments[_PROBLEM:]
        with no_autocast(problem.image):
            return engine.losses(problem, strip_rows, cache_size)

    def run_backward(
        grad_retention: Tensor, grad_consistency: Tensor, state: Tensor, kept: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem, strip_rows = SimilarityInputs(*arguments[:_PROBLEM]), arguments[_PROBLEM]
        weights = softmax_stats.weights(grad_retention, grad_consistency, problem.n)
        with no_autocast(problem.image):
            return engine.backward(problem, SavedStats(state, problem.n), *weights, strip_rows, kept, *arguments[-3:])

    forward_op = torch.library.custom_op(
        f"cliperase_fast::{engine.name}_sweep", run_forward, mutates_args=(), schema=_FORWARD_SCHEMA
    )
    backward_op = torch.library.custom_op(
        f"cliperase_fast::{engine.name}_sweep_backward", run_backward, mutates_args=(), schema=_BACKWARD_SCHEMA
    )
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    refuse_second_derivative(backward_op)

    forward_op.register_autograd(
        lambda ctx, *gradients: _gradients(ctx, backward_op, *gradients), setup_context=_keep_for_backward
    )

    class Directly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            outputs = run_forward(*arguments)
            _keep_for_backward(ctx, arguments, outputs)
            return outputs[0], outputs[1]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            # With create_graph the op, which refuses to be differentiated; for batched gradients too, as vmap knows it.
            by_op = torch.is_grad_enabled() or batched(*gradients)
            return _gradients(ctx, backward_op if by_op else run_backward, *gradients)

    def sweep(
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        teacher_logit_scale: Tensor | None,
        group_ids: Tensor | None,
        want_retention: bool,
        want_consistency: bool,
        keep: str = "auto",
        strip_rows: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `ops.spec.Sweep`. strip_rows: rows formed at a time; 0: as many as the memory budget gives."""
        arguments = (
            image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale,
            group_ids if want_retention else None, want_retention, want_consistency,
        )  # fmt: skip
        problem = SimilarityInputs(*arguments)
        engine.check(problem)
        differentiable = image.requires_grad or text.requires_grad or logit_scale.requires_grad
        cache_size = engine.cache_size(problem, keep) if differentiable and torch.is_grad_enabled() else 0
        if torch.compiler.is_compiling() or watched(arguments[:7]):
            retention, consistency, _, _ = forward_op(*arguments, strip_rows, cache_size)
            return retention, consistency
        return Directly.apply(*arguments, strip_rows, cache_size)

    return sweep


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def watched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something stands between these tensors and their values: a tracer, a counter, fakes."""
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(tensor) not in _PLAIN for tensor in tensors)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = SimilarityInputs(*arguments[:_PROBLEM])
    state = problem.image.new_empty((softmax_stats.PLANES, 2 * problem.n), dtype=problem.compute_dtype())
    return state.new_empty(()), state.new_empty(()), state, state.new_empty(arguments[-1], dtype=torch.uint8)


def _fake_backward(
    grad_retention: Tensor, grad_consistency: Tensor, state: Tensor, kept: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image, text, scale = arguments[:3]
    need_image, need_text = arguments[-3:-1]
    return (
        image.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
        scale.new_empty(()),
    )


def _gradients(
    ctx: Any, run: Any, grad_retention: Tensor | None, grad_consistency: Tensor | None, *_of_what_is_kept: Tensor | None
) -> tuple[Any, ...]:
    """Of each argument of the forward op, from `run`, the backward op or the function in it."""
    state, kept, *tensors = ctx.saved_tensors
    zero = state.new_zeros(()) if grad_retention is None or grad_consistency is None else None
    need = ctx.needs_input_grad[:3]
    gradients = run(
        zero if grad_retention is None else grad_retention,
        zero if grad_consistency is None else grad_consistency,
        state, kept, *tensors, *ctx.wants, *need,
    )  # fmt: skip
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, need, strict=True))
    return *wanted, *[None] * 8


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, want_retention, want_consistency, strip_rows, _ = inputs
    ctx.wants = (want_retention, want_consistency, strip_rows)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as what is kept
    ctx.save_for_backward(output[2], output[3], *tensors)
