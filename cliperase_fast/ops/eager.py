"""Backend "eager": compute the loss sweep plainly, with N x N matrices and ordinary autograd.

The other backends are tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.calibrated import CalibratedInputs
from cliperase_fast.ops.spec import SimilarityInputs, compute_dtype


def sweep(inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
    """Implement `ops.spec.Sweep`. Memory: about ten N x N matrices."""
    similarity = _similarity(inputs.image, inputs.text, inputs.scale, inputs.dtype)  # [N, N]
    diagonal = torch.eye(inputs.n, dtype=torch.bool, device=similarity.device)  # [N, N]
    retention = consistency = similarity.new_zeros(())
    if inputs.want_retention:
        ids = inputs.group_ids
        excluded = diagonal if ids is None else ids[:, None] == ids[None, :]  # [N, N]
        rows = _retention_rows(similarity, diagonal, excluded)
        retention = 0.5 * (rows + _retention_rows(similarity.T, diagonal, excluded)).mean()
    if inputs.teacher is not None:
        teacher = _similarity(*inputs.teacher, inputs.dtype)  # [N, N]
        rows = _divergence_rows(similarity, teacher, diagonal)
        consistency = (rows + _divergence_rows(similarity.T, teacher.T, diagonal)).mean()
    return retention, consistency


def calibrated(inputs: CalibratedInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (retention, forget, consistency, anchor), see `ops/calibrated.py`. Memory: some fifteen P x P matrices."""
    dtype, forgotten = inputs.dtype, inputs.forget_mask
    cosines = inputs.image.to(dtype) @ inputs.text.to(dtype).T  # [P, P]
    similarity = inputs.scale.to(dtype) * cosines
    diagonal = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)  # [P, P]
    ids = inputs.group_ids
    same = diagonal if ids is None else ids[:, None] == ids[None, :]  # [P, P]
    edited = forgotten & (forgotten[:, None] if ids is None else same)  # [P, P]

    excluded = same | forgotten | forgotten[:, None]
    rows = _retention_rows(similarity, diagonal, excluded)  # [P], 0 for forget pairs
    retention = 0.5 * (rows + _retention_rows(similarity.T, diagonal, excluded)).sum() / _at_least_one(~forgotten)

    background = 0.5 * (inputs.background_image.to(dtype)[:, None] + inputs.background_text.to(dtype))  # [P, P]
    target = torch.where(edited, background, inputs.teacher_image.to(dtype) @ inputs.teacher_text.to(dtype).T)
    teacher = inputs.teacher_scale.to(dtype) * target
    consistency = _divergence_rows(similarity, teacher, diagonal) + _divergence_rows(similarity.T, teacher.T, diagonal)

    difference = cosines - target
    forget = difference.masked_fill(~edited, 0).relu().square().sum() / _at_least_one(edited)
    anchor = difference.masked_fill(edited, 0).square().sum() / _at_least_one(~edited)
    return retention, forget, consistency.mean(), anchor


def _at_least_one(mask: Tensor) -> Tensor:
    return mask.sum().clamp(min=1)


def sigmoid(inputs: SimilarityInputs) -> Tensor:
    """Compute the sigmoid loss, see `ops/sigmoid.py`. Memory: about four n x m matrices."""
    assert inputs.bias is not None
    logits = _similarity(inputs.image, inputs.text, inputs.scale, inputs.dtype) + inputs.bias.to(inputs.dtype)  # [n, m]
    paired = torch.zeros_like(logits, dtype=torch.bool)
    paired.diagonal(inputs.pair_offset).fill_(True)
    return -F.logsigmoid(torch.where(paired, logits, -logits)).sum() / inputs.n


