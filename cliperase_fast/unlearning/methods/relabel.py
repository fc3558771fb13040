"""Relabelling: train forget images on captions of other concepts, and retain pairs on their own.

    L = CLIP(retain pairs) + CLIP_f(relabelled)

Each forget image gets the caption of a retain pair of the same batch that shows another concept, another one in every
step. CLIP_f has denominators over the whole joint batch: the image against all captions, its own among them; the new
caption against all images. Pairs of the new caption's concept are not negatives of it.

Source: random labels, a baseline of many papers ("Amnesiac Machine Learning", arXiv 2010.10981), with captions in place
of labels. No options. Limits: the concepts are the pairs' entities or classes, else their captions, so
false_negatives="none" is refused. A forget image without another concept in its batch is left out of the step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import retain_clip_loss
from cliperase_fast.unlearning.methods.concepts import concepts, first_of_another, require_concepts
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class RelabelTerms(NamedTuple):
    """total = retain + relabelled, both CLIP losses."""

    total: Tensor
    retain: Tensor
    relabelled: Tensor


class Relabel(TrainingMethod):
    """Random captions for the forget images, see the module."""

    name = "relabel"
    summary = "the CLIP loss of forget images with captions of other concepts, and of retain pairs"
    source = "random labels, arXiv 2010.10981"
    softmax_only = True
    unused_settings = TERM_SETTINGS - {"backend"}

    def check_inputs(self, teacher: Any) -> None:
        super().check_inputs(teacher)
        require_concepts(self.settings)

    def objective(self, run: Run) -> Objective:
        def terms(features: BatchFeatures) -> RelabelTerms:
            retain, relabelled = retain_clip_loss(features, self.settings.backend), relabel_loss(features.gather())
            return RelabelTerms(retain + relabelled, retain, relabelled)

        return terms


def new_captions(features: BatchFeatures) -> Tensor:
    """Return for each forget image the pair whose caption it gets, a row of the batch; int64 [M], -1 for none."""
    count, ids = features.n_forget, concepts(features)
    slots = torch.arange(count, dtype=torch.int64, device=ids.device)
    found = first_of_another(ids[:count], ids[count:], slots % (len(ids) - count))
    return torch.where(found >= 0, count + found, -1)


def relabel_loss(features: BatchFeatures) -> Tensor:
    """Return the CLIP loss of the relabelled forget images, with denominators over the whole joint batch; 0-d."""
    dtype = torch.promote_types(features.image.dtype, torch.float32)
    places = new_captions(features)
    slots = (places >= 0).nonzero().squeeze(1)  # [M'], the forget images that take part
    places = places[slots]
    ids = concepts(features)
    shown = ids.scatter(0, slots, ids[places])  # the concept of each image's caption
    with torch.autocast(features.image.device.type, enabled=False):
        image, text = features.image.to(dtype), features.text.to(dtype)
        scale = features.logit_scale.to(dtype)
        by_image = _cross_entropy(scale * image[slots] @ text.T, places, ids[places, None] == ids[None])
        by_caption = _cross_entropy(scale * text[places] @ image.T, slots, ids[places, None] == shown[None])
    return (by_image + by_caption) / 2


def _cross_entropy(logits: Tensor, targets: Tensor, same: Tensor) -> Tensor:
    """Return the mean over rows of -log softmax at the target, without the other columns of the same concept.

    logits: [M', P]; targets: [M']; same: bool [M', P]. 0 without rows.
    """
    own = logits.gather(1, targets[:, None])  # [M', 1]
    others = logits.masked_fill(same.scatter(1, targets[:, None], False), -torch.inf)
    return (others.logsumexp(1) - own.squeeze(1)).sum() / max(len(logits), 1)
