"""The sweep of a batch whose pairs lie on several ranks: each forms the similarities of its own rows only.

Forward: own rows meet everyone's texts, gathered at once or block by block round a ring. What is found of the rows is
complete; what is found of the columns goes to their owners, who merge it in rank order, finish their pairs and tell
everyone the state [9, N] of the columns. Backward: a rank forms its rows of dS; dI and ds of its rows are complete, dT
is summed to its owners. Nothing is N x N; the similarities are formed once in all, not once for each side.

Gradients are those of the loss of the whole batch times the number of ranks, so that their mean over the ranks, which
DistributedDataParallel takes of those of the parameters, is the gradient of one process with the whole batch. A rank's
gradient of logit_scale has its own rows' part only: the mean over the ranks is the whole. They are the same where the
values are those of a rank's own rows and columns (`Shards.own_values`).
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
from cliperase_fast.ops import no_autocast, softmax_stats
from cliperase_fast.ops.autograd import SweepKernels
from cliperase_fast.ops.spec import SavedStats, SimilarityInputs
from cliperase_fast.ops.transforms import first_derivative_only


def sharded_sweep(
    engine: SweepKernels,
    shards: Shards,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    keep: str,
) -> tuple[Tensor, Tensor]:
    """(retention, consistency) of the whole batch on every rank; the arguments are this rank's part, see `ops.sweep`.

    A rank may have no pairs, the whole batch may not be empty. Every rank calls it, and its backward. keep: a ring
    keeps nothing.
    """
    ids = group_ids if want_retention else None
    local = SimilarityInputs(
        image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale, ids, want_retention,
        want_consistency,
    )  # fmt: skip
    engine.check(local)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, logit_scale))
    keep = keep if differentiable and shards.gather == "all" else "nothing"
    return _Sweep.apply(
        engine, shards, keep, want_retention, want_consistency, image, text, logit_scale, teacher_image, teacher_text,
        teacher_logit_scale, ids,
    )  # fmt: skip


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        engine: SweepKernels,
        shards: Shards,
        keep: str,
        want_retention: bool,
        want_consistency: bool,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        arguments = (*tensors, want_retention, want_consistency)
        local = SimilarityInputs(*arguments)
        ctx.fixed = (engine, shards, want_retention, want_consistency)
        with no_autocast(local.image):
            gathered: list[Tensor | None] = [None, None, None]
            if shards.gather == "all":
                gathered = gather_rows(shards, local.text, local.teacher_text, local.group_ids)
            retention, consistency, state, kept = _forward(engine, shards, local, gathered, keep)
        ctx.save_for_backward(*tensors, *gathered, *state, kept)
        return retention, consistency

    @staticmethod
    @first_derivative_only
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_retention: Tensor, grad_consistency: Tensor
    ) -> tuple[Any, ...]:
        engine, shards, *wants = ctx.fixed
        *inputs, rows, columns, kept = saved
        arguments = (*inputs[:7], *wants)
        local, gathered = SimilarityInputs(*arguments), list[Tensor | None](inputs[7:])
        ranks = shards.group.size
        weights = softmax_stats.weights(ranks * grad_retention, ranks * grad_consistency, shards.total)
        need = ctx.needs_input_grad[5:8]

        def gradients(problem: SimilarityInputs, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return engine.backward(
                problem,
                SavedStats(torch.cat((rows, columns), 1), rows.shape[1]),
                *weights,
                0,
                kept,
                *need,
                partial=True,
            )

        with no_autocast(local.image):
            backward = _backward_at_once if shards.gather == "all" else _backward_round_the_ring
            found = backward(shards, local, gathered, columns, need[1], gradients)
        of_inputs = [
            gradient.to(tensor.dtype) if needed else None
            for gradient, tensor, needed in zip(found, (local.image, local.text, local.scale), need, strict=True)
        ]
        return None, None, None, None, None, *of_inputs, None, None, None, None


def _block(
    shards: Shards, local: SimilarityInputs, first: int, text: Tensor, teacher_text: Tensor | None, ids: Tensor | None
) -> SimilarityInputs | None:
    """One's own rows against columns that start at place `first` of the whole batch; None where there is nothing."""
    if not shards.own or not len(text):
        return None
    offset = shards.firsts[shards.group.rank] - first
    paired = 0 <= offset < len(text)
    return replace(
        local, text=text, teacher_text=teacher_text, column_group_ids=ids, offset=offset if paired else len(text)
    )


