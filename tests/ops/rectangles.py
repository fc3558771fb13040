"""Sweeps in pieces: a batch cut into rows and columns, each rectangle swept by an engine, put together again."""

from __future__ import annotations

from itertools import pairwise

import torch
from sweep_cases import Batch
from torch import Tensor

from cliperase_fast.ops import softmax_stats
from cliperase_fast.ops.autograd import SweepKernels
from cliperase_fast.ops.spec import SavedStats, SimilarityInputs


def rectangle(batch: Batch, rows: tuple[int, int], columns: tuple[int, int]) -> SimilarityInputs:
    """Pairs rows[0]..rows[1] against columns[0]..columns[1]; the columns hold all of the rows' own or none."""
    r, c = slice(*rows), slice(*columns)
    inside = columns[0] <= rows[0] and rows[1] <= columns[1]
    assert inside or rows[1] <= columns[0] or columns[1] <= rows[0]
    ids = batch.group_ids if batch.want_retention else None
    teacher = (batch.teacher_image, batch.teacher_text)
    return SimilarityInputs(
        batch.image[r], batch.text[c], batch.scale,
        None if teacher[0] is None else teacher[0][r], None if teacher[1] is None else teacher[1][c],
        batch.teacher_scale, None if ids is None else ids[r], batch.want_retention, batch.want_consistency,
        column_group_ids=None if ids is None else ids[c],
        offset=rows[0] - columns[0] if inside else columns[1] - columns[0],
    )  # fmt: skip


def in_pieces(
    engine: SweepKernels,
    batch: Batch,
    row_cuts: list[int],
    column_cuts: list[int],
    strip_rows: int = 0,
    keep: str = "auto",
) -> list[Tensor]:
    """(retention, consistency, gradients of image, text and scale of 0.7 retention + 1.3 consistency)."""
    n = len(batch.image)
    pieces = [
        (rectangle(batch, rows, columns), slice(*rows), slice(*columns))
        for rows in pairwise(row_cuts)
        for columns in pairwise(column_cuts)
    ]
    whole = rectangle(batch, (0, n), (0, n))
    row_parts, column_parts, shifts, kept = [], [], [], []
    diagonal = torch.full((n,), torch.nan, dtype=whole.compute_dtype())
    teacher_diagonal = diagonal.clone()
    for problem, rows, columns in pieces:
        sums, stored = engine.forward(problem, strip_rows, engine.cache_size(problem, keep))
        kept.append(stored)
        assert (sums.diagonal is not None) == problem.paired
        for part, parts, at in ((sums.rows, row_parts, rows), (sums.columns, column_parts, columns)):
            full = softmax_stats.nothing(whole, n)
            full[:, at] = part
            parts.append(full)
        shifts.append(diagonal.new_zeros(()) if sums.shift is None else sums.shift)
        if sums.diagonal is not None:
            diagonal[rows] = sums.diagonal
        if sums.teacher_diagonal is not None:
            teacher_diagonal[rows] = sums.teacher_diagonal
    states, gaps = [], []
    for parts in (row_parts, column_parts):
        merged = softmax_stats.merge(whole, torch.stack(parts), torch.stack(shifts)[:, None], shifts[0])
        state, gap = softmax_stats.state(whole, merged, diagonal, teacher_diagonal, shifts[0])
        states.append(state)
        gaps.append(gap)
    gap = None if gaps[0] is None else torch.cat(gaps)
    retention, consistency = softmax_stats.totals(whole, torch.cat(states, 1), gap)
    weights = softmax_stats.weights(diagonal.new_full((), 0.7), diagonal.new_full((), 1.3), n)
    gradients = [diagonal.new_zeros(tensor.shape) for tensor in (batch.image, batch.text, batch.scale)]
    for (problem, rows, columns), stored in zip(pieces, kept, strict=True):
        state = SavedStats(torch.cat((states[0][:, rows], states[1][:, columns]), 1), problem.n)
        parts = engine.backward(problem, state, *weights, strip_rows, stored, True, True, True, partial=True)
        assert all(part.dtype == diagonal.dtype for part in parts)
        for gradient, part, at in zip(gradients, parts, (rows, columns, ...), strict=True):
            gradient[at] += part
    return [0.5 * retention / n, consistency / n, *gradients]
