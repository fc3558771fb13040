"""Sweep the calibrated loss with a backend's `CalibratedKernels`: over blocks, once in either direction.

The pairs are sorted by kind. Rows and columns are then two kinds, and the joint batch four blocks. Only blocks of
forget columns are edited. The statistics of a row over the retain columns give the retention, and merged with those
over the forget columns the consistency, so that the two softmaxes share their exponentials. A backend may do all of it
at once for a batch in one piece, as `native/cpu.py` does.

The anchor and forget terms act on C, not on S. With H their gradient with respect to C,

    dS' = dS + H / s        dI = s dS' T        dT = s dS'ᵀ I        ds = Σ_ij dS_ij S_ij / s
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cliperase_fast.ops.calibrated import CalibratedInputs, CalibratedKernels, Edit, Pull
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    GradientTerms,
    Need,
    SavedStats,
    SimilarityInputs,
    Softmax,
    Stats,
    Weights,
    empty_stats,
    gradient_terms,
    loss_sums,
    merge_stats,
    one_minus_p,
    saved_stats,
)

RETAIN, FORGET = KINDS = (0, 1)
_LEAST_SCALE = 1e-20  # a smaller one gives the same results, and C could not be found from S


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _LEAST_SCALE, _LEAST_SCALE, scale)


class SortedPairs:
    """The pairs at hand, each kind in one piece. Features are copies, unless the pairs come in that order."""

    def __init__(self, inputs: CalibratedInputs) -> None:
        self.mask = inputs.forget_mask
        forgotten = self.mask.nonzero()[:, 0]
        count, first = len(forgotten), int(forgotten[0]) if len(forgotten) else 0
        self.order: Tensor | None = None  # [P]
        in_one_piece = count == 0 or int(forgotten[-1]) - first + 1 == count
        if not in_one_piece or 0 < first < len(self) - count:
            self.order, first = torch.cat(((~self.mask).nonzero()[:, 0], forgotten)), len(self) - count
        self._forgotten = slice(first, first + count)
        self._retained = slice(count, len(self)) if first == 0 else slice(0, first)
        self.retained = len(self) - count
        self.dtype, self.strip_rows, self.keep = inputs.dtype, inputs.strip_rows, inputs.keep
        self.image, self.text, self.teacher_image, self.teacher_text = map(
            self._sorted, (inputs.image, inputs.text, inputs.teacher_image, inputs.teacher_text)
        )
        self.ids = None if inputs.group_ids is None else self._sorted(inputs.group_ids).contiguous()
        self.image_levels, self.text_levels = (
            self._sorted(levels).to(self.dtype) * 0.5 for levels in (inputs.background_image, inputs.background_text)
        )
        self._given = inputs

    @cached_property
    def scale(self) -> Tensor:
        return _not_zero(self._given.scale)

    @cached_property
    def teacher_scale(self) -> Tensor:
        return _not_zero(self._given.teacher_scale)

    def scale_numbers(self) -> tuple[float, float]:
        """Return scale and teacher_scale as numbers, which on a CPU takes less time than an operation on tensors."""
        scale, teacher_scale = self._given.scale.item(), self._given.teacher_scale.item()
        return (
            _LEAST_SCALE if abs(scale) < _LEAST_SCALE else scale,
            _LEAST_SCALE if abs(teacher_scale) < _LEAST_SCALE else teacher_scale,
        )

    def __len__(self) -> int:
        return len(self.mask)

    def _sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows.index_select(0, self.order)

    def rows(self, kind: int) -> slice:
        return self._retained if kind == RETAIN else self._forgotten

    def forgotten_ids(self) -> Tensor | None:
        return None if self.ids is None else self.ids[self._forgotten]

    def edited(self, forgotten_ids: Tensor | None, forgotten: int) -> Tensor:
        """Return the number of edited entries in own rows, int64 []; of the forget columns: ids and number."""
        if self.ids is None or forgotten_ids is None:
            return self.mask.new_tensor((len(self) - self.retained) * forgotten, dtype=torch.int64)
        found = forgotten_ids.sort().values
        return (torch.searchsorted(found, self.ids, right=True) - torch.searchsorted(found, self.ids)).sum()

    def unsorted(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradient of sorted rows in the order of the user's."""
        if self.order is None:
            return gradient.to(dtype)
        found = gradient.new_empty(gradient.shape, dtype=dtype)
        return found.index_copy_(0, self.order, gradient.to(dtype))

    def template(self, retention: bool = False, teacher: bool = True) -> SimilarityInputs:
        """Return inputs that describe the statistics of the student, of the retention and of the teacher."""
        ids = self.mask if retention else None  # any ids: the retention has statistics of its own
        if not teacher:
            return SimilarityInputs(self.image, self.text, self.scale, group_ids=ids)
        frozen = self.teacher_image, self.teacher_text, self.teacher_scale
        return SimilarityInputs(self.image, self.text, self.scale, *frozen, ids)

    def columns(self, kind: int) -> Columns:
        """Return all pairs of a kind as columns, for a batch in one piece."""
        rows = self.rows(kind)
        ids = None if self.ids is None else self.ids[rows]
        return Columns(kind, rows, self.text[rows], self.teacher_text[rows], ids, self.text_levels[rows], 0)


