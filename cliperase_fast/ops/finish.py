"""From the sums of a sweep to its losses, and from the incoming gradients to the terms of dS: O(N), for any backend.

The state [5, n] of rows, and likewise that of columns, is what a backward pass needs of the forward one:

    0  d, the entry of S of the row's own pair
    1  d°, that of S° (0 without a teacher)
    2  r for the retention, without the pairs left out by group_ids
    3  r of S
    4  r of S° (0 without a teacher)

with r the log-odds of the rest of a row or column against its own pair's entry (see `ops/sweep.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.problem import Problem, State

DIAGONAL, TEACHER_DIAGONAL, RETENTION, STUDENT, TEACHER = range(5)


def log_odds(maximum: Tensor, total: Tensor, diagonal: Tensor) -> Tensor:
    """r, from the largest off-diagonal entry and the sum of exp(entry - maximum). The large numbers meet first."""
    return (maximum - diagonal) + total.log()


def nothing(problem: Problem, count: int) -> Tensor:
    """Planes [planes, count] of rows or columns that have not met anything yet."""
    planes = problem.image.new_zeros(problem.planes, count, dtype=problem.compute_dtype())
    planes[_maxima(problem)] = torch.finfo(planes.dtype).min
    return planes


def merge(problem: Problem, parts: Tensor, shifts: Tensor | None, shift: Tensor | None) -> Tensor:
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


def _maxima(problem: Problem) -> list[int]:
    """Which planes are maxima."""
    return list(range(0, problem.planes - 1, 2)) if problem.planes % 2 else list(range(0, problem.planes, 2))


def state(
    problem: Problem, planes: Tensor, diagonal: Tensor, teacher_diagonal: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(state [5, n], mean gap [n]) of rows or of columns, from their planes of `Sums` and their own pairs' entries.

    The gap is S° - S - shift; its mean is off the diagonal under the teacher's softmax, None without a teacher.
    """
    found = diagonal.new_zeros(5, len(diagonal))
    found[DIAGONAL] = diagonal
    if problem.plain:
        found[STUDENT] = found[RETENTION] = log_odds(planes[0], planes[1], diagonal)
    if problem.masked:
        first = 2 * problem.plain
        found[RETENTION] = log_odds(planes[first], planes[first + 1], diagonal)
    if not problem.want_consistency:
        return found, None
    assert teacher_diagonal is not None
    maximum, total, gap = planes[-3:]
    found[TEACHER_DIAGONAL] = teacher_diagonal
    found[TEACHER] = log_odds(maximum, total, teacher_diagonal)
    return found, gap / total


