"""Calibrated forgetting: push forget pairs to the level of unrelated pairs, and hold everything else in place.

The loss is `functional.calibrated_loss` plus two terms over single pairs, O((M + N) D):

    level = mean over the forget pairs of |C_mm - C*_mm|,    C*_mm the pair's background level
    pairs = mean over the retain pairs of (C_ii - C°_ii)²

The loss alone stops above the background where concepts share their parts, as "red circle" shares red with other
shapes: its squared distance fades near the target and balances with the anchor. Nor does it lift forget pairs that have
fallen below the background, as digits do in the first steps. The absolute distance does both. The anchor is a mean over
all P² cosines, among which those of the retain pairs themselves hardly count, so that they fall without `pairs`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.losses import CalibratedLoss
from cliperase_fast.unlearning.methods.base import TrainingMethod
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run

_FORGET_CONCEPT = -1  # of all forget pairs of data whose pairs name no concept


@dataclass(frozen=True)
class CalibratedOptions:
    """Weights of the terms that only this method has.

    lambda_anchor: of the squared distance of all other cosines from the original's. lambda_pairs: of that of the retain
    pairs' own cosines. lambda_level: of the distance of the forget pairs' cosines from their background level.
    """

    lambda_anchor: float = 90.0
    lambda_pairs: float = 90.0
    lambda_level: float = 12.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:  # false for NaN as well
                raise InputError(f"{name}={weight} must be a finite number, 0 or larger")


class CalibratedObjective(NamedTuple):
    """The terms of `functional.calibrated_loss` and those of single pairs; unweighted but total."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor
    anchor: Tensor
    pairs: Tensor
    level: Tensor


class Calibrated(TrainingMethod):
    """The modules of CLIPErase against an edited teacher, see the module.

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

        options = self.options

        def terms(features: BatchFeatures) -> CalibratedObjective:
            assert features.teacher_image is not None and features.teacher_text is not None
            assert features.background_image is not None and features.background_text is not None
            count, device = len(features.image), features.image.device
            forget_mask = torch.arange(count, dtype=torch.int64, device=device) < features.n_forget
            found = loss(
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
            pairs, level = pair_terms(features)
            total = found.total + options.lambda_pairs * pairs + options.lambda_level * level
            return CalibratedObjective(total, found.retain, found.forget, found.consistency, found.anchor, pairs, level)

        return terms


def pair_terms(features: BatchFeatures) -> tuple[Tensor, Tensor]:
    """Return the terms `pairs` and `level` of the module's formula over the batch of all ranks; 0-d float32."""
    count, ranks = features.n_forget, features.ranks
    assert features.teacher_image is not None and features.teacher_text is not None
    assert features.background_image is not None and features.background_text is not None
    cosines = _cosines(features.image, features.text)  # [M + N]
    background = (features.background_image + features.background_text)[:count].float() / 2  # [M]
    level = (cosines[:count] - background).abs()
    original = _cosines(features.teacher_image[count:], features.teacher_text[count:])  # [N]
    moved = (cosines[count:] - original).square()
    if ranks.size > 1:
        level, moved = (
            ranks.all_gather_with_gradient(part, counts)
            for part, counts in zip((level, moved), features.counts, strict=True)
        )
    return moved.mean(), level.mean()


def _cosines(image: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of each pair in float32; unit rows [n, D] -> [n]."""
    return (image.float() * text.float()).sum(1)


def _one_concept(caption_ids: Tensor | None, forget_mask: Tensor) -> Tensor | None:
    """Return the ids [P] with one for all forget pairs; caption_ids are at least 0."""
    return None if caption_ids is None else caption_ids.masked_fill(forget_mask, _FORGET_CONCEPT)
