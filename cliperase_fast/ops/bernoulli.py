"""Compute retention and consistency of a model that was trained with the sigmoid loss (SigLIP, arXiv 2303.15343).

Such a model says for each image and text by itself whether they belong together, with probability sigmoid(X_ij) for
X = s I Tᵀ + b [n, m]. With t_ij = 1 where row i and column i + pair_offset are a pair and 0 elsewhere, w_ij = 0 for
other pairs of equal group id and 1 elsewhere, and X° of the teacher,

    retention    Σ_ij w_ij [softplus(X_ij) - t_ij X_ij]        the sigmoid loss
    consistency  Σ_ij KL(Bernoulli(sigmoid(X°_ij)) || Bernoulli(sigmoid(X_ij)))
    dX           lambda_retain w (sigmoid(X) - t) + lambda_consistency (sigmoid(X) - sigmoid(X°))

Each entry depends on its own X and X° only, so one pass forms both, sums the losses and multiplies dX with the
features. The KL of an entry is softplus(v) - softplus(u) - sigmoid(u) (v - u) with u = -|X°| and v = X with the same
change of sign: the terms are small where the teacher is sure, so their difference keeps its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.spec import Need, SimilarityInputs
from cliperase_fast.ops.streaming import Similarity, strip_height

_LINEAR = 40  # above it, log(1 + exp(x)) is x in float64 too


class BernoulliInputs(NamedTuple):
    """similarity: has a bias, and a teacher if the consistency is wanted. teacher_bias: []; None without a teacher.

    lambda_retain, lambda_consistency: the weights of the terms in the gradients.
    """

    similarity: SimilarityInputs
    teacher_bias: Tensor | None
    lambda_retain: float
    lambda_consistency: float


class BernoulliParts(NamedTuple):
    """Hold sums over all entries in the computing dtype; gradients not needed are empty tensors."""

    retain: Tensor  # []
    consistency: Tensor  # []
    grad_image: Tensor  # [n, D], of the weighted sum of both, as the others
    grad_text: Tensor  # [m, D]
    grad_scale: Tensor  # []
    grad_bias: Tensor  # []


def streamed(inputs: BernoulliInputs, need: Need) -> BernoulliParts:
    """Compute the parts in strips of rows, on any device. Memory: some eight strips [h, m]. need.scale: bias too."""
    given = inputs.similarity
    assert given.bias is not None
    n, m, dtype = given.n, given.m, given.dtype
    similarity = Similarity(given.image, given.text, given.scale, dtype)
    teacher = None if given.teacher is None else Similarity(*given.teacher, dtype)
    text, bias = similarity.text, given.bias.to(dtype)
    height = strip_height(n, m, given.strip_rows, text)
    strips = text.new_empty(2, height, m)
    grad_image = text.new_empty(given.image.shape if need.image else (0,))
    grad_text = text.new_zeros(text.shape if need.text else (0,))
    retain, consistency, grad_scale, grad_bias = text.new_zeros(4).unbind()
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        x = similarity.strip(start, rows.stop, strips[0]).add_(bias)  # [h, m]
        frozen = None
        if teacher is not None and inputs.teacher_bias is not None:
            frozen = teacher.strip(start, rows.stop, strips[1]).add_(inputs.teacher_bias.to(dtype))
        losses, divergences = entry_losses(x, frozen, given, rows)
        retain = retain + losses.sum()
        if divergences is not None:
            consistency = consistency + divergences.sum()
        if not any(need):
            continue
        dx = _entry_gradients(x, frozen, inputs, rows)
        image_rows = similarity.image_rows(start, rows.stop)
        if need.image or need.scale:
            product = dx @ text  # [h, D]
            if need.scale:
                grad_scale = grad_scale + (product * image_rows).sum()  # before the factor s, which may be 0
                grad_bias = grad_bias + dx.sum()
            if need.image:
                grad_image[rows] = product.mul_(similarity.scale)
        if need.text:
            grad_text.addmm_(dx.T, image_rows)
    return BernoulliParts(retain, consistency, grad_image, grad_text.mul_(similarity.scale), grad_scale, grad_bias)


def entry_losses(
    x: Tensor, frozen: Tensor | None, given: SimilarityInputs, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of a strip of X [h, m], and the divergences from that of X° if there is one."""
    losses = F.softplus(x, threshold=_LINEAR)
    ignored, paired = _ignored(given, rows, x), _paired(given, rows, x)
    losses = losses - x * paired
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0)
    if frozen is None:
        return losses, None
    u, v = -frozen.abs(), torch.where(frozen > 0, -x, x)
    return losses, F.softplus(v, threshold=_LINEAR) - F.softplus(u, threshold=_LINEAR) - u.sigmoid() * (v - u)


def _entry_gradients(x: Tensor, frozen: Tensor | None, inputs: BernoulliInputs, rows: slice) -> Tensor:
    """Return the strip of dX."""
    given = inputs.similarity
    p = x.sigmoid()
    dx = p - _paired(given, rows, x)
    ignored = _ignored(given, rows, x)
    if ignored is not None:
        dx.masked_fill_(ignored, 0)
    dx.mul_(inputs.lambda_retain)
    if frozen is not None:
        dx.add_(p.sub_(frozen.sigmoid()), alpha=inputs.lambda_consistency)
    return dx


def _paired(given: SimilarityInputs, rows: slice, like: Tensor) -> Tensor:
    """Return t of a strip: 1 for pairs."""
    paired = torch.zeros_like(like)
    paired.diagonal(rows.start + given.pair_offset).fill_(1)
    return paired


def _ignored(given: SimilarityInputs, rows: slice, like: Tensor) -> Tensor | None:
    """Return which entries of a strip leave the retention: other pairs of equal group id; None for none."""
    if given.group_ids is None or given.column_groups is None:
        return None
    same = given.group_ids[rows, None] == given.column_groups[None]
    same.diagonal(rows.start + given.pair_offset).fill_(False)
    return same
