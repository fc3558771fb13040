"""Gradient ascent: raise the contrastive loss of the forget pairs, and do nothing for the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class AscentTerms(NamedTuple):
    """total = -forget; `forget` is the CLIP loss of the forget pairs."""

    total: Tensor
    forget: Tensor


class GradientAscent(TrainingMethod):
    """The plainest baseline. It forms the similarities of forget pairs with the whole batch, 2 M (M + N)."""

    name = "gradient_ascent"
    summary = "minus the CLIP loss of the forget pairs, nothing else"
    source = "baseline"
    needs = ("forget", "retain")
    unused_settings = TERM_SETTINGS

    def objective(self, run: Run) -> Objective:
        def terms(features: BatchFeatures) -> AscentTerms:
            loss = forget_clip_loss(features.gather())
            return AscentTerms(-loss, loss)

        return terms


def forget_clip_loss(features: BatchFeatures) -> Tensor:
    """Return the CLIP loss of the forget pairs, with denominators over the whole joint batch.

    In a batch of one concept alone the gradient would vanish, as all captions are the same. Pairs that share the group
    of a forget pair are not negatives of it.
    """
    count = features.n_forget
    with torch.autocast(features.image.device.type, enabled=False):
        image, text = features.image.float(), features.text.float()
        losses = [
            _cross_entropy(features.logit_scale.float() * rows[:count] @ columns.T, features.group_ids)
            for rows, columns in ((image, text), (text, image))
        ]
    return (losses[0] + losses[1]) / 2


def _cross_entropy(logits: Tensor, group_ids: Tensor | None) -> Tensor:
    """Return the mean over rows m of -log softmax at column m. logits: [M, P]."""
    count = len(logits)
    if group_ids is not None:
        same = group_ids[:count, None] == group_ids[None]  # [M, P]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    return (logits.logsumexp(1) - logits.diagonal()).mean()
