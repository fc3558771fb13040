"""The terms of calibrated forgetting over a joint batch, for models of the softmax loss and of the sigmoid loss.

For the sigmoid loss (SigLIP) those on cosines, FM and AM of `functional.calibrated_loss`, are the same. With
X = s C + b of the P pairs of the joint batch, X* = s° C* + b° of the edited teacher, and the sigmoid loss of the retain
pairs for the retention RM,

    consistency  CM = mean_i Σ_j KL(Bernoulli(sigmoid(X*_ij)) || Bernoulli(sigmoid(X_ij)))

C* differs from the teacher's cosines only on E, whose entries lie in the columns of forget captions. So CM is the fused
consistency with the teacher as it is, and on E the difference between the two: [P, M] numbers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from cliperase_fast.functional import CalibratedTerms
from cliperase_fast.losses import CalibratedLoss
from cliperase_fast.ops.spec import compute_dtype
from cliperase_fast.unlearning.methods import clip_losses
from cliperase_fast.unlearning.objective import BatchFeatures


def joint_terms(loss: CalibratedLoss, features: BatchFeatures, concepts: Tensor | None) -> CalibratedTerms:
    """Return the terms over the batch of all ranks.

    features: with the teacher's of all pairs, and background levels. concepts: int64 [P], the concept of each pair;
    None if the forget pairs are one, which no retain pair has.
    """
    assert features.teacher_image is not None and features.teacher_text is not None
    assert features.teacher_logit_scale is not None
    places = torch.arange(len(features.image), dtype=torch.int64, device=features.image.device)
    found: CalibratedTerms = loss(
        features.image,
        features.text,
        features.teacher_image,
        features.teacher_text,
        features.logit_scale,
        features.teacher_logit_scale,
        forget_mask=places < features.n_forget,
        group_ids=concepts,
        background_image=features.background_image,
        background_text=features.background_text,
    )
    return found


def sigmoid_terms(loss: CalibratedLoss, features: BatchFeatures, concepts: Tensor | None) -> CalibratedTerms:
    """Return the terms, as `joint_terms` does, of a model that was trained with the sigmoid loss, see the module."""
    weights = (loss.lambda_retain, loss.lambda_forget, loss.lambda_consistency, loss.lambda_anchor)
    zero = 0 * (features.image.sum() + features.text.sum() + features.logit_scale).to(
        compute_dtype(features.image, features.text)
    )
    retain = forget = consistency = anchor = zero
    if loss.lambda_forget > 0 or loss.lambda_anchor > 0:
        on_cosines = CalibratedLoss(
            0.0, loss.lambda_forget, 0.0, loss.lambda_anchor, process_group=loss.process_group, backend=loss.backend
        )
        forget, anchor = joint_terms(on_cosines, features, concepts)[2::2]
    if loss.lambda_retain > 0:
        retain = clip_losses.retain_clip_loss(features, loss.backend)
    if loss.lambda_consistency > 0:
        joint = replace(features, n_forget=0, group_ids=None)
        as_it_is = {"lambda_retain": 0.0, "lambda_forget": 0.0, "lambda_consistency": 1.0}
        unedited = clip_losses.sigmoid_terms(joint, loss.backend, **as_it_is).total
        consistency = unedited + _edit(replace(features, group_ids=concepts).gather())
    terms = (retain, forget, consistency, anchor)
    total = sum((weight * term for weight, term in zip(weights, terms, strict=True)), zero)
    return CalibratedTerms(total, *terms)


def _edit(batch: BatchFeatures) -> Tensor:
    """Return what the edited entries add to CM of the whole batch, whose group_ids are concepts; 0-d."""
    count, dtype = batch.n_forget, compute_dtype(batch.image, batch.text)
    assert batch.teacher_image is not None and batch.teacher_text is not None
    assert batch.background_image is not None and batch.background_text is not None
    assert batch.teacher_logit_scale is not None and batch.teacher_logit_bias is not None
    assert batch.logit_bias is not None
    with torch.autocast(batch.image.device.type, enabled=False):
        logits = batch.logit_scale.to(dtype) * batch.image.to(dtype) @ batch.forget_text.to(dtype).T + batch.logit_bias
        cosines = batch.teacher_image.to(dtype) @ batch.teacher_text[:count].to(dtype).T  # [P, M]
        levels = (batch.background_image[:, None].to(dtype) + batch.background_text[None, :count].to(dtype)) / 2
        scale, bias = batch.teacher_logit_scale.to(dtype), batch.teacher_logit_bias
        change = _divergence(scale * levels + bias, logits) - _divergence(scale * cosines + bias, logits)
        if batch.group_ids is not None:
            removed = batch.group_ids[:, None] == batch.group_ids[None, :count]
        else:
            removed = torch.zeros_like(change, dtype=torch.bool)
            removed[:count] = True
        return change.masked_fill(~removed, 0).sum() / max(len(batch.image), 1)


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid(target)) || Bernoulli(sigmoid(logits))) of each entry."""
    return softplus(logits, threshold=40) - softplus(target, threshold=40) + target.sigmoid() * (target - logits)
