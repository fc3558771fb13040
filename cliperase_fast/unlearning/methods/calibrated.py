"""Calibrated forgetting: push forget pairs to the level of unrelated pairs, and hold everything else in place.

The loss is `functional.calibrated_loss` plus two terms over single pairs, O((M + N) D):

    level = mean over the forget pairs of |C_mm - C*_mm|,    C*_mm the pair's background level
    held  = mean |I_m - I°_m|² over the forget pairs + mean (|I_i - I°_i|² + |T_i - T°_i|²) over the retain pairs

The loss alone stops above the background where concepts share their parts, as "red circle" shares red with other
shapes: its squared distance fades near the target and balances with the anchor. Nor does it lift forget pairs that have
fallen below the background, as digits do in the first steps. The absolute distance does both.

Cosines say little about what a batch does not show, such as other facts about a person who is in the forget pairs.
`held` keeps the features themselves, so that these stay where they are; only the captions of the forget pairs are free.
A teacher that is not the original has features of its own; then the cosines of the retain pairs are held instead:

    held  = mean over the retain pairs of (C_ii - C°_ii)²
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
from cliperase_fast.unlearning.methods.calibrated_terms import joint_terms, sigmoid_terms
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run

_FORGET_CONCEPT = -1  # of all forget pairs of data whose pairs name no concept


@dataclass(frozen=True)
class CalibratedOptions:
    """Weights of the terms that only this method has.

    lambda_anchor: of the squared distance of all other cosines from the original's. lambda_held: of that of the
    features of images and of retained captions. lambda_level: of the distance of the forget pairs' cosines from their
    background level.
    """

    lambda_anchor: float = 30.0
    lambda_held: float = 3000.0
    lambda_level: float = 33.0

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
    held: Tensor
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
    presses = True
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

        options, own_teacher = self.options, run.setup.inputs.teacher is None

        def terms(features: BatchFeatures) -> CalibratedObjective:
            concepts = features.group_ids if by_concept else _one_concept(features.group_ids, features.n_forget)
            terms_of = joint_terms if features.logit_bias is None else sigmoid_terms
            found = terms_of(loss, features, concepts)
            held, level = pair_terms(features, own_teacher)
            pressed = options.lambda_level * (run.pressure or 1.0)
            total = found.total + options.lambda_held * held + pressed * level
            return CalibratedObjective(total, found.retain, found.forget, found.consistency, found.anchor, held, level)

        return terms


def pair_terms(features: BatchFeatures, own_teacher: bool = True) -> tuple[Tensor, Tensor]:
    """Return the terms `held` and `level` of the module's formula over the batch of all ranks; 0-d float32.

    own_teacher: whether the teacher is the original.
    """
    count = features.n_forget
    image, text, teacher_image, teacher_text = (
        features.image,
        features.text,
        features.teacher_image,
        features.teacher_text,
    )
    assert teacher_image is not None and teacher_text is not None
    assert features.background_image is not None and features.background_text is not None
    cosines = _cosines(image, text)  # [M + N]
    background = (features.background_image + features.background_text)[:count].float() / 2  # [M]
    level = (cosines[:count] - background).abs()
    if own_teacher:
        of_images = _distances(image, teacher_image)  # [M + N]
        moved = of_images[count:] + _distances(text[count:], teacher_text[count:])  # [N]
        held = _mean(moved, features, 1) + _mean(of_images[:count], features, 0)
    else:
        held = _mean((cosines - _cosines(teacher_image, teacher_text))[count:].square(), features, 1)
    return held, _mean(level, features, 0)


def _mean(part: Tensor, features: BatchFeatures, which: int) -> Tensor:
    """Return the mean over the pairs of all ranks. which: 0 for a part over forget pairs, 1 over retain pairs."""
    if features.ranks.size > 1:
        part = features.ranks.all_gather_with_gradient(part, features.counts[which])
    return part.mean()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance between rows of the same number in float32; [n, D] twice -> [n]."""
    return (rows.float() - others.float()).square().sum(1)


def _cosines(image: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of each pair in float32; unit rows [n, D] -> [n]."""
    return (image.float() * text.float()).sum(1)


def _one_concept(caption_ids: Tensor | None, n_forget: int) -> Tensor | None:
    """Return the ids [P] with one for all forget pairs, which come first; caption_ids are at least 0."""
    if caption_ids is None:
        return None
    return torch.cat([torch.full_like(caption_ids[:n_forget], _FORGET_CONCEPT), caption_ids[n_forget:]])
