"""From the sums of a sweep to its losses, and from the incoming gradients to the terms of dS: O(N), for any backend.

`state` [8, N] is what a backward pass needs of the forward one:

    0     d, the diagonal of S
    1     d°, the diagonal of S° (0 without a teacher)
    2, 3  r of the rows and of the columns for the retention, without the pairs left out by group_ids
    4, 5  r of the rows and columns of S
    6, 7  r of the rows and columns of S° (0 without a teacher)

with r the log-odds of the rest of a row or column against its diagonal entry (see `ops/sweep.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DIAGONAL, TEACHER_DIAGONAL = 0, 1
RETENTION, STUDENT, TEACHER = slice(2, 4), slice(4, 6), slice(6, 8)


def log_odds(maximum: Tensor, total: Tensor, diagonal: Tensor) -> Tensor:
    """r, from the largest off-diagonal entry and the sum of exp(entry - maximum). The large numbers meet first."""
    return (maximum - diagonal) + total.log()


def losses(
    state: Tensor, mean_gap: Tensor | None, shift: Tensor | None, want_retention: bool, want_consistency: bool
) -> tuple[Tensor, Tensor]:
    """(retention, consistency).

    mean_gap: [2, N], the mean of S° - S - shift off the diagonal under each row's and column's teacher softmax.
    """
    retention = consistency = state.new_zeros(())
    if want_retention:
        retention = 0.5 * log1p_exp(state[RETENTION]).sum(0).mean()
    if want_consistency:
        assert mean_gap is not None and shift is not None
        gaps = mean_gap - ((state[TEACHER_DIAGONAL] - state[DIAGONAL]) - shift)  # [2, N]
        divergence = rest(state[TEACHER]) * gaps - log1p_exp(state[TEACHER]) + log1p_exp(state[STUDENT])  # [2, N]
        consistency = divergence.sum(0).mean()
    return retention, consistency


class Softmax(NamedTuple):
    """A weight times (row softmax + column softmax) of a matrix, as what rebuilds it from the entries.

    w P_ij = exp(S_ij - anchor_i) * factor_i. The anchor is about the larger of d_i and the log-sum-exp of the
    rest, so that nothing overflows; its rounding is undone by the factor, w exp(anchor_i - d_i) / (1 + exp(r_i)).
    """

    anchor: Tensor  # [2, N], of rows and of columns
    factor: Tensor  # [2, N]


class Terms(NamedTuple):
    """dS: the softmaxes off the diagonal, None where not there, and the diagonal's own entries."""

    student: Softmax | None
    masked: Softmax | None  # of S without the pairs of equal group id
    teacher: Softmax | None
    diagonal: Tensor  # [N]


def gradient_terms(
    state: Tensor,
    weight_retention: Tensor,
    weight_consistency: Tensor,
    has_groups: bool,
    want_retention: bool,
    want_consistency: bool,
) -> Terms:
    """dS in its parts. weight_retention: of each row's and column's retention; weight_consistency: of each KL."""
    student = masked = teacher = None
    diagonal = state.new_zeros(state.shape[1])
    if want_retention:
        diagonal -= weight_retention * rest(state[RETENTION]).sum(0)
        if has_groups:
            masked = _softmax(state[DIAGONAL], state[RETENTION], weight_retention)
        else:
            both = weight_retention + weight_consistency if want_consistency else weight_retention
            student = _softmax(state[DIAGONAL], state[STUDENT], both)
    if want_consistency:
        if student is None:
            student = _softmax(state[DIAGONAL], state[STUDENT], weight_consistency)
        teacher = _softmax(state[TEACHER_DIAGONAL], state[TEACHER], -weight_consistency)
        diagonal += weight_consistency * (rest(state[TEACHER]) - rest(state[STUDENT])).sum(0)
    return Terms(student, masked, teacher, diagonal)


def unit_terms(
    state: Tensor,
    weight_retention: Tensor,
    weight_consistency: Tensor,
    has_groups: bool,
    want_retention: bool,
    want_consistency: bool,
    lift: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmaxes [terms, 4, N], diagonal [N], unit []): dS / unit, for a backend that rounds it to a half precision.

    The unit is about the largest entry of dS, the larger weight times the largest 1 - P_ii, so that dS keeps its digits
    whatever the incoming gradients and however far the pairs have converged. No entry is more than 4 lifts: float16 is
    lifted to its upper range. A softmax is four planes: row anchors, column anchors, row factors, column factors.
    """
    weights, used = [], []
    if want_retention:
        weights, used = [weight_retention], [RETENTION]
    if want_consistency:
        weights, used = [*weights, weight_consistency], [*used, STUDENT, TEACHER]
    largest = torch.stack(weights).abs().amax() * rest(torch.cat([state[rows] for rows in used])).amax()
    largest = largest.clamp_min(1e-30)  # its inverse must be a number
    to_units = lift / largest
    terms = gradient_terms(
        state, weight_retention * to_units, weight_consistency * to_units, has_groups, want_retention, want_consistency
    )
    softmaxes = [softmax for softmax in terms[:3] if softmax is not None]
    stacked = torch.stack([torch.cat(tuple(softmax)) for softmax in softmaxes])  # [terms, 4, N]
    return stacked, terms.diagonal, largest / lift


def _softmax(diagonal: Tensor, r: Tensor, weight: Tensor) -> Softmax:
    anchor = diagonal + r.clamp_min(0)  # [2, N]
    return Softmax(anchor, weight * ((anchor - diagonal) - log1p_exp(r)).exp())


def log1p_exp(r: Tensor) -> Tensor:
    return torch.logaddexp(r, torch.zeros_like(r))


def rest(r: Tensor) -> Tensor:
    """1 - P_ii = sigmoid(r_i), without overflow at r_i << 0."""
    return (r - log1p_exp(r)).exp()
