"""Selective synaptic dampening: shrink the weights that matter far more to the forget pairs than to all pairs.

    Fisher = mean over batches of (gradient of the loss of the batch)², entry by entry
    Fisher_f: joint batches, the CLIP loss of their forget pairs (`clip_losses.forget_clip_loss`)
    Fisher_all: batches of all training pairs, their CLIP loss
    where Fisher_f > alpha Fisher_all:  weight *= min(1, dampening Fisher_all / Fisher_f)

Defaults: alpha = 10, dampening (the paper's lambda) = 1. One pass over the forget pairs and one over all training
pairs; no training, and no search: the result is what the two numbers give, within `retain_floor` or not.

Source: Foster, Schoepf and Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024 (arXiv 2308.07707), which takes the gradients of classifiers.

Limits: gradients are those of batches, not of single pairs, so `batch_size` and `forget_fraction` matter: gradients
that cancel within a batch do not count, and those of fewer pairs cancel less. The alpha that forgets without ruining
the rest depends on the model: on small ones it can be far above the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.batches import BatchLoader
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss, retain_clip_loss
from cliperase_fast.unlearning.methods.gradients import GradientMethod, Loss, forget_batches, gradients, loader_of_all
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate


@dataclass(frozen=True)
class SSDOptions:
    """alpha: how many times larger Fisher_f must be. dampening: the paper's lambda; smaller ones shrink more."""

    alpha: float = 10.0
    dampening: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:  # false for NaN as well
                raise InputError(f"{name}={value} must be a finite number above 0")


class SelectiveSynapticDampening(GradientMethod):
    """One edit of single weights, see the module."""

    name = "ssd"
    summary = "shrink the weights that matter far more to the forget pairs than to all pairs; no training"
    source = "arXiv 2308.07707"
    Options = SSDOptions

    def edit(self, run: Run, evaluate: Callable[[], Candidate]) -> None:
        of_forget = fisher(run, run.loader, forget_batches(run), lambda features: forget_clip_loss(features.gather()))
        everything = loader_of_all(run)
        of_all = fisher(run, everything, everything.plan.batches_per_epoch, retain_clip_loss)
        count = 0
        for (_, parameter), forget, whole in zip(run.parameters, of_forget, of_all, strict=True):
            factor = dampening_factor(forget, whole, self.options.alpha, self.options.dampening)
            parameter.mul_(factor)
            count += int((factor < 1).sum())
        total = sum(parameter.numel() for _, parameter in run.parameters)
        run.say("ssd shrank %d of %d weights", count, total)


def fisher(run: Run, loader: BatchLoader, batches: int, loss: Loss) -> list[Tensor]:
    """Return the mean over batches of the squared gradient, for each of `run.parameters`."""
    total: list[Tensor] = [torch.zeros_like(parameter) for _, parameter in run.parameters]
    for (found,) in gradients(run, loader, range(batches), [loss]):
        for sums, gradient in zip(total, found, strict=True):
            sums.addcmul_(gradient, gradient, value=1 / batches)
    return total


def dampening_factor(forget: Tensor, whole: Tensor, alpha: float, dampening: float) -> Tensor:
    """Return what each weight is multiplied by. forget, whole: Fisher_f and Fisher_all, of the same shape."""
    selected = forget > alpha * whole  # so that Fisher_f is above 0
    factor = (dampening * whole / forget).clamp(max=1)
    return torch.where(selected, factor, torch.ones_like(factor))
