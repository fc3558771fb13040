"""Backend "eager": the loss sweep written plainly, with N x N matrices and ordinary autograd.

The other backends are tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.spec import compute_dtype


def sweep(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    keep: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See `ops.spec.Sweep`. Memory: about ten N x N matrices."""
    dtype = compute_dtype(image, text, teacher_image, teacher_text)
    similarity = _similarity(image, text, logit_scale, dtype)  # [N, N]
    diagonal = torch.eye(len(image), dtype=torch.bool, device=image.device)  # [N, N]
    retention = consistency = similarity.new_zeros(())
    if want_retention:
        excluded = diagonal if group_ids is None else group_ids[:, None] == group_ids[None, :]  # [N, N]
        rows = _retention_rows(similarity, diagonal, excluded)
        retention = 0.5 * (rows + _retention_rows(similarity.T, diagonal, excluded)).mean()
    if want_consistency:
        assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
        teacher = _similarity(teacher_image, teacher_text, teacher_logit_scale, dtype)  # [N, N]
        rows = _divergence_rows(similarity, teacher, diagonal)
        consistency = (rows + _divergence_rows(similarity.T, teacher.T, diagonal)).mean()
    return retention, consistency


def sigmoid(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, offset: int, strip_rows: int = 0
) -> Tensor:
    """The sigmoid loss, see `ops/sigmoid.py`. Memory: about four n x m matrices."""
    dtype = compute_dtype(image, text)
    logits = _similarity(image, text, logit_scale, dtype) + logit_bias.to(dtype)  # [n, m]
    paired = torch.zeros_like(logits, dtype=torch.bool)
    paired.diagonal(offset).fill_(True)
    return -F.logsigmoid(torch.where(paired, logits, -logits)).sum() / len(image)


def row_losses(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor | None,
    teacher_keys: Tensor | None,
    teacher_logit_scale: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """See `ops/rows.py`. Memory: about six n x N matrices."""
    dtype = compute_dtype(query, keys, teacher_query, teacher_keys)
    similarity = _similarity(query, keys, logit_scale, dtype)  # [n, N]
    places = torch.arange(len(keys), dtype=torch.int64, device=keys.device)  # [N]
    own = places == offset + places[: len(query), None]  # [n, N]
    shifted = _against_diagonal(similarity, own, own)  # [n, N]
    normaliser = _log1p_exp(shifted.logsumexp(1))  # [n]
    if teacher_query is None or teacher_keys is None or teacher_logit_scale is None:
        return normaliser.mean(), similarity.new_zeros(())
    teacher = _similarity(teacher_query, teacher_keys, teacher_logit_scale, dtype)  # [n, N]
    expected = (teacher.softmax(1) * shifted.masked_fill(own, 0)).sum(1)  # [n]
    return normaliser.mean(), (normaliser - expected).mean()


def _similarity(image: Tensor, text: Tensor, logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (image.to(dtype) * logit_scale.to(dtype)) @ text.to(dtype).T  # [N, N]


def _against_diagonal(similarity: Tensor, diagonal: Tensor, excluded: Tensor) -> Tensor:
    """S_ij - S_ii; where excluded, the lowest finite number (a row of nothing but -inf has NaN gradients)."""
    # A masked sum of one entry, so exact. Of `similarity - similarity.diagonal()[:, None]` under a logsumexp, inductor
    # (torch 2.14) compiles the gradient wrongly.
    own = torch.where(diagonal, similarity, 0).sum(1, keepdim=True)  # [N, 1]
    return (similarity - own).masked_fill(excluded, torch.finfo(similarity.dtype).min)  # [N, N]


def _log1p_exp(log_odds: Tensor) -> Tensor:
    return torch.logaddexp(log_odds, torch.zeros_like(log_odds))


def _retention_rows(similarity: Tensor, diagonal: Tensor, excluded: Tensor) -> Tensor:
    """-log softmax(S_i)_i of each row i, without the excluded entries; `excluded` holds the diagonal."""
    return _log1p_exp(_against_diagonal(similarity, diagonal, excluded).logsumexp(1))  # [N]


def _divergence_rows(similarity: Tensor, teacher: Tensor, diagonal: Tensor) -> Tensor:
    """KL(softmax(S°_i) || softmax(S_i)) of each row i."""
    shifted = _against_diagonal(similarity, diagonal, diagonal)  # [N, N]
    shifted_teacher = _against_diagonal(teacher, diagonal, diagonal)  # [N, N]
    normaliser = _log1p_exp(shifted.logsumexp(1))  # [N], log Σ_j exp(S_ij - S_ii)
    normaliser_teacher = _log1p_exp(shifted_teacher.logsumexp(1))  # [N]
    p_teacher = (shifted_teacher - normaliser_teacher[:, None]).exp()  # [N, N], 0 on the diagonal
    return (p_teacher * (shifted_teacher - shifted)).sum(1) - normaliser_teacher + normaliser  # [N]


def features_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i KL(softmax(teacher_i) || softmax(student_i)) over the width, [] ; student, teacher: [N, D], N may be 0."""
    dtype = compute_dtype(student, teacher)
    log_p = F.log_softmax(student.to(dtype), 1)  # [N, D]
    log_p_teacher = F.log_softmax(teacher.to(dtype), 1)  # [N, D]
    return F.kl_div(log_p, log_p_teacher, reduction="sum", log_target=True) / max(len(student), 1)