class Columns(NamedTuple):
    """Columns of one kind."""

    kind: int
    place: slice  # among all columns
    text: Tensor  # [m, D]
    teacher_text: Tensor  # [m, D°]
    ids: Tensor | None  # int64 [m]
    levels: Tensor  # [m]
    pair_offset: int  # own rows of this kind are pairs with the columns from here on; m: with none


class Block(NamedTuple):
    rows: slice
    columns: Columns
    inputs: SimilarityInputs
    edit: Edit | None


def blocks(pairs: SortedPairs, columns: Columns) -> Iterator[Block]:
    """Yield the blocks of own rows and these columns, without empty ones."""
    for kind in KINDS:
        rows, m = pairs.rows(kind), len(columns.text)
        if rows.start == rows.stop or m == 0:
            continue
        ids = None if pairs.ids is None else pairs.ids[rows]
        contrast = kind == columns.kind == RETAIN
        inputs = SimilarityInputs(
            pairs.image[rows], columns.text, pairs.scale, pairs.teacher_image[rows], columns.teacher_text,
            pairs.teacher_scale, ids if contrast else None, want_retention=contrast, strip_rows=pairs.strip_rows,
            keep=pairs.keep, column_group_ids=columns.ids if contrast else None,
            pair_offset=columns.pair_offset if kind == columns.kind else m,
        )  # fmt: skip
        edit = None
        if columns.kind == FORGET and ids is not None and columns.ids is not None:
            edit = Edit(ids, columns.ids, pairs.image_levels[rows], columns.levels)
        elif columns.kind == FORGET and kind == FORGET:
            one = pairs.mask.new_zeros(max(inputs.n, m), dtype=torch.int64)
            edit = Edit(one[: inputs.n], one[:m], pairs.image_levels[rows], columns.levels)
        yield Block(rows, columns, inputs, edit)


class Caches:
    """Hand out the parts of a workspace, to the blocks of either direction in the same order."""

    def __init__(self, kernels: CalibratedKernels, workspace: Tensor) -> None:
        self._kernels, self._workspace, self._used = kernels, workspace, 0

    def next(self, inputs: SimilarityInputs) -> Tensor:
        start = self._used
        self._used += self._kernels.cache_share(inputs, len(self._workspace) - start)
        return self._workspace[start : self._used]


@dataclass
class JointStats:
    """The statistics of own rows and of all columns, as far as own rows have met them; all of one shift."""

    pairs: SortedPairs
    count: int  # columns in total
    shift: Tensor | None = None
    _met: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        pairs = self.pairs
        self._joint, self._retention = pairs.template(), pairs.template(teacher=False)
        self.rows, self.columns = empty_stats(self._joint, len(pairs)), empty_stats(self._joint, self.count)
        self.retention_rows = empty_stats(self._retention, len(pairs))
        self.retention_columns = empty_stats(self._retention, self.count)
        self.own = self.rows.new_zeros(2, len(pairs))  # of own pairs: S and the edited S°
        self.sums = self.rows.new_zeros(2)  # of the forget and the anchor term

    def add(self, block: Block, stats: Stats, sums: Tensor) -> None:
        assert stats.shift is not None
        self.shift = stats.shift if self.shift is None else self.shift
        rows, place = block.rows, block.columns.place
        for name, into, where, found in (
            ("rows", self.rows, rows, stats.rows),
            ("columns", self.columns, place, stats.columns),
        ):
            joint = torch.cat((found[:2], found[-3:]))  # without the retention's, if it has its own
            joint[-1] += (stats.shift - self.shift) * joint[-2]
            self._merge(name, self._joint, into, where, joint)
        if block.inputs.want_retention:  # the student's are the retention's if there are no groups
            self._merge("retention rows", self._retention, self.retention_rows, rows, stats.rows[-5:-3])
            self._merge("retention columns", self._retention, self.retention_columns, place, stats.columns[-5:-3])
        self.sums += sums
        if stats.diagonal is not None and stats.teacher_diagonal is not None:
            self.own[0, rows], self.own[1, rows] = stats.diagonal, stats.teacher_diagonal

    def _merge(self, name: str, like: SimilarityInputs, into: Tensor, place: slice, found: Tensor) -> None:
        if (name, place.start) in self._met:
            zero = found.new_zeros(())
            found = merge_stats(like, torch.stack((into[:, place], found)), zero, zero)
        self._met.add((name, place.start))
        into[:, place] = found


