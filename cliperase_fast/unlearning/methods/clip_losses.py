"""The CLIP losses of the forget pairs and of the retain pairs, from which several methods are built."""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.functional import clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures


def forget_clip_loss(features: BatchFeatures) -> Tensor:
    """Return the CLIP loss of the forget pairs, with denominators over the whole joint batch.

    In a batch of one concept alone the gradient would vanish, as all captions are the same. Pairs that share the group
    of a forget pair are not negatives of it. It forms the similarities of forget pairs with the whole batch,
    2 M (M + N). On several ranks pass `features.gather()`.
    """
    count, dtype = features.n_forget, torch.promote_types(features.image.dtype, torch.float32)
    with torch.autocast(features.image.device.type, enabled=False):
        image, text = features.image.to(dtype), features.text.to(dtype)
        losses = [
            _cross_entropy(features.logit_scale.to(dtype) * rows[:count] @ columns.T, features.group_ids)
            for rows, columns in ((image, text), (text, image))
        ]
    return (losses[0] + losses[1]) / 2


def retain_clip_loss(features: BatchFeatures, backend: str = "auto") -> Tensor:
    """Return the fused CLIP loss of the retain pairs among themselves, over the batch of all ranks."""
    return clip_loss(
        features.retain_image,
        features.retain_text,
        features.logit_scale,
        group_ids=features.retain_group_ids,
        process_group=features.ranks.process_group or "local",
        backend=backend,
    )


def _cross_entropy(logits: Tensor, group_ids: Tensor | None) -> Tensor:
    """Return the mean over rows m of -log softmax at column m. logits: [M, P]."""
    count = len(logits)
    if group_ids is not None:
        same = group_ids[:count, None] == group_ids[None]  # [M, P]
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    return (logits.logsumexp(1) - logits.diagonal()).mean()
