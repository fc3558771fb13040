"""From the sums of a sweep to its losses, and from the incoming gradients to the terms of dS: O(N), for any backend.

The state [9, n] of rows, and likewise that of columns, is what a backward pass needs of the forward one:

    0, 1, 2  r for the retention, without the pairs left out by group_ids; r of S; r of S°
    3, 4, 5  the anchors of the three softmaxes
    6, 7, 8  their factors

with r the log-odds of the rest of a row or column against its own pair's entry (see `ops/spec.py`), and a softmax
rebuilt as P_ij = exp(S_ij - anchor_i) factor_i. The anchor is about the log-sum-exp, so that nothing overflows. The
factor is made from the anchor as it was rounded, not from r: of large logits r is so coarse that the softmax would not
add up to 1. What belongs to S° is 0 without a teacher.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.spec import SavedStats, SimilarityInputs, Stats

RETENTION, STUDENT, TEACHER = range(3)
_SOFTMAXES = 3
PLANES = 3 * _SOFTMAXES


def log_odds(maximum: Tensor, total: Tensor, diagonal: Tensor) -> Tensor:
    """r, from the largest off-diagonal entry and the sum of exp(entry - maximum). The large numbers meet first."""
    return (maximum - diagonal) + total.log()


def anchored(maximum: Tensor, total: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r, anchor, factor) of a softmax, from the arguments of `log_odds`."""
    anchor = torch.maximum(diagonal, maximum + total.log())
    factor = (total * (maximum - anchor).exp() + (diagonal - anchor).exp()).reciprocal()
    return log_odds(maximum, total, diagonal), anchor, factor


def nothing(problem: SimilarityInputs, count: int) -> Tensor:
    """Planes [planes, count] of rows or columns that have not met anything yet."""
    planes = problem.image.new_zeros(problem.planes, count, dtype=problem.compute_dtype())
    planes[_maxima(problem)] = torch.finfo(planes.dtype).min
    return planes


def merge(problem: SimilarityInputs, parts: Tensor, shifts: Tensor | None, shift: Tensor | None) -> Tensor:
    """Planes [planes, n] of what parts [k, planes, n] have met together, always in the order of the parts.

    shifts: of the parts, [k, 1] or [k, n]; shift: [], of the result, whose gaps are in its terms.
    """
    merged = torch.empty_like(parts[0])
    for first in _maxima(problem):
        maximum = parts[:, first].amax(0)  # [n]
        shrink = (parts[:, first] - maximum).exp()  # [k, n]
        merged[first], merged[first + 1] = maximum, (parts[:, first + 1] * shrink).sum(0)
    if problem.want_consistency:
        assert shifts is not None and shift is not None
        # the teacher's planes are the last, so `shrink` is theirs
        merged[-1] = ((parts[:, -1] + (shifts - shift) * parts[:, -2]) * shrink).sum(0)
    return merged


def _maxima(problem: SimilarityInputs) -> list[int]:
    """Which planes are maxima."""
    return list(range(0, problem.planes - 1, 2)) if problem.planes % 2 else list(range(0, problem.planes, 2))