def sweep_forward(
    kernels: CalibratedKernels, pairs: SortedPairs, columns: Iterable[Columns], count: int, workspace: Tensor
) -> JointStats:
    """Let own rows meet all columns, `count` of them."""
    stats, caches = JointStats(pairs, count), Caches(kernels, workspace)
    for some in columns:
        for block in blocks(pairs, some):
            cache = caches.next(block.inputs)
            stats.add(block, *kernels.calibrated_forward(block.inputs, block.edit, cache))
    return stats


def finish(pairs: SortedPairs, stats: JointStats, of_columns: Tensor, retention: Tensor) -> tuple[Tensor, Tensor]:
    """Return (saved stats [NUM_SAVED, 2 P] of own rows and own columns, the sums [4] of the terms).

    of_columns [5, P], retention [2, P]: the statistics of own pairs' columns, complete, with the shift of `stats`. The
    sums are of retention, forget, consistency and anchor, over own rows and columns, and over the entries of own rows.
    """
    template = pairs.template(retention=True)
    rows, columns = (
        torch.cat((joint[:2], alone, joint[2:]))
        for joint, alone in ((stats.rows, stats.retention_rows), (of_columns, retention))
    )
    own, teacher_own = stats.own.repeat(1, 2)
    saved, gap = saved_stats(template, torch.cat((rows, columns), 1), own, teacher_own, stats.shift)
    retained, consistent = loss_sums(template, saved, gap)
    difference = _own_difference(pairs, stats.own)
    forget = stats.sums[0] + difference[pairs.rows(FORGET)].clamp(min=0).square().sum()
    anchor = stats.sums[1] + difference[pairs.rows(RETAIN)].square().sum()
    return saved, torch.stack((retained, forget, consistent, anchor))


def _own_difference(pairs: SortedPairs, own: Tensor) -> Tensor:
    """Return C - C* of own pairs, [P], from S and the edited S° [2, P]."""
    student, teacher = own
    return student / pairs.scale.to(own.dtype) - teacher / pairs.teacher_scale.to(own.dtype)


def term_factors(pairs: int, retained: int, edited: Tensor, like: Tensor) -> Tensor:
    """Return what makes means of the sums of the terms, [4]; 0 for an empty set.

    pairs, retained, edited: the numbers in the whole batch, of all pairs, of retain pairs and of edited entries.
    """
    counts = torch.stack((edited, pairs * pairs - edited)).to(like.dtype)
    forget, anchor = torch.where(counts > 0, counts.reciprocal(), 0)
    return torch.stack((like.new_tensor(0.5 / max(1, retained)), forget, like.new_tensor(1 / pairs), anchor))


class Gradients(NamedTuple):
    """Of the terms' sums: the weights of the softmaxes, and the pull on C."""

    weights: Weights
    pull: Pull
    own_pull: Tensor  # [P], on own pairs


def incoming(pairs: SortedPairs, own: Tensor, weights: Tensor) -> Gradients:
    """Return what the gradients of the terms times their factors [4] mean for S; own: S and S° of own pairs [2, P]."""
    retention, forget, consistency, anchor = weights
    to_s = 2 / pairs.scale.to(own.dtype)
    pull = Pull(to_s * forget, to_s * anchor)
    difference = _own_difference(pairs, own)
    own_pull = difference * pull.anchor
    own_pull[pairs.rows(FORGET)] = difference[pairs.rows(FORGET)].clamp(min=0) * pull.forget
    return Gradients(Weights(retention, consistency), pull, own_pull)


