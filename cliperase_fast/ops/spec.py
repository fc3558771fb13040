"""The contract of a backend: its inputs, what a forward pass leaves, and the numeric rules that all backends keep.

A sweep goes once over the similarities of a batch and returns the two losses that need them. Everything else (weights,
the forget term, the other consistency terms) is built on it in `functional.py`, the same for all backends.

Rules, with d_i = S_ii the diagonal and r_i = log Σ_{j≠i} exp(S_ij - d_i), the log-odds of all other pairs:

- `1 - P_ii` is never formed by subtraction: for nearly perfect pairs at a high scale it cancels. It is sigmoid(r_i).
- retention of a row: -log softmax(S_i)_i = log(1 + exp(r_i)).
- consistency of a row: KL(P°_i || P_i) =
  Σ_{j≠i} P°_ij [(S°_ij - d°_i) - (S_ij - d_i)] - log(1 + exp(r°_i)) + log(1 + exp(r_i)).
- gradient with respect to the diagonal: retention -sigmoid(r_i), consistency sigmoid(r°_i) - sigmoid(r_i).
- maxima are those of the data (running maxima where the data come in pieces), never a constant offset.

The same holds for the columns. float16 and bfloat16 features are computed in float32 (a GPU backend may round dL/dS to
their dtype before its last products).

Rows are the pairs at hand, columns are all the pairs that they are compared with. On one device both are the whole
batch. A process that holds a part of a batch has its own rows, and the columns of every process or of one of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The dtypes of features, as torch, C++ (csrc/buffer.cpp) and error messages name them.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype in which these features are computed: the widest of theirs, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their inputs, whatever autocast is active around it."""
    device_type = tensor.device.type
    # The context costs a small batch a noticeable share of its time, and device "meta" has no autocast.
    if tensor.is_meta or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def savable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return each tensor, or an equal one that autograd can save and that lies in memory as it reads."""
    # torch.compile traces neither question, and its graphs resolve negated views themselves.
    if torch.compiler.is_compiling():
        return tensors
    copies = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    found = []
    for tensor in tensors:
        if tensor is not None and tensor.is_neg():
            tensor = tensor.resolve_neg()
        found.append(tensor.clone() if tensor is not None and copies and tensor.is_inference() else tensor)
    return tuple(found)


@dataclass(eq=False)
class SimilarityInputs:
    """The arguments of a loss over similarities. Do not modify it; derive a variant with `dataclasses.replace`.

    Features are [rows, width], of any strides and of mixed floating dtypes, on one device; image and text may be one
    tensor. Scales and bias are 0-d, float32 or float64. Losses are differentiable in image, text, scale and bias.
    """

    image: Tensor  # [n, D]
    text: Tensor  # [m, D]
    scale: Tensor  # []
    teacher_image: Tensor | None = None  # [n, D°]; the consistency is wanted where there is a teacher
    teacher_text: Tensor | None = None  # [m, D°]
    teacher_scale: Tensor | None = None  # []
    group_ids: Tensor | None = None  # int64 [n]; other pairs of equal id leave the retention. Dropped without it
    want_retention: bool = True
    strip_rows: int = 0  # rows formed at a time; 0: the backend chooses
    # What is kept for the backward pass: "similarities", "compact" (in 16 bits each where the backend has that form),
    # "nothing", "auto" (the backend chooses).
    keep: str = "auto"
    column_group_ids: Tensor | None = None  # int64 [m]; None: group_ids are those of the columns too
    pair_offset: int = 0  # row i and column i + pair_offset are a pair; m: no column here belongs to a row
    bias: Tensor | None = None  # [], of the sigmoid loss

    n: int = field(init=False)  # rows
    m: int = field(init=False)  # columns
    want_consistency: bool = field(init=False)
    masked: bool = field(init=False)  # statistics without the pairs of equal group id are wanted
    plain: bool = field(init=False)  # statistics over all pairs are wanted
    paired: bool = field(init=False)  # the columns hold the rows' own pairs: all of them or none
    num_stats: int = field(init=False)  # numbers found for each row and column, see `Stats`

    def __post_init__(self) -> None:
        if not self.want_retention:
            self.group_ids = self.column_group_ids = None
        self.n, self.m = self.image.shape[0], self.text.shape[0]
        self.want_consistency = self.teacher_image is not None
        self.masked = self.group_ids is not None
        self.plain = self.want_consistency or not self.masked
        self.paired = self.pair_offset < self.m
        self.num_stats = 2 * (self.plain + self.masked) + 3 * self.want_consistency

    @property
    def teacher(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """(image, text, scale) of the teacher."""
        if self.teacher_image is None or self.teacher_text is None or self.teacher_scale is None:
            return None
        return self.teacher_image, self.teacher_text, self.teacher_scale

    @property
    def column_groups(self) -> Tensor | None:
        """The group ids of the columns, int64 [m]."""
        return self.group_ids if self.column_group_ids is None else self.column_group_ids

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the losses are computed."""
        return compute_dtype(self.image, self.text, self.teacher_image, self.teacher_text)