def state(
    problem: SimilarityInputs, planes: Tensor, diagonal: Tensor, teacher_diagonal: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(state [9, n], gap [n]) of rows or of columns, from their planes of `Stats` and their own pairs' entries.

    The gap is the mean of S° - S off the diagonal, under the teacher's softmax, minus S° - S on it; None without a
    teacher.
    """
    found = diagonal.new_zeros(PLANES, len(diagonal))

    def put(plane: int, maximum: Tensor, total: Tensor, own: Tensor) -> None:
        found[plane::_SOFTMAXES] = torch.stack(anchored(maximum, total, own))

    if problem.plain:
        put(STUDENT, planes[0], planes[1], diagonal)
        found[RETENTION::_SOFTMAXES] = found[STUDENT::_SOFTMAXES]
    if problem.masked:
        first = 2 * problem.plain
        put(RETENTION, planes[first], planes[first + 1], diagonal)
    if not problem.want_consistency:
        return found, None
    assert teacher_diagonal is not None and shift is not None
    maximum, total, gap = planes[-3:]
    put(TEACHER, maximum, total, teacher_diagonal)
    return found, gap / total - ((teacher_diagonal - diagonal) - shift)


def totals(problem: SimilarityInputs, state: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """(retention, consistency), summed over rows and columns; neither halved nor averaged.

    state, gap: of any rows and columns side by side, as `state` gives them.
    """
    retention = consistency = state.new_zeros(())
    log1p = log1p_exp(state[:_SOFTMAXES])  # [3, n]
    if problem.want_retention:
        retention = log1p[RETENTION].sum()
    if problem.want_consistency:
        assert gap is not None
        consistency = (rest(state[TEACHER]) * gap - log1p[TEACHER] + log1p[STUDENT]).sum()
    return retention, consistency


class _Sums(Protocol):
    def forward(self, problem: SimilarityInputs, strip_rows: int, cache_size: int) -> tuple[Stats, Tensor]: ...


def losses_of_sums(
    engine: _Sums, problem: SimilarityInputs, strip_rows: int, cache_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.autograd.SweepKernels.losses` of an engine, by its `forward`."""
    sums, kept = engine.forward(problem, strip_rows, cache_size)
    assert sums.diagonal is not None
    planes = torch.cat((sums.rows, sums.columns), 1)
    diagonal, teacher_diagonal = sums.diagonal.repeat(2), sums.teacher_diagonal
    if teacher_diagonal is not None:
        teacher_diagonal = teacher_diagonal.repeat(2)
    found, gap = state(problem, planes, diagonal, teacher_diagonal, sums.shift)
    retention, consistency = totals(problem, found, gap)
    return 0.5 * retention / problem.n, consistency / problem.n, found, kept


def weights(grad_retention: Tensor, grad_consistency: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each row's and column's retention and of each one's KL, in a batch of n pairs, for the incoming gradients."""
    return 0.5 * grad_retention / n, grad_consistency / n


class Softmax(NamedTuple):
    """A weight times (row softmax + column softmax) of a matrix, as what rebuilds it from the entries.

    w P_ij = exp(S_ij - anchor_i) * factor_i, see the head of this file.
    """

    rows: tuple[Tensor, Tensor]  # anchor and factor, [n] each
    columns: tuple[Tensor, Tensor]  # [m] each


class Terms(NamedTuple):
    """dS: the softmaxes off the diagonal, None where not there, and the diagonal's own entries."""

    student: Softmax | None
    masked: Softmax | None  # of S without the pairs of equal group id
    teacher: Softmax | None
    diagonal: Tensor  # [n], at the rows' own columns; 0 unless problem.paired


def gradient_terms(
    problem: SimilarityInputs, state: SavedStats, weight_retention: Tensor, weight_consistency: Tensor
) -> Terms:
    """dS in its parts. weight_retention: of each row's and column's retention; weight_consistency: of each KL."""
    r, anchors, factors = state.both.split(_SOFTMAXES)  # [3, n + m]

    def softmax(plane: int, weight: Tensor) -> Softmax:
        anchor, factor = anchors[plane], weight * factors[plane]
        n = state.n
        return Softmax((anchor[:n], factor[:n]), (anchor[n:], factor[n:]))

    student = masked = teacher = None
    if problem.want_retention:
        if problem.masked:
            masked = softmax(RETENTION, weight_retention)
        else:
            both = weight_retention + weight_consistency if problem.want_consistency else weight_retention
            student = softmax(STUDENT, both)
    if problem.want_consistency:
        if student is None:
            student = softmax(STUDENT, weight_consistency)
        teacher = softmax(TEACHER, -weight_consistency)

    diagonal = state.both.new_zeros(problem.n)
    if problem.paired:
        rests = rest(r)
        own = state.n + problem.offset  # where the rows' own columns begin
        retention, student_rest, teacher_rest = rests[:, : problem.n] + rests[:, own : own + problem.n]
        if problem.want_retention:
            diagonal = diagonal - weight_retention * retention
        if problem.want_consistency:
            diagonal = diagonal + weight_consistency * (teacher_rest - student_rest)
    return Terms(student, masked, teacher, diagonal)


def unit_terms(
    problem: SimilarityInputs,
    state: SavedStats,
    weight_retention: Tensor,
    weight_consistency: Tensor,
    lift: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmaxes [terms, 2 n + 2 m], diagonal [n], unit []): dS / unit, for a backend that rounds it to half precision.

    The unit is about the largest entry of dS, the larger weight times the largest 1 - P_ii, so that dS keeps its digits
    whatever the incoming gradients and however far the pairs have converged. No entry is more than 4 lifts: float16 is
    lifted to its upper range. A softmax is its row anchors, row factors, column anchors and column factors.
    """
    used_weights = [weight_retention] * problem.want_retention + [weight_consistency] * problem.want_consistency
    first, last = RETENTION if problem.want_retention else STUDENT, TEACHER if problem.want_consistency else RETENTION
    largest_rest = rest(state.both[first : last + 1]).amax()
    largest = torch.stack(used_weights).abs().amax() * largest_rest
    largest = largest.clamp_min(1e-30)  # its inverse must be a number
    to_units = lift / largest
    terms = gradient_terms(problem, state, weight_retention * to_units, weight_consistency * to_units)
    softmaxes = [softmax for softmax in terms[:3] if softmax is not None]
    stacked = torch.stack([torch.cat((*softmax.rows, *softmax.columns)) for softmax in softmaxes])
    return stacked, terms.diagonal, largest / lift


def log1p_exp(r: Tensor) -> Tensor:
    return F.softplus(
        r, threshold=40.0
    )  # beyond, 1 is less than half a unit in the last place of exp(r), in float64 too


def rest(r: Tensor) -> Tensor:
    """1 - P_ii."""
    return torch.sigmoid(r)
