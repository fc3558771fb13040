"""Task arithmetic: fine-tune a copy on the forget pairs, and subtract what it learned.

    task_vector:  d = fine_tuned - original
    negmerge:     several fine-tunes with different settings; d = their mean where all signs agree, 0 elsewhere
    weights = original - size * d

The fine-tunes lower the CLIP loss of the forget pairs (`clip_losses.forget_clip_loss`) over joint batches, with Adam
and without dropout. The size is searched on the validation split (ten evaluations): from 1, doubled for as long as the
retain score is within `retain_floor` and forget pairs are recognised, then bisected. The fine-tunes of negmerge differ
in their learning rate, from half to twice `learning_rate` in equal ratios, and in their batches.

Defaults: learning_rate 1e-5, 10 steps; negmerge: 4 fine-tunes. Of the few settings that were tried on two digits, such
short and slow fine-tunes, subtracted many times, forgot most within the floor.

Sources: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (arXiv 2212.04089); Kim et al., "NegMerge:
Sign-Consensual Weight Merging for Machine Unlearning", ICML 2025 (arXiv 2410.05583).

Limits: a model that knows the forget pairs well has little left to learn from them, and d is then mostly noise. Nothing
but the size protects the retain pairs. The fine-tunes are repeated if a run is interrupted before its edit is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.progress import Steps
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.methods.gradients import GradientMethod, gradients
from cliperase_fast.unlearning.methods.strength import forgets_too_little, search_strength
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate


@dataclass(frozen=True)
class TaskVectorOptions:
    """Of the fine-tune: learning_rate of Adam, and steps, of one joint batch each."""

    learning_rate: float = 1e-5
    steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:  # false for NaN as well
            raise InputError(f"learning_rate={self.learning_rate} must be a finite number above 0")
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")


@dataclass(frozen=True)
class NegMergeOptions(TaskVectorOptions):
    """models: how many fine-tunes. See `TaskVectorOptions` for the others."""

    models: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.models < 2:
            raise InputError(f"models={self.models} must be at least 2; method='task_vector' has one")


class TaskVector(GradientMethod):
    """Subtracts one fine-tune, see the module."""

    name = "task_vector"
    summary = "fine-tune a copy on the forget pairs and subtract the difference"
    source = "arXiv 2212.04089"
    Options = TaskVectorOptions

    def edit(self, run: Run, evaluate: Callable[[], Candidate]) -> None:
        original = [parameter.detach().clone() for _, parameter in run.parameters]
        vector = self.vector(run)

        def evaluate_at(size: float) -> Candidate:
            subtract(run, original, vector, size)
            return evaluate()

        search_strength(evaluate_at, forgets_too_little(run))

    def vector(self, run: Run) -> list[Tensor]:
        """Return what to subtract, for each of `run.parameters`."""
        return fine_tune(run, self.options.learning_rate, self.options.steps)


class NegMerge(TaskVector):
    """Subtracts what several fine-tunes agree on, see the module of `TaskVector`."""

    name = "negmerge"
    summary = "task_vector with several fine-tunes: only entries whose sign agrees in all are subtracted"
    source = "NegMerge, ICML 2025"
    Options = NegMergeOptions

    def vector(self, run: Run) -> list[Tensor]:
        options = self.options
        rates = [options.learning_rate * 2 ** (2 * index / (options.models - 1) - 1) for index in range(options.models)]
        return merge_agreeing(
            fine_tune(run, rate, options.steps, first=index * options.steps) for index, rate in enumerate(rates)
        )


def fine_tune(run: Run, rate: float, steps: int, first: int = 0) -> list[Tensor]:
    """Return how far fine-tuning on the forget pairs moves `run.parameters`, which it leaves as they were.

    first: the number of the first batch.
    """
    parameters = [parameter for _, parameter in run.parameters]
    original = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    numbers = range(first, first + steps)
    bar = Steps(steps, f"fine-tuning at {rate:.2g}", "step", bar=run.runtime.progress)
    with bar:
        for (found,) in gradients(run, run.loader, numbers, [lambda features: forget_clip_loss(features.gather())]):
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
            bar.update()
    vector = []
    for parameter, start in zip(parameters, original, strict=True):
        parameter.grad = None
        vector.append(parameter.detach() - start)
        parameter.detach().copy_(start)
    if not any(part.any() for part in vector):
        raise UnlearningError(
            f"fine-tuning at learning_rate={rate:g} changed no weight: raise learning_rate in method_options"
        )
    return vector


def merge_agreeing(vectors: Iterable[list[Tensor]]) -> list[Tensor]:
    """Return the mean of the vectors where the signs of all agree, 0 elsewhere."""
    sums: list[Tensor] = []
    signs: list[Tensor] = []  # 0 once they disagree
    count = 0
    for vector in vectors:
        count += 1
        if count == 1:
            sums, signs = [part.clone() for part in vector], [part.sign() for part in vector]
            continue
        for total, sign, part in zip(sums, signs, vector, strict=True):
            total.add_(part)
            sign.masked_fill_(part.sign() != sign, 0)
    return [torch.where(sign != 0, total / count, 0) for total, sign in zip(sums, signs, strict=True)]


def subtract(run: Run, original: list[Tensor], vector: list[Tensor], size: float) -> None:
    """Set `run.parameters` to original - size * vector."""
    for (_, parameter), start, part in zip(run.parameters, original, vector, strict=True):
        parameter.detach().copy_(start - size * part)