def bernoulli(inputs: SimilarityInputs, teacher_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (retention, consistency), means over the rows, see `ops/bernoulli.py`. Memory: some ten n x m matrices."""
    assert inputs.bias is not None
    logits = _similarity(inputs.image, inputs.text, inputs.scale, inputs.dtype) + inputs.bias.to(inputs.dtype)  # [n, m]
    paired = torch.zeros_like(logits, dtype=torch.bool)
    paired.diagonal(inputs.pair_offset).fill_(True)
    losses = -F.logsigmoid(torch.where(paired, logits, -logits))
    if inputs.group_ids is not None and inputs.column_groups is not None:
        same = inputs.group_ids[:, None] == inputs.column_groups[None]
        losses = losses.masked_fill(same & ~paired, 0)
    retention = losses.sum() / inputs.n
    if inputs.teacher is None or teacher_bias is None:
        return retention, retention.new_zeros(())
    teacher = _similarity(*inputs.teacher, inputs.dtype) + teacher_bias.to(inputs.dtype)
    divergence = sum(
        (sign * teacher).sigmoid() * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * logits)) for sign in (1, -1)
    )
    assert isinstance(divergence, Tensor)
    return retention, divergence.sum() / inputs.n


def row_losses(inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
    """Compute the row losses, see `ops/rows.py`. Memory: about six n x N matrices."""
    similarity = _similarity(inputs.image, inputs.text, inputs.scale, inputs.dtype)  # [n, N]
    places = torch.arange(inputs.m, dtype=torch.int64, device=similarity.device)  # [N]
    own = places == inputs.pair_offset + places[: inputs.n, None]  # [n, N]
    shifted = _against_diagonal(similarity, own, own)  # [n, N]
    normaliser = _log1p_exp(shifted.logsumexp(1))  # [n]
    if inputs.teacher is None:
        return normaliser.mean(), similarity.new_zeros(())
    teacher = _similarity(*inputs.teacher, inputs.dtype)  # [n, N]
    expected = (teacher.softmax(1) * shifted.masked_fill(own, 0)).sum(1)  # [n]
    return normaliser.mean(), (normaliser - expected).mean()


def _similarity(image: Tensor, text: Tensor, logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (image.to(dtype) * logit_scale.to(dtype)) @ text.to(dtype).T  # [N, N]


def _against_diagonal(similarity: Tensor, diagonal: Tensor, excluded: Tensor) -> Tensor:
    """Return S_ij - S_ii; where excluded, the lowest finite number (a row of only -inf has NaN gradients)."""
    # A masked sum of one entry, so exact. Inductor (torch 2.14) compiles a wrong gradient for
    # `similarity - similarity.diagonal()[:, None]` under a logsumexp.
    own = torch.where(diagonal, similarity, 0).sum(1, keepdim=True)  # [N, 1]
    return (similarity - own).masked_fill(excluded, torch.finfo(similarity.dtype).min)  # [N, N]


def _log1p_exp(log_odds: Tensor) -> Tensor:
    return torch.logaddexp(log_odds, torch.zeros_like(log_odds))


def _retention_rows(similarity: Tensor, diagonal: Tensor, excluded: Tensor) -> Tensor:
    """Return -log softmax(S_i)_i of each row i, without the excluded entries; `excluded` contains the diagonal."""
    return _log1p_exp(_against_diagonal(similarity, diagonal, excluded).logsumexp(1))  # [N]


def _divergence_rows(similarity: Tensor, teacher: Tensor, diagonal: Tensor) -> Tensor:
    """Return KL(softmax(S°_i) || softmax(S_i)) of each row i."""
    shifted = _against_diagonal(similarity, diagonal, diagonal)  # [N, N]
    shifted_teacher = _against_diagonal(teacher, diagonal, diagonal)  # [N, N]
    normaliser = _log1p_exp(shifted.logsumexp(1))  # [N], log Σ_j exp(S_ij - S_ii)
    normaliser_teacher = _log1p_exp(shifted_teacher.logsumexp(1))  # [N]
    p_teacher = (shifted_teacher - normaliser_teacher[:, None]).exp()  # [N, N], 0 on the diagonal
    return (p_teacher * (shifted_teacher - shifted)).sum(1) - normaliser_teacher + normaliser  # [N]


def features_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return mean_i KL(softmax(teacher_i) || softmax(student_i)) over the width, 0-d. Both: [N, D]; N may be 0."""
    dtype = compute_dtype(student, teacher)
    log_p = F.log_softmax(student.to(dtype), 1)  # [N, D]
    log_p_teacher = F.log_softmax(teacher.to(dtype), 1)  # [N, D]
    return F.kl_div(log_p, log_p_teacher, reduction="sum", log_target=True) / max(len(student), 1)