def column_blocks(
    shards: Shards, local: SimilarityInputs, gathered: list[Tensor | None]
) -> Iterator[tuple[int, SimilarityInputs | None]]:
    """(place of the first column, problem) until own rows have met everyone's columns."""
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
    engine: SweepKernels, shards: Shards, local: SimilarityInputs, gathered: list[Tensor | None], keep: str
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """(retention, consistency, states of own rows [9, n] and of all columns [9, N], what is kept)."""
    rows = diagonal = teacher_diagonal = shift = None
    columns = softmax_stats.nothing(local, shards.total)
    shifts = columns.new_zeros(1, shards.total)
    kept = torch.empty(0, dtype=torch.uint8, device=columns.device)
    for first, problem in column_blocks(shards, local, gathered):
        if problem is None:
            continue
        sums, kept = engine.forward(problem, 0, engine.cache_size(problem, keep))
        if rows is None:
            rows, shift = sums.rows, sums.shift
        else:
            both = None if shift is None or sums.shift is None else torch.stack((shift, sums.shift))[:, None]
            rows = softmax_stats.merge(local, torch.stack((rows, sums.rows)), both, shift)
        met = slice(first, first + problem.m)
        columns[:, met] = sums.columns
        if sums.shift is not None:
            shifts[:, met] = sums.shift
        if sums.diagonal is not None:
            diagonal, teacher_diagonal = sums.diagonal, sums.teacher_diagonal

    parts = to_owners(shards, torch.cat((columns, shifts)))  # [ranks, planes + 1, n]
    row_state = column_state = columns.new_zeros(softmax_stats.PLANES, 0)
    totals = columns.new_zeros(2)
    if rows is not None and diagonal is not None:
        row_state, row_gap = softmax_stats.state(local, rows, diagonal, teacher_diagonal, shift)
        merged = softmax_stats.merge(local, parts[:, :-1], parts[:, -1], shift)
        column_state, column_gap = softmax_stats.state(local, merged, diagonal, teacher_diagonal, shift)
        gaps = None if row_gap is None or column_gap is None else torch.cat((row_gap, column_gap))
        totals = torch.stack(softmax_stats.totals(local, torch.cat((row_state, column_state), 1), gaps))
    (column_states,) = gather_rows(shards, column_state.T)
    assert column_states is not None
    pairs = shards.total
    if shards.own_values:
        pairs = max(shards.own, 1)
    else:
        totals = total_over_ranks(shards.group, totals)
    retention, consistency = totals / pairs
    return 0.5 * retention, consistency, (row_state, column_states.T), kept


_Gradients = Callable[[SimilarityInputs, Tensor], tuple[Tensor, Tensor, Tensor]]  # of image, text and scale


def _backward_at_once(
    shards: Shards,
    local: SimilarityInputs,
    gathered: list[Tensor | None],
    columns: Tensor,
    need_text: bool,
    of: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    ((_, problem),) = column_blocks(shards, local, gathered)
    image, text, scale = zeros(local, shards.total, columns) if problem is None else of(problem, columns)
    return image, sum_to_owners(shards, text) if need_text else text, scale


def _backward_round_the_ring(
    shards: Shards,
    local: SimilarityInputs,
    gathered: list[Tensor | None],
    columns: Tensor,
    need_text: bool,
    of: _Gradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a block of texts follows it a step behind, and every rank adds its part; the last hop is home."""
    image, _, scale = zeros(local, 0, columns)
    home = collectives.RingReducer(shards, columns, local.text.shape[1]) if need_text else None
    for step, (first, problem) in enumerate(column_blocks(shards, local, gathered)):
        size = shards.sizes[collectives.owners(shards.group)[step]]
        if home is not None:
            home.receive(size)
        part = zeros(local, size, columns) if problem is None else of(problem, columns[:, first : first + size])
        image, scale = (image + part[0] if local.n and len(part[0]) else image), scale + part[2]
        if home is not None:
            home.add(part[1])
    return image, columns.new_zeros(0) if home is None else home.arrive(), scale


def zeros(local: SimilarityInputs, texts: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like.new_zeros(local.image.shape), like.new_zeros(texts, local.text.shape[1]), like.new_zeros(())
