"""SalUn: relabel, but only the weights that matter most for the forget pairs move.

    g_f = the gradient of the forget pairs' CLIP loss at the original's weights, over one pass of the forget pairs
    a weight moves if |g_f| is among the largest `fraction` of all trained weights and not 0: one global threshold

The loss is that of `relabel`. The gradient of the other weights is set to 0 before Adam sees it, so that they keep
their bits: Adam's moments stay 0 and nothing decays, as weight_decay is refused.

Source: SalUn, arXiv 2310.12508. Default: fraction 0.5, as in the paper. Limits: those of `relabel`. The mask is of the
model's own weights, so trainable="lora" is refused, and so is DeepSpeed, which trains a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models.runtime import evaluating
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.methods.gradient_ascent import AscentTerms
from cliperase_fast.unlearning.methods.gradients import features_of, forget_batches
from cliperase_fast.unlearning.methods.relabel import Relabel
from cliperase_fast.unlearning.run import Run


@dataclass(frozen=True)
class SalUnOptions:
    """fraction: of the trained weights that may move."""

    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:  # false for NaN as well
            raise InputError(f"fraction={self.fraction} must be above 0 and at most 1")


class SalUn(Relabel):
    """Relabelling under a saliency mask, see the module."""

    name = "salun"
    summary = "relabel, but only the weights with the largest gradient of the forget loss move"
    source = "SalUn, arXiv 2310.12508"
    unused_settings = Relabel.unused_settings | {"weight_decay", "deepspeed", "lora_rank", "lora_alpha"}
    Options = SalUnOptions

    def check_inputs(self, teacher: Any) -> None:
        super().check_inputs(teacher)
        if self.settings.trainable == "lora":
            raise InputError(
                "method='salun' masks the model's own weights, which trainable='lora' leaves frozen; use 'all', "
                "'image', 'text' or 'last:K'"
            )

    def prepare(self, run: Run) -> None:
        """Compute the mask at the original's weights, also in a run that resumes."""
        self.masks = largest(forget_gradient(run), self.options.fraction)

    def run(self, run: Run) -> TrainState:
        hooks = [
            parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(~mask, 0))
            for (_, parameter), mask in zip(run.parameters, self.masks, strict=True)
        ]
        try:
            return super().run(run)
        finally:
            for hook in hooks:
                hook.remove()


def forget_gradient(run: Run) -> list[Tensor]:
    """Return the gradient of the forget loss for each of the run's parameters, over one pass of the forget pairs."""
    engine = LocalEngine(run.student, run.parameters, run.settings, run.runtime)
    batches = forget_batches(run)

    def terms(batch: Batch, image: Tensor, text: Tensor, scale: Tensor) -> Any:
        forget, retain = run.loader.plan.sizes
        features = features_of(run, batch, (forget, retain), image, text, scale)
        loss = forget_clip_loss(features.gather())
        return AscentTerms(loss, loss)

    with evaluating(run.student.module), torch.enable_grad():
        for batch in run.loader.batches(0, batches):
            engine.backward(batch, 1 / batches, terms)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.parameters]
    run.ranks.all_reduce_mean(found)
    engine.close()
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        raise UnlearningError("the gradient of the forget loss is not finite; use precision='fp32' or 'bf16'")
    return found


def largest(gradients: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Return where |gradient| is among the largest `fraction` of all and not 0; bool, of the gradients' shapes.

    Weights as large as the smallest of them are among them.
    """
    sizes = torch.cat([gradient.abs().reshape(-1) for gradient in gradients])
    count = max(1, round(fraction * len(sizes)))
    threshold = sizes.kthvalue(len(sizes) - count + 1).values
    return [(gradient.abs() >= threshold) & (gradient != 0) for gradient in gradients]