def sweep_backward(
    kernels: CalibratedKernels,
    pairs: SortedPairs,
    some: Columns,
    saved: tuple[Tensor, Tensor, Tensor],
    gradients: Gradients,
    caches: Caches,
    grad_image: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """Return (the gradient of these columns' text, Σ dS_ij S_ij), and add to that of own images, [P, D] if needed.

    saved: of own rows [NUM_SAVED, P], of all columns, and S and S° of own pairs [2, P].
    """
    of_rows, of_columns, own = saved
    grad_text: Tensor | None = None
    grad_scale = of_rows.new_zeros(())
    for block in blocks(pairs, some):
        inputs, rows = block.inputs, block.rows
        both = torch.cat((of_rows[:, rows], of_columns[:, some.place]), 1)
        terms = _terms(inputs, SavedStats(both, inputs.n, both), gradients.weights)
        if inputs.paired:
            grad_scale += (terms.diagonal * own[0, rows]).sum()
            terms = terms._replace(diagonal=terms.diagonal + gradients.own_pull[rows])
        cache = caches.next(inputs)
        image, text, scale = kernels.calibrated_backward(inputs, block.edit, terms, gradients.pull, cache, need)
        grad_scale += scale
        if need.image:
            grad_image[rows] += image
        grad_text = text if grad_text is None or not need.text else grad_text.add_(text)
    if grad_text is None:  # without pairs here
        grad_text = of_rows.new_zeros(some.text.shape if need.text else (0,))
    return grad_text, grad_scale


def _terms(inputs: SimilarityInputs, saved: SavedStats, weights: Weights) -> GradientTerms:
    """Return dS of a block. Without groups one softmax serves retention and consistency."""
    terms = gradient_terms(inputs, saved, weights, separate=inputs.want_retention)
    # An entry of a softmax of rows or of columns is at most its weight times 1 - P.
    used = torch.stack((weights.retention * inputs.want_retention, weights.consistency, weights.consistency)).abs()
    largest = one_minus_p(saved.both[: len(used)]).amax(1)
    terms = terms._replace(largest=2 * (used * largest).sum())
    if not inputs.want_retention or inputs.masked:
        return terms
    assert terms.student is not None and terms.masked is not None

    def joined(alone: tuple[Tensor, Tensor], joint: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # The anchor of the retention, over fewer entries, is the smaller one and still bounds all of the block.
        anchor, factor = alone
        return anchor, factor + joint[1] * (anchor - joint[0]).exp()

    alone, joint = terms.masked, terms.student
    student = Softmax(joined(alone.rows, joint.rows), joined(alone.columns, joint.columns))
    return terms._replace(student=student, masked=None)


_OWN = NUM_SAVED  # the row of the saved tensor with S and S° of own pairs


def losses_by_blocks(
    kernels: CalibratedKernels, inputs: CalibratedInputs, cache_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `CalibratedKernels.calibrated_losses`; saved is [NUM_SAVED + 1, 2 P]."""
    pairs = SortedPairs(inputs)
    cache = kernels.workspace(cache_size, inputs.image.device)
    stats = sweep_forward(kernels, pairs, map(pairs.columns, KINDS), len(pairs), cache)
    saved, sums = finish(pairs, stats, stats.columns, stats.retention_columns)
    edited = pairs.edited(pairs.forgotten_ids(), len(pairs) - pairs.retained)
    factors = term_factors(len(pairs), pairs.retained, edited, saved)
    return sums * factors, torch.cat((saved, stats.own.reshape(1, -1))), factors, cache


def gradients_by_blocks(
    kernels: CalibratedKernels, inputs: CalibratedInputs, saved: Tensor, weights: Tensor, cache: Tensor, need: Need
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `CalibratedKernels.calibrated_gradients`."""
    pairs = SortedPairs(inputs)
    n = len(pairs)
    of_rows, of_columns, own = saved[:NUM_SAVED, :n], saved[:NUM_SAVED, n:], saved[_OWN].view(2, n)
    gradients = incoming(pairs, own, weights)
    caches = Caches(kernels, cache)
    grad_image = saved.new_zeros(inputs.image.shape if need.image else (0,))
    grad_text = saved.new_empty(inputs.text.shape if need.text else (0,))
    grad_scale = saved.new_zeros(())
    for kind in KINDS:
        text, scale = sweep_backward(
            kernels, pairs, pairs.columns(kind), (of_rows, of_columns, own), gradients, caches, grad_image, need
        )
        grad_scale += scale
        if need.text:
            grad_text[pairs.rows(kind)] = text
    return (
        pairs.unsorted(grad_image, inputs.image.dtype) if need.image else grad_image,
        pairs.unsorted(grad_text, inputs.text.dtype) if need.text else grad_text,
        grad_scale / pairs.scale.to(saved.dtype),
    )
