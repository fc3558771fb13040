"""MultiDelete: unrelate the two modalities of forget pairs, and keep what each tower knows and what retain pairs share.

A pair's joint representation is J = (I, T, <I, T>): its projected, normalised features and their similarity. h are the
features of a tower before its projection, of the image or of the caption. ° marks the frozen original.

    decoupling = mean over the forget pairs of |J - J°(image j, caption k)|²,   j, k a random unpaired pair
    multimodal = mean over the retain pairs of |J - J°|²
    unimodal   = mean over all pairs of |h - h°|² / |h°|² of the image + the same of the caption
    L = lambda_decoupling decoupling + lambda_multimodal multimodal + lambda_unimodal unimodal

Source: "MultiDelete for Multimodal Machine Unlearning", arXiv 2311.12047, where the joint representation is that of a
fusion module; two towers have none. Its distances are mean squared errors; here those of J are sums, and those of h are
relative to h°, so that the three terms are of one size whatever the widths. Unimodal knowledge is kept on retain pairs
as well as on forget pairs.

The unpaired pairs are drawn from the retain pairs of the same batch, which are random: images in turn, each with the
next caption of another concept (of a forget pair, if the retain pairs of the batch have one concept only). Towers
whose projection is unknown, as in modules of the caller's own and in CLIP's ResNets, have their unnormalised features
for h.

Defaults: all weights 1. Limits: the decoupling term pulls features to a different place in every step, so it settles at
the mean of unrelated pairs and does not reach 0. It compares features with the original's, so another teacher is
refused, and so is DeepSpeed, which runs the towers itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.concepts import first_of_another
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


@dataclass(frozen=True)
class MultiDeleteOptions:
    """Weights of the three terms."""

    lambda_decoupling: float = 1.0
    lambda_multimodal: float = 1.0
    lambda_unimodal: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:  # false for NaN as well
                raise InputError(f"{name}={weight} must be a finite number, 0 or larger")


class MultiDeleteTerms(NamedTuple):
    """The terms of the module's formula, unweighted but total."""

    total: Tensor
    decoupling: Tensor
    multimodal: Tensor
    unimodal: Tensor


class MultiDelete(TrainingMethod):
    """Modality decoupling with multimodal and unimodal knowledge retention, see the module."""

    name = "multidelete"
    summary = "forget pairs become like unpaired ones, retain pairs and each tower's own features stay"
    source = "MultiDelete, arXiv 2311.12047"
    needs = ("forget", "retain", "teacher")
    joint_teacher = True
    tower_features = True
    unused_settings = (TERM_SETTINGS - {"teacher_cache"}) | {"deepspeed"}
    Options = MultiDeleteOptions

    def check_inputs(self, teacher: Any) -> None:
        super().check_inputs(teacher)
        if teacher is not None:
            raise InputError("method='multidelete' keeps the features of the original model itself: leave out teacher=")

    def objective(self, run: Run) -> Objective:
        options = self.options

        def terms(features: BatchFeatures) -> MultiDeleteTerms:
            decoupling, multimodal, unimodal = knowledge_terms(features.gather())
            total = (
                options.lambda_decoupling * decoupling
                + options.lambda_multimodal * multimodal
                + options.lambda_unimodal * unimodal
            )
            return MultiDeleteTerms(total, decoupling, multimodal, unimodal)

        return terms


def knowledge_terms(features: BatchFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms decoupling, multimodal and unimodal of the batch; 0-d, float32 or wider."""
    count = features.n_forget
    assert features.teacher_image is not None and features.teacher_text is not None
    image, text, teacher_image, teacher_text = (
        _wide(rows) for rows in (features.image, features.text, features.teacher_image, features.teacher_text)
    )
    images, captions = unpaired(features)
    decoupling = _joint_distances(image[:count], text[:count], teacher_image[images], teacher_text[captions])
    multimodal = _joint_distances(image[count:], text[count:], teacher_image[count:], teacher_text[count:])
    unimodal = _relative_distances(features.image_tower, features.teacher_image_tower) + _relative_distances(
        features.text_tower, features.teacher_text_tower
    )
    return decoupling.mean(), multimodal.mean(), unimodal.mean()


def unpaired(features: BatchFeatures) -> tuple[Tensor, Tensor]:
    """Return an unpaired image and caption for each forget pair: rows of the batch, int64 [M] twice."""
    count, pairs, device = features.n_forget, len(features.image), features.image.device
    slots = torch.arange(count, dtype=torch.int64, device=device)
    ids = features.group_ids
    if ids is None:  # all pairs are told apart
        ids = torch.arange(pairs, dtype=torch.int64, device=device)
    images = slots % (pairs - count)  # of the retain pairs
    own = ids[count:][images]
    captions = first_of_another(own, ids[count:], (images + 1) % (pairs - count))
    forgotten = first_of_another(own, ids[:count], slots)
    return count + images, torch.where(captions >= 0, count + captions, forgotten.clamp(min=0))


def _joint_distances(image: Tensor, text: Tensor, other_image: Tensor, other_text: Tensor) -> Tensor:
    """Return the squared distance of pairs' joint representations; unit rows [n, D] four times -> [n]."""
    apart = (image - other_image).square().sum(1) + (text - other_text).square().sum(1)
    return apart + ((image * text).sum(1) - (other_image * other_text).sum(1)).square()


def _relative_distances(rows: Tensor | None, original: Tensor | None) -> Tensor:
    """Return the squared distance from the original's rows relative to their length; [n, W] twice -> [n]."""
    assert rows is not None and original is not None
    rows, original = _wide(rows), _wide(original)
    smallest = torch.finfo(original.dtype).tiny  # a row of zeros
    return (rows - original).square().sum(1) / original.square().sum(1).clamp(min=smallest)


def _wide(rows: Tensor) -> Tensor:
    """Return the rows in float32, or as they are in float64."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
