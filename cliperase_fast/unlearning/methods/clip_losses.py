"""The CLIP losses of the forget pairs and of the retain pairs, from which several methods are built.

For a model that was trained with the sigmoid loss they are sigmoid losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cliperase_fast.contrastive import sigmoid_cliperase_loss
from cliperase_fast.functional import LossTerms, clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures


def forget_clip_loss(features: BatchFeatures) -> Tensor:
    """Return the CLIP loss of the forget pairs, with denominators over the whole joint batch.

    In a batch of one concept alone the gradient would vanish, as all captions are the same. Pairs that share the group
    of a forget pair are not negatives of it. It forms the similarities of forget pairs with the whole batch,
    2 M (M + N). On several ranks pass `features.gather()`.
    """
    count, dtype = features.n_forget, torch.promote_types(features.image.dtype, torch.float32)
    bias = features.logit_bias
    with torch.autocast(features.image.device.type, enabled=False):
        image, text = features.image.to(dtype), features.text.to(dtype)
        both = [
            features.logit_scale.to(dtype) * rows[:count] @ columns.T
            for rows, columns in ((image, text), (text, image))
        ]
        if bias is None:
            losses = [_cross_entropy(logits, features.group_ids) for logits in both]
        else:
            losses = [_sigmoid_rows(logits + bias, features.group_ids) for logits in both]
    return (losses[0] + losses[1]) / 2


def retain_clip_loss(features: BatchFeatures, backend: str = "auto") -> Tensor:
    """Return the fused CLIP loss of the retain pairs among themselves, over the batch of all ranks."""
    if features.logit_bias is not None:
        return sigmoid_terms(features, backend, lambda_retain=1.0, lambda_forget=0.0, lambda_consistency=0.0).total
    return clip_loss(
        features.retain_image,
        features.retain_text,
        features.logit_scale,
        group_ids=features.retain_group_ids,
        process_group=features.ranks.process_group or "local",
        backend=backend,
    )


def sigmoid_terms(features: BatchFeatures, backend: str = "auto", **options: Any) -> LossTerms:
    """Return the CLIPErase terms of a model with the sigmoid loss. options: of `contrastive.sigmoid_cliperase_loss`."""
    assert features.logit_bias is not None
    return sigmoid_cliperase_loss(
        features.forget_image,
        features.forget_text,
        features.retain_image,
        features.retain_text,
        features.teacher_image,
        features.teacher_text,
        features.logit_scale,
        features.logit_bias,
        features.teacher_logit_scale,
        features.teacher_logit_bias,
        group_ids=features.retain_group_ids,
        process_group=features.ranks.process_group or "local",
        backend=backend,
        **options,
    )


def _sigmoid_rows(logits: Tensor, group_ids: Tensor | None) -> Tensor:
    """Return the mean over rows m of the sigmoid loss of all columns, where column m is the pair. logits: [M, P]."""
    losses = softplus(logits, threshold=40)
    if group_ids is not None:
        losses = losses.masked_fill(group_ids[: len(logits), None] == group_ids[None], 0)  # the pair's own too
        return (losses.sum(1) + softplus(-logits.diagonal(), threshold=40)).mean()
    return (losses.sum(1) - logits.diagonal()).mean()


def _cross_entropy(logits: Tensor, group_ids: Tensor | None) -> Tensor:
    """Return the mean over rows m of -log softmax at column m. logits: [M, P]."""
    count = len(logits)
    if group_ids is not None:
        same = group_ids[:count, None] == group_ids[None]  # [M, P]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    return (logits.logsumexp(1) - logits.diagonal()).mean()
