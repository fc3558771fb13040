"""Compute the calibrated loss of a batch spread over ranks: own rows meet the retain and forget texts of all ranks.

It works as `distributed/sharded_softmax.py` does, with the blocks of `ops/calibrated_sweep.py`: retain and forget pairs
are two batches, each spread over the ranks in its own way, and a rank may lack either. Gradients are those of the whole
batch's loss times the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.distributed import collectives
from cliperase_fast.distributed.collectives import gather_rows, sum_to_owners, to_owners, total_over_ranks
from cliperase_fast.distributed.process_group import Shards
from cliperase_fast.ops.calibrated import CalibratedInputs, CalibratedKernels
from cliperase_fast.ops.calibrated_autograd import flatten
from cliperase_fast.ops.calibrated_sweep import (
    FORGET,
    KINDS,
    Caches,
    Columns,
    JointStats,
    SortedPairs,
    finish,
    incoming,
    sweep_backward,
    sweep_forward,
    term_factors,
)
from cliperase_fast.ops.spec import NUM_SAVED, Need, SimilarityInputs, merge_stats, no_autocast
from cliperase_fast.ops.transforms import first_derivative_only

Parts = tuple[Shards, Shards]  # of the retain and of the forget pairs, as KINDS
_GATHERED = 4  # tensors of a kind's columns: text, teacher_text, ids, levels


def sharded_calibrated(kernels: CalibratedKernels, parts: Parts, inputs: CalibratedInputs) -> Tensor:
    """Return the terms of the whole batch [4] on every rank; `inputs` is this rank's part.

    A rank may have no pairs, but the whole batch must not be empty. Every rank must call this and backward. With
    gather="ring" no similarities are kept.
    """
    tensors = (inputs.image, inputs.text, inputs.scale)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not differentiable or parts[0].gather != "all":
        inputs = replace(inputs, keep="nothing")
    return _Sweep.apply(kernels, parts, inputs, *tensors)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: CalibratedKernels, parts: Parts, local: CalibratedInputs, *_differentiable: Tensor
    ) -> Tensor:
        with no_autocast(local.image):
            pairs = SortedPairs(local)
            gathered = _gathered(parts, pairs)
            cache = kernels.workspace(_cache_size(kernels, parts, local), local.image.device)
            every = (columns for kind in KINDS for columns in _columns(parts, pairs, kind, gathered))
            stats = sweep_forward(kernels, pairs, every, parts[0].total + parts[1].total, cache)
            terms, saved = _finish(parts, pairs, stats)
        *tensors, strip_rows = flatten(local)
        ctx.fixed = (kernels, parts, strip_rows)
        ctx.save_for_backward(*tensors, *(tensor for of_kind in gathered for tensor in of_kind), *saved, cache)
        return terms

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grads: Tensor) -> tuple[Any, ...]:
        kernels, parts, strip_rows = ctx.fixed
        *flat, of_rows, of_columns, own, factors, cache = saved
        arguments: Any = (*flat[: -2 * _GATHERED], strip_rows)
        gathered: Any = flat[-2 * _GATHERED : -_GATHERED], flat[-_GATHERED:]
        local, need = CalibratedInputs(*arguments), Need(*ctx.needs_input_grad[3:])
        with no_autocast(local.image):
            pairs = SortedPairs(local)
            gradients = incoming(pairs, own, factors * (parts[0].group.size * grads))
            caches = Caches(kernels, cache)
            image = of_rows.new_zeros(local.image.shape if need.image else (0,))
            scale = of_rows.new_zeros(())
            texts = of_rows.new_empty(local.text.shape if need.text else (0,))
            for kind in KINDS:
                home = _TextGradient(parts[kind], of_rows, local.text.shape[1])
                for some in _columns(parts, pairs, kind, gathered):
                    home.receive(len(some.text))
                    text, of_scale = sweep_backward(
                        kernels, pairs, some, (of_rows, of_columns, own), gradients, caches, image, need
                    )
                    scale = scale + of_scale
                    if need.text:
                        home.add(text)
                if need.text:
                    texts[pairs.rows(kind)] = home.arrive()
            scale = (scale / pairs.scale.to(scale.dtype)).to(local.scale.dtype)
        return (
            None, None, None,
            pairs.unsorted(image, local.image.dtype) if need.image else None,
            pairs.unsorted(texts, local.text.dtype) if need.text else None,
            scale if need.scale else None,
        )  # fmt: skip


def _own_columns(pairs: SortedPairs, kind: int) -> tuple[Tensor | None, ...]:
    own = pairs.columns(kind)
    return own.text, own.teacher_text, own.ids, own.levels


def _gathered(parts: Parts, pairs: SortedPairs) -> tuple[list[Tensor | None], ...]:
    """Return all ranks' columns of each kind; Nones with a ring, or if no rank has any."""
    return tuple(
        gather_rows(parts[kind], *_own_columns(pairs, kind))
        if parts[kind].gather == "all" and parts[kind].total
        else [None] * _GATHERED
        for kind in KINDS
    )


