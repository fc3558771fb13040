"""Gradient difference: raise the contrastive loss of the forget pairs while that of the retain pairs is lowered.

    L = CLIP(retain pairs) - CLIP_f

CLIP_f is the CLIP loss of the forget pairs with denominators over the whole joint batch. Source: GradDiff ("Continual
Learning and Private Unlearning", Liu, Liu and Stone, CoLLAs 2022), with CLIP losses. No options. Limits: CLIP_f has no
upper bound, so forgetting does not stop by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss, retain_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class DifferenceTerms(NamedTuple):
    """total = retain - forget, both CLIP losses."""

    total: Tensor
    retain: Tensor
    forget: Tensor


class GradientDifference(TrainingMethod):
    """Gradient ascent on the forget pairs with descent on the retain pairs, see the module."""

    name = "gradient_difference"
    summary = "the CLIP loss of the retain pairs minus that of the forget pairs"
    source = "GradDiff, CoLLAs 2022"
    unused_settings = TERM_SETTINGS - {"backend"}

    def objective(self, run: Run) -> Objective:
        def terms(features: BatchFeatures) -> DifferenceTerms:
            retain, forget = retain_clip_loss(features, self.settings.backend), forget_clip_loss(features.gather())
            return DifferenceTerms(retain - forget, retain, forget)

        return terms
