"""Sweeps in pieces: a batch cut into rows and columns, each rectangle swept on its own, all put together."""

from __future__ import annotations

from itertools import pairwise

import torch
from sweep_cases import Batch
from torch import Tensor

from cliperase_fast.ops.spec import (
    Need,
    SavedStats,
    SimilarityInputs,
    SweepKernels,
    empty_stats,
    loss_sums,
    merge_stats,
    pair_weights,
    saved_stats,
)


def rectangle(batch: Batch, rows: tuple[int, int], columns: tuple[int, int]) -> SimilarityInputs:
    """Pairs rows[0]..rows[1] against columns[0]..columns[1]; the columns hold all of the rows' own or none."""
    r, c = slice(*rows), slice(*columns)
    inside = columns[0] <= rows[0] and rows[1] <= columns[1]
    assert inside or rows[1] <= columns[0] or columns[1] <= rows[0]
    ids, teacher = batch.group_ids, batch.teacher
    return SimilarityInputs(
        batch.image[r], batch.text[c], batch.scale,
        None if teacher is None else teacher[0][r], None if teacher is None else teacher[1][c], batch.teacher_scale,
        None if ids is None else ids[r], batch.want_retention, batch.strip_rows, batch.keep,
        column_group_ids=None if ids is None else ids[c],
        pair_offset=rows[0] - columns[0] if inside else columns[1] - columns[0],
    )  # fmt: skip


def in_pieces(
    kernels: SweepKernels, batch: Batch, row_cuts: list[int], column_cuts: list[int], **options: int | str
) -> list[Tensor]:
    """(retention, consistency, gradients of image, text and scale of 0.7 retention + 1.3 consistency)."""
    n = len(batch.image)
    batch = batch.inputs(**options)
    pieces = [
        (rectangle(batch, rows, columns), slice(*rows), slice(*columns))
        for rows in pairwise(row_cuts)
        for columns in pairwise(column_cuts)
    ]
    whole = rectangle(batch, (0, n), (0, n))
    row_parts, column_parts, shifts, kept = [], [], [], []
    diagonal = torch.full((n,), torch.nan, dtype=whole.dtype)
    teacher_diagonal = diagonal.clone()
    for inputs, rows, columns in pieces:
        stats, cache = kernels.forward(inputs, kernels.cache_size(inputs))
        kept.append(cache)
        assert (stats.diagonal is not None) == inputs.paired
        for part, parts, at in ((stats.rows, row_parts, rows), (stats.columns, column_parts, columns)):
            full = empty_stats(whole, n)
            full[:, at] = part
            parts.append(full)
        shifts.append(diagonal.new_zeros(()) if stats.shift is None else stats.shift)
        if stats.diagonal is not None:
            diagonal[rows] = stats.diagonal
        if stats.teacher_diagonal is not None:
            teacher_diagonal[rows] = stats.teacher_diagonal
    saved, gaps = [], []
    for parts in (row_parts, column_parts):
        merged = merge_stats(whole, torch.stack(parts), torch.stack(shifts)[:, None], shifts[0])
        one, gap = saved_stats(whole, merged, diagonal, teacher_diagonal, shifts[0])
        saved.append(one)
        gaps.append(gap)
    gap = None if gaps[0] is None else torch.cat(gaps)
    retention, consistency = loss_sums(whole, torch.cat(saved, 1), gap)
    weights = pair_weights(diagonal.new_full((), 0.7), diagonal.new_full((), 1.3), n)
    gradients = [diagonal.new_zeros(tensor.shape) for tensor in (batch.image, batch.text, batch.scale)]
    for (inputs, rows, columns), cache in zip(pieces, kept, strict=True):
        stats = SavedStats(torch.cat((saved[0][:, rows], saved[1][:, columns]), 1), inputs.n, cache)
        parts = kernels.backward(inputs, stats, weights, Need(), partial=True)
        assert all(part.dtype == diagonal.dtype for part in parts)
        for gradient, part, at in zip(gradients, parts, (rows, columns, ...), strict=True):
            gradient[at] += part
    return [0.5 * retention / n, consistency / n, *gradients]