class Stats(NamedTuple):
    """What a forward sweep finds, in the computing dtype and natural units.

    The statistics, as far as wanted and in this order: maximum of S and total of exp(S - maximum) where inputs.plain;
    the same without the pairs of equal group id where inputs.masked; of S° maximum, total and gap, the sum of
    exp(S° - maximum) (S° - S - shift), where inputs.want_consistency. All leave a pair's own entry out.
    """

    rows: Tensor  # [num_stats, n]
    columns: Tensor  # [num_stats, m]
    diagonal: Tensor | None  # [n], each row's own entry of S; None unless inputs.paired
    teacher_diagonal: Tensor | None  # [n], of S°; None without a teacher too
    shift: Tensor | None  # [], any constant near S° - S


RETENTION, STUDENT, TEACHER = range(3)
_SOFTMAXES = 3
NUM_SAVED = 3 * _SOFTMAXES


class SavedStats(NamedTuple):
    """What a backward sweep needs of the forward one.

    The rows of `both`, for the rows and likewise for the columns of the similarities:

        0, 1, 2  r for the retention, without the pairs left out by group_ids; r of S; r of S°
        3, 4, 5  the anchors of the three softmaxes
        6, 7, 8  their factors

    with r the log-odds of all other pairs (see the head of this file), and a softmax rebuilt as
    P_ij = exp(S_ij - anchor_i) factor_i. The anchor is about the log-sum-exp, so that nothing overflows. The factor is
    made from the anchor as it was rounded, not from r: of large logits r is so coarse that the softmax would not add up
    to 1. What belongs to S° is 0 without a teacher.
    """

    both: Tensor  # [NUM_SAVED, n + m]
    n: int
    cache: Tensor  # uint8, the similarities that were kept, possibly none

    @property
    def rows(self) -> Tensor:
        """[NUM_SAVED, n]."""
        return self.both[:, : self.n]

    @property
    def columns(self) -> Tensor:
        """[NUM_SAVED, m]."""
        return self.both[:, self.n :]


class Weights(NamedTuple):
    """The factors of each row's and column's losses in the gradient, both []."""

    retention: Tensor
    consistency: Tensor


class Need(NamedTuple):
    """Which gradients are wanted."""

    image: bool = True
    text: bool = True
    scale: bool = True  # for the sigmoid loss also that of the bias


class Sweep(Protocol):
    """One pass over the similarities of n = m >= 1 pairs.

    Returns (retention, consistency), 0-d in `inputs.dtype`; the one that is not wanted is 0. Results for different
    `keep` agree to rounding, except for "compact". The caller has checked the inputs.
    """

    def __call__(self, inputs: SimilarityInputs) -> tuple[Tensor, Tensor]: ...


class FeaturesKl(Protocol):
    """mean_i KL(softmax(teacher_i) || softmax(student_i)), softmax over the width; differentiable in the student only.

    student, teacher: [N, D], N >= 1. Returns a 0-d tensor in `compute_dtype` of the features.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor: ...


class SweepKernels(Protocol):
    """What a backend that never holds an N x N matrix brings; `ops.autograd.as_sweep` makes a `Sweep` of it."""

    name: str  # of its custom ops

    def cache_size(self, inputs: SimilarityInputs) -> int:
        """Return how many bytes of similarities the forward pass keeps for the backward pass, 0 for none."""
        ...

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        """Return the statistics, and what is kept, uint8 [cache_size] or fewer."""
        ...

    def losses(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (retention, consistency, `SavedStats.both`, `SavedStats.cache`) of a batch in one piece.

        It is `losses_from_stats`, unless the backend has something faster.
        """
        ...

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of image, text and scale, in their dtypes.

        A gradient that is not needed is an empty tensor (0-d for the scale). partial: the gradients are summands of
        larger sums, so they stay in the computing dtype.
        """
        ...


def log_odds(maximum: Tensor, total: Tensor, diagonal: Tensor) -> Tensor:
    """Return r, from the largest off-diagonal entry and the sum of exp(entry - maximum)."""
    return (maximum - diagonal) + total.log()  # the large numbers meet first


def anchored(maximum: Tensor, total: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (r, anchor, factor) of a softmax, from the arguments of `log_odds`."""
    anchor = torch.maximum(diagonal, maximum + total.log())
    factor = (total * (maximum - anchor).exp() + (diagonal - anchor).exp()).reciprocal()
    return log_odds(maximum, total, diagonal), anchor, factor