def totals(
    problem: Problem,
    rows: Tensor,
    columns: Tensor,
    row_gap: Tensor | None,
    column_gap: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(retention, consistency), summed over some pairs and over row and column of each; neither halved nor averaged.

    rows, columns: the states [5, n] of these pairs' rows and columns, and their mean gaps, as `state` gives them.
    """
    retention = consistency = rows.new_zeros(())
    if problem.want_retention:
        retention = (log1p_exp(rows[RETENTION]) + log1p_exp(columns[RETENTION])).sum()
    if problem.want_consistency:
        assert row_gap is not None and column_gap is not None and shift is not None
        consistency = (_divergence(rows, row_gap, shift) + _divergence(columns, column_gap, shift)).sum()
    return retention, consistency


def _divergence(state: Tensor, mean_gap: Tensor, shift: Tensor) -> Tensor:
    gap = mean_gap - ((state[TEACHER_DIAGONAL] - state[DIAGONAL]) - shift)  # [n]
    return rest(state[TEACHER]) * gap - log1p_exp(state[TEACHER]) + log1p_exp(state[STUDENT])


def weights(grad_retention: Tensor, grad_consistency: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each row's and column's retention and of each one's KL, in a batch of n pairs, for the incoming gradients."""
    return 0.5 * grad_retention / n, grad_consistency / n


class Softmax(NamedTuple):
    """A weight times (row softmax + column softmax) of a matrix, as what rebuilds it from the entries.

    w P_ij = exp(S_ij - anchor_i) * factor_i. The anchor is about the larger of d_i and the log-sum-exp of the
    rest, so that nothing overflows; its rounding is undone by the factor, w exp(anchor_i - d_i) / (1 + exp(r_i)).
    """

    rows: tuple[Tensor, Tensor]  # anchor and factor, [n] each
    columns: tuple[Tensor, Tensor]  # [m] each


class Terms(NamedTuple):
    """dS: the softmaxes off the diagonal, None where not there, and the diagonal's own entries."""

    student: Softmax | None
    masked: Softmax | None  # of S without the pairs of equal group id
    teacher: Softmax | None
    diagonal: Tensor  # [n], at the rows' own columns; 0 unless problem.paired


def gradient_terms(problem: Problem, state: State, weight_retention: Tensor, weight_consistency: Tensor) -> Terms:
    """dS in its parts. weight_retention: of each row's and column's retention; weight_consistency: of each KL."""
    student = masked = teacher = None
    if problem.want_retention:
        if problem.masked:
            masked = _softmax(state, RETENTION, DIAGONAL, weight_retention)
        else:
            both = weight_retention + weight_consistency if problem.want_consistency else weight_retention
            student = _softmax(state, STUDENT, DIAGONAL, both)
    if problem.want_consistency:
        if student is None:
            student = _softmax(state, STUDENT, DIAGONAL, weight_consistency)
        teacher = _softmax(state, TEACHER, TEACHER_DIAGONAL, -weight_consistency)
    return Terms(student, masked, teacher, _diagonal(problem, state, weight_retention, weight_consistency))


def _diagonal(problem: Problem, state: State, weight_retention: Tensor, weight_consistency: Tensor) -> Tensor:
    diagonal = state.rows.new_zeros(problem.n)
    if problem.paired:
        columns = state.columns[:, problem.offset : problem.offset + problem.n]
        if problem.want_retention:
            diagonal -= weight_retention * (rest(state.rows[RETENTION]) + rest(columns[RETENTION]))
        if problem.want_consistency:
            of_rows = rest(state.rows[TEACHER]) - rest(state.rows[STUDENT])
            of_columns = rest(columns[TEACHER]) - rest(columns[STUDENT])
            diagonal += weight_consistency * (of_rows + of_columns)
    return diagonal


def unit_terms(
    problem: Problem, state: State, weight_retention: Tensor, weight_consistency: Tensor, lift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmaxes [terms, 2 n + 2 m], diagonal [n], unit []): dS / unit, for a backend that rounds it to half precision.

    The unit is about the largest entry of dS, the larger weight times the largest 1 - P_ii, so that dS keeps its digits
    whatever the incoming gradients and however far the pairs have converged. No entry is more than 4 lifts: float16 is
    lifted to its upper range. A softmax is its row anchors, row factors, column anchors and column factors.
    """
    used_weights, used = [], []
    if problem.want_retention:
        used_weights, used = [weight_retention], [RETENTION]
    if problem.want_consistency:
        used_weights, used = [*used_weights, weight_consistency], [*used, STUDENT, TEACHER]
    largest_rest = torch.stack([rest(side[plane]).amax() for side in state for plane in used]).amax()
    largest = torch.stack(used_weights).abs().amax() * largest_rest
    largest = largest.clamp_min(1e-30)  # its inverse must be a number
    to_units = lift / largest
    terms = gradient_terms(problem, state, weight_retention * to_units, weight_consistency * to_units)
    softmaxes = [softmax for softmax in terms[:3] if softmax is not None]
    stacked = torch.stack([torch.cat((*softmax.rows, *softmax.columns)) for softmax in softmaxes])
    return stacked, terms.diagonal, largest / lift


def _softmax(state: State, of: int, own: int, weight: Tensor) -> Softmax:
    rows, columns = (_anchor_and_factor(side[own], side[of], weight) for side in state)
    return Softmax(rows, columns)


def _anchor_and_factor(diagonal: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    anchor = diagonal + r.clamp_min(0)
    return anchor, weight * ((anchor - diagonal) - log1p_exp(r)).exp()


def log1p_exp(r: Tensor) -> Tensor:
    return F.softplus(r, threshold=40.0)  # beyond, 1 is less than half a unit in the last place of exp(r), in float64 too


def rest(r: Tensor) -> Tensor:
    """1 - P_ii."""
    return torch.sigmoid(r)
