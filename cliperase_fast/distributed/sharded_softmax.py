"""Sweep a batch spread over ranks: each rank forms the similarities of its own rows only.

Forward: own rows meet all ranks' texts, gathered at once or block by block round a ring. The stats of own rows are
then complete. The stats of the columns go to their owners, who merge them in rank order, finish their pairs and send
the saved stats of their columns, [9, N] in all, to every rank. Backward: a rank forms its rows of dS. dI and ds of its
rows are complete; dT is summed to its owners. No matrix is N x N, and each similarity is formed on one rank only.

Gradients are those of the whole batch's loss times the number of ranks. DistributedDataParallel averages the gradients
of parameters over the ranks, which gives those of one process with the whole batch. A rank's gradient of logit_scale
covers its own rows only, and is right in the mean over the ranks. `Shards.own_values` changes the values, not the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.distributed import collectives
from cliperase_fast.distributed.collectives import gather_rows, sum_to_owners, to_owners, total_over_ranks
from cliperase_fast.distributed.process_group import Shards
from cliperase_fast.ops.autograd import flat_tensors, flatten, unflatten
from cliperase_fast.ops.spec import (
    NUM_SAVED,
    Need,
    SavedStats,
    SimilarityInputs,
    SweepKernels,
    empty_stats,
    loss_sums,
    merge_stats,
    no_autocast,
    pair_weights,
    saved_stats,
)
from cliperase_fast.ops.transforms import first_derivative_only


def sharded_sweep(kernels: SweepKernels, shards: Shards, inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
    """Return (retention, consistency) of the whole batch on every rank; `inputs` is this rank's part.

    A rank may have no pairs, but the whole batch must not be empty. Every rank must call this and backward. With
    gather="ring" no similarities are kept.
    """
    tensors = (inputs.image, inputs.text, inputs.scale)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not differentiable or shards.gather != "all":
        inputs = replace(inputs, keep="nothing")
    return _Sweep.apply(kernels, shards, inputs, *tensors)


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: SweepKernels, shards: Shards, local: SimilarityInputs, *_differentiable: Tensor
    ) -> tuple[Tensor, Tensor]:
        with no_autocast(local.image):
            gathered: list[Tensor | None] = [None, None, None]
            if shards.gather == "all":
                gathered = gather_rows(shards, local.text, local.teacher_text, local.group_ids)
            retention, consistency, saved, cache = _forward(kernels, shards, local, gathered)
        tensors = flat_tensors(local)
        ctx.fixed = (kernels, shards, flatten(local)[len(tensors) :])
        ctx.save_for_backward(*tensors, *gathered, *saved, cache)
        return retention, consistency

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_retention: Tensor, grad_consistency: Tensor
    ) -> tuple[Any, ...]:
        kernels, shards, options = ctx.fixed
        *tensors, rows, columns, cache = saved
        local, gathered = unflatten(*tensors[:-3], *options), list[Tensor | None](tensors[-3:])
        ranks = shards.group.size
        weights = pair_weights(ranks * grad_retention, ranks * grad_consistency, shards.total)
        need = Need(*ctx.needs_input_grad[3:])

        def gradients(inputs: SimilarityInputs, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            stats = SavedStats(torch.cat((rows, columns), 1), rows.shape[1], cache)
            return kernels.backward(inputs, stats, weights, need, partial=True)

        with no_autocast(local.image):
            backward = _backward_at_once if shards.gather == "all" else _backward_round_the_ring
            found = backward(shards, local, gathered, columns, need.text, gradients)
        of_inputs = [
            gradient.to(tensor.dtype) if needed else None
            for gradient, tensor, needed in zip(found, (local.image, local.text, local.scale), need, strict=True)
        ]
        return None, None, None, *of_inputs


def _block(
    shards: Shards, local: SimilarityInputs, first: int, text: Tensor, teacher_text: Tensor | None, ids: Tensor | None
) -> SimilarityInputs | None:
    """Return own rows against columns that start at index `first` of the whole batch; None if either is empty."""
    if not shards.own or not len(text):
        return None
    pair_offset = shards.firsts[shards.group.rank] - first
    if not 0 <= pair_offset < len(text):
        pair_offset = len(text)
    return replace(local, text=text, teacher_text=teacher_text, column_group_ids=ids, pair_offset=pair_offset)


def column_blocks(
    shards: Shards, local: SimilarityInputs, gathered: list[Tensor | None]
) -> Iterator[tuple[int, SimilarityInputs | None]]:
    """Yield (index of the first column, inputs) until own rows have met all ranks' columns."""
    if shards.gather == "all":
        text, *others = gathered
        assert text is not None
        yield 0, _block(shards, local, 0, text, *others)
        return
    for owner, (text, *others) in collectives.blocks(shards, local.text, local.teacher_text, local.group_ids):
        assert text is not None
        first = shards.firsts[owner]
        yield first, _block(shards, local, first, text, *others)