def log1p_exp(r: Tensor) -> Tensor:
    """Return log(1 + exp(r))."""
    # Beyond 40, 1 is less than half a unit in the last place of exp(r), in float64 too.
    return F.softplus(r, threshold=40.0)


def one_minus_p(r: Tensor) -> Tensor:
    """Return 1 - P_ii from the log-odds r_i."""
    return torch.sigmoid(r)


def _maxima(inputs: SimilarityInputs) -> list[int]:
    """Which rows of the statistics are maxima."""
    return list(range(0, inputs.num_stats - inputs.want_consistency, 2))


def empty_stats(inputs: SimilarityInputs, count: int) -> Tensor:
    """Return the statistics [num_stats, count] of rows or columns that have not met any others yet."""
    stats = inputs.image.new_zeros(inputs.num_stats, count, dtype=inputs.dtype)
    stats[_maxima(inputs)] = torch.finfo(stats.dtype).min
    return stats


def merge_stats(inputs: SimilarityInputs, parts: Tensor, shifts: Tensor | None, shift: Tensor | None) -> Tensor:
    """Merge the statistics of parts [k, num_stats, n] into [num_stats, n], always in the order of the parts.

    shifts: of the parts, [k, 1] or [k, n]; shift: [], of the result, whose gaps are in its terms.
    """
    merged = torch.empty_like(parts[0])
    for first in _maxima(inputs):
        maximum = parts[:, first].amax(0)  # [n]
        shrink = (parts[:, first] - maximum).exp()  # [k, n]
        merged[first], merged[first + 1] = maximum, (parts[:, first + 1] * shrink).sum(0)
    if inputs.want_consistency:
        assert shifts is not None and shift is not None
        # The teacher's statistics are the last, so `shrink` is theirs.
        merged[-1] = ((parts[:, -1] + (shifts - shift) * parts[:, -2]) * shrink).sum(0)
    return merged


def saved_stats(
    inputs: SimilarityInputs, stats: Tensor, diagonal: Tensor, teacher_diagonal: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return (saved [NUM_SAVED, n], gap [n]) of rows or of columns, from their statistics and own pairs' entries.

    The gap is the mean of S° - S off the diagonal, under the teacher's softmax, minus S° - S on it; None without a
    teacher.
    """
    saved = diagonal.new_zeros(NUM_SAVED, len(diagonal))

    def put(softmax: int, maximum: Tensor, total: Tensor, own: Tensor) -> None:
        saved[softmax::_SOFTMAXES] = torch.stack(anchored(maximum, total, own))

    if inputs.plain:
        put(STUDENT, stats[0], stats[1], diagonal)
        saved[RETENTION::_SOFTMAXES] = saved[STUDENT::_SOFTMAXES]
    if inputs.masked:
        first = 2 * inputs.plain
        put(RETENTION, stats[first], stats[first + 1], diagonal)
    if not inputs.want_consistency:
        return saved, None
    assert teacher_diagonal is not None and shift is not None
    maximum, total, gap = stats[-3:]
    put(TEACHER, maximum, total, teacher_diagonal)
    return saved, gap / total - ((teacher_diagonal - diagonal) - shift)


def loss_sums(inputs: SimilarityInputs, saved: Tensor, gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (retention, consistency), summed over rows and columns; neither halved nor averaged.

    saved, gap: of any rows and columns side by side, as `saved_stats` gives them.
    """
    retention = consistency = saved.new_zeros(())
    log1p = log1p_exp(saved[:_SOFTMAXES])  # [3, n]
    if inputs.want_retention:
        retention = log1p[RETENTION].sum()
    if inputs.want_consistency:
        assert gap is not None
        consistency = (one_minus_p(saved[TEACHER]) * gap - log1p[TEACHER] + log1p[STUDENT]).sum()
    return retention, consistency


class _Forward(Protocol):
    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]: ...


