"""Masked distillation: match the original with the forgotten associations masked out.

Over the joint batch of P = M + N pairs, with the similarities S of the student and S° of the original (or teacher=):

    E = {(i, j): caption j is a forget caption and image i shows the same concept}      the associations to remove
    P*_row = softmax over the columns of S° without E, and 0 on E;  P*_col the same over the rows
    L = mean over images i of KL(P*_row_i ‖ softmax_row(S)_i) + mean over captions j of KL(P*_col_j ‖ softmax_col(S)_j)

The student's softmax is over all columns, so whatever it has on E is loss. The rows of retain images without a forget
caption of their concept are plain distillation.

Source: DELETE (mask distillation), CVPR 2025, which masks the forgotten class of a classifier on the forget data. No
options. Limits: it forms P x P similarities. A pair's concept is its entity or class, else its caption, so
false_negatives="none" is refused. Nothing bounds how far the associations fall below the background.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.concepts import concepts, require_concepts
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class DistillationTerms(NamedTuple):
    """total = by_image + by_caption, the divergences over rows and over columns."""

    total: Tensor
    by_image: Tensor
    by_caption: Tensor


class MaskedDistillation(TrainingMethod):
    """Distillation from the original without the forgotten associations, see the module."""

    name = "masked_distillation"
    summary = "match the original with the forgotten associations masked out and renormalised"
    source = "DELETE, CVPR 2025"
    softmax_only = True
    needs = ("forget", "retain", "teacher")
    joint_teacher = True
    unused_settings = TERM_SETTINGS - {"teacher_cache"}

    def check_inputs(self, teacher: Any) -> None:
        super().check_inputs(teacher)
        require_concepts(self.settings)

    def objective(self, run: Run) -> Objective:
        def terms(features: BatchFeatures) -> DistillationTerms:
            by_image, by_caption = masked_divergences(features.gather())
            return DistillationTerms(by_image + by_caption, by_image, by_caption)

        return terms


def masked_divergences(features: BatchFeatures) -> tuple[Tensor, Tensor]:
    """Return the divergences over rows and over columns of the module's formula; 0-d."""
    dtype = torch.promote_types(features.image.dtype, torch.float32)
    teacher_image, teacher_text, teacher_scale = (
        features.teacher_image,
        features.teacher_text,
        features.teacher_logit_scale,
    )
    assert teacher_image is not None and teacher_text is not None and teacher_scale is not None
    mask = removed(features)
    with torch.autocast(features.image.device.type, enabled=False):
        own = features.logit_scale.to(dtype) * features.image.to(dtype) @ features.text.to(dtype).T
        teacher = teacher_scale.to(dtype) * teacher_image.to(dtype) @ teacher_text.to(dtype).T
        return _divergence(teacher, own, mask), _divergence(teacher.T, own.T, mask.T)


def removed(features: BatchFeatures) -> Tensor:
    """Return E: bool [P, P], image by caption."""
    ids = concepts(features)
    is_forget = torch.arange(len(ids), dtype=torch.int64, device=ids.device) < features.n_forget
    return (ids[:, None] == ids[None]) & is_forget[None]


def masked_targets(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of each row without the masked entries, which are 0; a row that is all masked is 0."""
    return logits.masked_fill(mask, -torch.inf).softmax(1).nan_to_num(0)


def _divergence(teacher: Tensor, own: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over rows of KL(masked targets ‖ softmax of `own`); [P, P] three times -> 0-d."""
    targets = masked_targets(teacher, mask)
    return (torch.xlogy(targets, targets) - targets * own.log_softmax(1)).sum(1).mean()
