"""Calibrated forgetting: push forget pairs to the level of unrelated pairs, and hold everything else in place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.functional import CalibratedTerms
from cliperase_fast.losses import CalibratedLoss
from cliperase_fast.unlearning.methods.base import TrainingMethod
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run

_FORGET_CONCEPT = -1  # of all forget pairs of data whose pairs name no concept


@dataclass(frozen=True)
class CalibratedOptions:
    """lambda_anchor: weight of the squared distance of all other cosines from the original's."""

    lambda_anchor: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_anchor < math.inf:  # false for NaN as well
            raise InputError(f"lambda_anchor={self.lambda_anchor} must be a finite number, 0 or larger")


class Calibrated(TrainingMethod):
    """The modules of CLIPErase against an edited teacher, see `functional.calibrated_loss`.

    A pair's concept is its entity or class. In data without either, all forget pairs are one concept, and retain pairs
    with the same caption share theirs. The background levels are the teacher's, over the retain pairs of the training
    split.
    """

    name = "calibrated"
    summary = "CLIPErase against an edited teacher: forget pairs stop at the level of unrelated pairs"
    source = "this library, after CLIPErase"
    needs = ("forget", "retain", "teacher")
    joint_teacher = True
    unused_settings = frozenset(["forget_loss", "margin", "consistency"])
    Options = CalibratedOptions

    def objective(self, run: Run) -> Objective:
        settings = self.settings
        loss = CalibratedLoss(
            settings.lambda_retain,
            settings.lambda_forget,
            settings.lambda_consistency,
            self.options.lambda_anchor,
            backend=settings.backend,
            process_group=run.ranks.process_group or "local",
        )
        by_concept = run.loader.group_ids is not None and run.loader.group_ids.size > 0

        def terms(features: BatchFeatures) -> CalibratedTerms:
            assert features.teacher_image is not None and features.teacher_text is not None
            assert features.background_image is not None and features.background_text is not None
            count, device = len(features.image), features.image.device
            forget_mask = torch.arange(count, dtype=torch.int64, device=device) < features.n_forget
            return loss(
                features.image,
                features.text,
                features.teacher_image,
                features.teacher_text,
                features.logit_scale,
                features.teacher_logit_scale,
                forget_mask=forget_mask,
                group_ids=features.group_ids if by_concept else _one_concept(features.group_ids, forget_mask),
                background_image=features.background_image,
                background_text=features.background_text,
            )

        return terms


def _one_concept(caption_ids: Tensor | None, forget_mask: Tensor) -> Tensor | None:
    """Return the ids [P] with one for all forget pairs; caption_ids are at least 0."""
    return None if caption_ids is None else caption_ids.masked_fill(forget_mask, _FORGET_CONCEPT)