def losses_from_stats(
    kernels: _Forward, inputs: SimilarityInputs, cache_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `SweepKernels.losses` from `kernels.forward`."""
    stats, cache = kernels.forward(inputs, cache_size)
    assert stats.diagonal is not None
    both = torch.cat((stats.rows, stats.columns), 1)
    diagonal, teacher_diagonal = stats.diagonal.repeat(2), stats.teacher_diagonal
    if teacher_diagonal is not None:
        teacher_diagonal = teacher_diagonal.repeat(2)
    saved, gap = saved_stats(inputs, both, diagonal, teacher_diagonal, stats.shift)
    retention, consistency = loss_sums(inputs, saved, gap)
    return 0.5 * retention / inputs.n, consistency / inputs.n, saved, cache


def pair_weights(grad_retention: Tensor, grad_consistency: Tensor, n: int) -> Weights:
    """Return the weights of each row's and column's losses in a batch of n pairs, for the incoming gradients."""
    return Weights(0.5 * grad_retention / n, grad_consistency / n)


class Softmax(NamedTuple):
    """A weight times (row softmax + column softmax) of a matrix, as what rebuilds it from the entries.

    w P_ij = exp(S_ij - anchor_i) * factor_i, see `SavedStats`.
    """

    rows: tuple[Tensor, Tensor]  # anchor and factor, [n] each
    columns: tuple[Tensor, Tensor]  # [m] each


class GradientTerms(NamedTuple):
    """dS: the softmaxes off the diagonal, None where not there, and the diagonal's own entries."""

    student: Softmax | None
    masked: Softmax | None  # of S without the pairs of equal group id
    teacher: Softmax | None
    diagonal: Tensor  # [n], at the rows' own columns; 0 unless inputs.paired
    largest: Tensor | None = None  # [], what no entry off the diagonal exceeds; only of the calibrated loss


def gradient_terms(
    inputs: SimilarityInputs, saved: SavedStats, weights: Weights, separate: bool | None = None
) -> GradientTerms:
    """Return dS in its parts.

    separate: whether the retention has a softmax of its own, which is returned as `masked`; None: where there are
    groups.
    """
    r, anchors, factors = saved.both.split(_SOFTMAXES)  # [3, n + m]

    def softmax(which: int, weight: Tensor) -> Softmax:
        anchor, factor = anchors[which], weight * factors[which]
        n = saved.n
        return Softmax((anchor[:n], factor[:n]), (anchor[n:], factor[n:]))

    student = masked = teacher = None
    if inputs.want_retention:
        if inputs.masked if separate is None else separate:
            masked = softmax(RETENTION, weights.retention)
        else:
            both = weights.retention + weights.consistency if inputs.want_consistency else weights.retention
            student = softmax(STUDENT, both)
    if inputs.want_consistency:
        if student is None:
            student = softmax(STUDENT, weights.consistency)
        teacher = softmax(TEACHER, -weights.consistency)

    diagonal = saved.both.new_zeros(inputs.n)
    if inputs.paired:
        odds = one_minus_p(r)
        own = saved.n + inputs.pair_offset  # where the rows' own columns begin
        of_retention, of_student, of_teacher = odds[:, : inputs.n] + odds[:, own : own + inputs.n]
        if inputs.want_retention:
            diagonal = diagonal - weights.retention * of_retention
        if inputs.want_consistency:
            diagonal = diagonal + weights.consistency * (of_teacher - of_student)
    return GradientTerms(student, masked, teacher, diagonal)


def unit_terms(
    inputs: SimilarityInputs, saved: SavedStats, weights: Weights, loss_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (softmaxes [terms, 2 n + 2 m], diagonal [n], unit []) of dS / unit, for backends that round it.

    The unit is about the largest entry of dS, the larger weight times the largest 1 - P_ii, so that dS keeps its digits
    in half precision whatever the incoming gradients and however far the pairs have converged. No entry is more than
    4 loss_scale, which moves float16 to its upper range. A softmax is its row anchors, row factors, column anchors and
    column factors.
    """
    used_weights = [weights.retention] * inputs.want_retention + [weights.consistency] * inputs.want_consistency
    first, last = RETENTION if inputs.want_retention else STUDENT, TEACHER if inputs.want_consistency else RETENTION
    largest = torch.stack(used_weights).abs().amax() * one_minus_p(saved.both[first : last + 1]).amax()
    largest = largest.clamp_min(1e-30)  # its inverse must be a number
    to_units = loss_scale / largest
    terms = gradient_terms(inputs, saved, Weights(weights.retention * to_units, weights.consistency * to_units))
    softmaxes = [softmax for softmax in terms[:3] if softmax is not None]
    stacked = torch.stack([torch.cat((*softmax.rows, *softmax.columns)) for softmax in softmaxes])
    return stacked, terms.diagonal, largest / loss_scale