def _forward(
    kernels: SweepKernels, shards: Shards, local: SimilarityInputs, gathered: list[Tensor | None]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return (retention, consistency, saved stats of own rows [9, n] and of all columns [9, N], cache)."""
    rows = diagonal = teacher_diagonal = shift = None
    columns = empty_stats(local, shards.total)
    shifts = columns.new_zeros(1, shards.total)
    cache = torch.empty(0, dtype=torch.uint8, device=columns.device)
    for first, inputs in column_blocks(shards, local, gathered):
        if inputs is None:
            continue
        stats, cache = kernels.forward(inputs, kernels.cache_size(inputs))
        if rows is None:
            rows, shift = stats.rows, stats.shift
        else:
            both = None if shift is None or stats.shift is None else torch.stack((shift, stats.shift))[:, None]
            rows = merge_stats(local, torch.stack((rows, stats.rows)), both, shift)
        met = slice(first, first + inputs.m)
        columns[:, met] = stats.columns
        if stats.shift is not None:
            shifts[:, met] = stats.shift
        if stats.diagonal is not None:
            diagonal, teacher_diagonal = stats.diagonal, stats.teacher_diagonal

    parts = to_owners(shards, torch.cat((columns, shifts)))  # [ranks, num_stats + 1, n]
    of_rows = of_columns = columns.new_zeros(NUM_SAVED, 0)
    totals = columns.new_zeros(2)
    if rows is not None and diagonal is not None:
        of_rows, row_gap = saved_stats(local, rows, diagonal, teacher_diagonal, shift)
        merged = merge_stats(local, parts[:, :-1], parts[:, -1], shift)
        of_columns, column_gap = saved_stats(local, merged, diagonal, teacher_diagonal, shift)
        gaps = None if row_gap is None or column_gap is None else torch.cat((row_gap, column_gap))
        totals = torch.stack(loss_sums(local, torch.cat((of_rows, of_columns), 1), gaps))
    (of_all_columns,) = gather_rows(shards, of_columns.T)
    assert of_all_columns is not None
    pairs = shards.total
    if shards.own_values:
        pairs = max(shards.own, 1)
    else:
        totals = total_over_ranks(shards.group, totals)
    retention, consistency = totals / pairs
    return 0.5 * retention, consistency, (of_rows, of_all_columns.T), cache


_Gradients = Callable[[SimilarityInputs, Tensor], tuple[Tensor, Tensor, Tensor]]  # of image, text and scale


def _backward_at_once(
    shards: Shards,
    local: SimilarityInputs,
    gathered: list[Tensor | None],
    columns: Tensor,
    need_text: bool,
    of: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    ((_, inputs),) = column_blocks(shards, local, gathered)
    image, text, scale = zeros(local, shards.total, columns) if inputs is None else of(inputs, columns)
    return image, sum_to_owners(shards, text) if need_text else text, scale


def _backward_round_the_ring(
    shards: Shards,
    local: SimilarityInputs,
    gathered: list[Tensor | None],
    columns: Tensor,
    need_text: bool,
    of: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the gradients of texts with a `RingReducer`, while the blocks of texts pass round the ring."""
    image, _, scale = zeros(local, 0, columns)
    home = collectives.RingReducer(shards, columns, local.text.shape[1]) if need_text else None
    for step, (first, inputs) in enumerate(column_blocks(shards, local, gathered)):
        size = shards.sizes[collectives.owners(shards.group)[step]]
        if home is not None:
            home.receive(size)
        part = zeros(local, size, columns) if inputs is None else of(inputs, columns[:, first : first + size])
        image, scale = (image + part[0] if local.n and len(part[0]) else image), scale + part[2]
        if home is not None:
            home.add(part[1])
    return image, columns.new_zeros(0) if home is None else home.arrive(), scale


def zeros(local: SimilarityInputs, texts: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like.new_zeros(local.image.shape), like.new_zeros(texts, local.text.shape[1]), like.new_zeros(())
