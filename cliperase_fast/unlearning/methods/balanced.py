"""Balanced gradients: forgetting and retaining bargain over every step.

    g_f = gradient of minus the forget pairs' CLIP loss,   g_r = gradient of the retain pairs' CLIP loss
    step along  w_f g_f + w_r g_r,   w = 1 / (‖g‖ √(1 + cos(g_f, g_r))),   1 + cos at least 1e-3

This is the Nash bargaining solution for two gradients: both contribute with the same length, and the less they agree,
the longer the step. The norms are over all trained weights.

Source: MUNBa, ICCV 2025, simplified: no line search and no bound on the weights. No options. Limits: the forget loss
is raised without an upper bound and its gradient never fades, as it is scaled to length 1, so forgetting does not stop
by itself. Two gradients are kept in place of one. Gradient caching and DeepSpeed, which have one, are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.engines.base import Engine, Terms
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.methods.gradient_difference import GradientDifference
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.runtime import Runtime

SMALLEST = 1e-3  # of 1 + cos


class Balanced(GradientDifference):
    """The losses of gradient_difference, whose gradients are balanced in every step, see the module."""

    name = "balanced"
    summary = "gradients of minus the forget loss and of the retain loss, balanced in every step"
    source = "MUNBa, ICCV 2025, simplified"
    unused_settings = GradientDifference.unused_settings | {"grad_cache_chunk", "deepspeed"}

    def make_engine(self, run: Run, student: ClipAdapter) -> Engine:
        return BalancedEngine(student, run.parameters, run.settings, run.runtime)


def weights_of(forget: list[Tensor], retain: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weights of two gradients by the module's formula, 0-d; 0 for a gradient of zero."""
    norms = [torch.stack([part.double().square().sum() for part in parts]).sum().sqrt() for parts in (forget, retain)]
    product = torch.stack([(one.double() * other.double()).sum() for one, other in zip(forget, retain, strict=True)])
    cosine = (product.sum() / (norms[0] * norms[1])).nan_to_num(0)
    shared = (1 + cosine).clamp(min=SMALLEST).sqrt()
    first, second = (torch.where(norm > 0, 1 / (norm * shared), 0) for norm in norms)
    return first, second


class BalancedEngine(LocalEngine):
    """Keeps the gradients of the fields `forget` and `retain` of the terms apart until the step."""

    def __init__(
        self, student: ClipAdapter, parameters: list[tuple[str, nn.Parameter]], config: UnlearnConfig, runtime: Runtime
    ) -> None:
        super().__init__(student, parameters, config, runtime)
        self.sums: list[list[Tensor]] = []  # of minus the forget loss, of the retain loss

    def backward(self, batch: Batch, share: float, terms_of: Terms, last: bool = False) -> Any:
        terms: Any = terms_of(batch, *self._encode(batch.pixels, batch.tokens))
        found = [
            torch.autograd.grad(self._scaled(loss * share), self.parameters, retain_graph=keep, allow_unused=True)
            for loss, keep in ((-terms.forget, True), (terms.retain, False))
        ]
        whole = [
            [torch.zeros_like(p) if part is None else part for p, part in zip(self.parameters, parts, strict=True)]
            for parts in found
        ]
        if self.sums:
            whole = [[old + new for old, new in zip(*both, strict=True)] for both in zip(self.sums, whole, strict=True)]
        self.sums = whole
        return terms

    def reduce_gradients(self) -> None:
        forget, retain = self.sums
        self.sums = []
        for parts in (forget, retain):
            self.runtime.ranks.all_reduce_mean(parts)
        scale = self.scaler.get_scale()
        first, second = (weight * scale for weight in weights_of(forget, retain))
        for parameter, one, other in zip(self.parameters, forget, retain, strict=True):
            parameter.grad = first.to(one.dtype) * one + second.to(other.dtype) * other

    def close(self) -> None:
        super().close()
        self.sums = []
