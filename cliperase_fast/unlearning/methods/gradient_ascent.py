"""Gradient ascent: raise the contrastive loss of the forget pairs, and do nothing for the rest."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class AscentTerms(NamedTuple):
    """total = -forget; `forget` is the CLIP loss of the forget pairs."""

    total: Tensor
    forget: Tensor


class GradientAscent(TrainingMethod):
    """The plainest baseline. Its loss is `clip_losses.forget_clip_loss`."""

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