def _columns(
    parts: Parts, pairs: SortedPairs, kind: int, gathered: tuple[list[Tensor | None], ...]
) -> Iterator[Columns]:
    """Yield the columns of a kind until own rows have met all of them."""
    shards, start = parts[kind], parts[0].total if kind == FORGET else 0
    own_first = shards.firsts[shards.group.rank]
    blocks: Iterable[tuple[int, int, list[Tensor | None]]] = []
    if shards.gather == "all" and shards.total:
        blocks = [(0, own_first, gathered[kind])]
    elif shards.total:
        blocks = (
            (shards.firsts[owner], 0 if owner == shards.group.rank else shards.sizes[owner], tensors)
            for owner, tensors in collectives.blocks(shards, *_own_columns(pairs, kind))
        )
    for first, pair_offset, (text, teacher_text, ids, levels) in blocks:
        assert text is not None and teacher_text is not None and levels is not None
        place = slice(start + first, start + first + len(text))
        yield Columns(kind, place, text, teacher_text, ids, levels, pair_offset)


def _cache_size(kernels: CalibratedKernels, parts: Parts, local: CalibratedInputs) -> int:
    if local.keep == "nothing" or not len(local.image):
        return 0
    columns = parts[0].total + parts[1].total
    text, teacher_text = (
        features.new_empty(columns, features.shape[1], device="meta") for features in (local.text, local.teacher_text)
    )
    return kernels.blocks_cache_size(
        SimilarityInputs(local.image, text, local.scale, local.teacher_image, teacher_text, local.teacher_scale,
                         keep=local.keep)
    )  # fmt: skip


def _finish(parts: Parts, pairs: SortedPairs, stats: JointStats) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the terms of the whole batch [4], and what the backward pass needs.

    That is the saved stats of own rows [NUM_SAVED, n] and of all columns, S and S° of own pairs [2, n], and the factors
    of the terms [4].
    """
    group = parts[0].group
    if stats.shift is None:  # without pairs here
        stats.shift = stats.rows.new_zeros(())
    found = torch.cat((stats.columns, stats.retention_columns, stats.shift.expand(1, stats.count)))  # [8, columns]
    joint, retention = pairs.template(), pairs.template(teacher=False)
    of_columns = found.new_empty(7, len(pairs))
    for kind, shards, place in _places(parts):
        received = to_owners(shards, found[:, place])  # [ranks, 8, own]
        both = merge_stats(joint, received[:, :5], received[:, 7], stats.shift)
        alone = merge_stats(retention, received[:, 5:7], None, None)
        of_columns[:, pairs.rows(kind)] = torch.cat((both, alone))
    saved, sums = finish(pairs, stats, of_columns[:5], of_columns[5:])
    of_rows, of_columns = saved[:, : len(pairs)], saved[:, len(pairs) :]
    everyones = [gather_rows(shards, of_columns[:, pairs.rows(kind)].T)[0] for kind, shards, _ in _places(parts)]

    forgotten = pairs.forgotten_ids()
    if parts[FORGET].total and forgotten is not None:
        (forgotten,) = gather_rows(parts[FORGET], forgotten)
    edited = total_over_ranks(group, pairs.edited(forgotten, parts[FORGET].total))
    factors = term_factors(parts[0].total + parts[1].total, parts[0].total, edited, saved)
    terms = total_over_ranks(group, sums) * factors
    all_columns = torch.cat([tensor for tensor in everyones if tensor is not None]).T
    assert len(all_columns) == NUM_SAVED
    return terms, (of_rows, all_columns, stats.own, factors)


def _places(parts: Parts) -> list[tuple[int, Shards, slice]]:
    """Return (kind, shards, place among all columns) of each kind that any rank has."""
    places = slice(0, parts[0].total), slice(parts[0].total, parts[0].total + parts[1].total)
    return [(kind, parts[kind], places[kind]) for kind in KINDS if parts[kind].total]


class _TextGradient:
    """Bring the gradients of blocks of text home: at once, or round the ring."""

    def __init__(self, shards: Shards, like: Tensor, width: int) -> None:
        self._shards = shards
        self._found = like.new_zeros(0, width)
        self._ring = collectives.RingReducer(shards, like, width) if shards.gather != "all" and shards.total else None

    def receive(self, rows: int) -> None:
        if self._ring is not None:
            self._ring.receive(rows)

    def add(self, gradient: Tensor) -> None:
        if self._ring is not None:
            self._ring.add(gradient)
        else:
            self._found = sum_to_owners(self._shards, gradient)

    def arrive(self) -> Tensor:
        """Return the gradient of own text, summed over all ranks."""
        return self._found if self._ring is None else self._ring.arrive()
