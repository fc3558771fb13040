"""Rank many image features by their similarity to a query, a part at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.errors import InputError

PART = 1 << 15  # rows multiplied at a time: 64 MiB of width 512


def cosines(parts: Iterable[Tensor], query: Tensor, count: int) -> np.ndarray:
    """Compute the cosine of every row with the query; float32 [count].

    parts: the rows [n, D] in order, of unit length, in any floating dtype. query: [D].
    """
    found = np.empty(count, dtype=np.float32)
    start = 0
    with torch.no_grad():
        for rows in parts:
            stop = start + len(rows)
            found[start:stop] = (rows.float() @ query.float().to(rows.device)).cpu().numpy()
            start = stop
    if start != count:
        raise ValueError(f"{start} rows were given and {count} were expected")
    return found


def mean_query(queries: Tensor) -> Tensor:
    """Return the mean direction [D] of unit queries [Q, D]. Raises InputError if they cancel out."""
    mean = queries.float().mean(0)
    if not bool(mean.isfinite().all()) or float(mean.norm()) < 1e-6:
        raise InputError("the queries have no common direction: their features cancel out or are not finite")
    return F.normalize(mean, dim=0)


def best_rows(similarities: np.ndarray, *, k: int | None = None, threshold: float | None = None) -> np.ndarray:
    """Return the rows with the highest similarities, the highest first; equal ones in their order. NaN is never among
    them.

    k: at most so many. threshold: only those of at least this similarity.
    """
    rows = np.flatnonzero(np.isfinite(similarities) if threshold is None else similarities >= threshold)
    values = similarities[rows]
    if k is not None and k < len(rows):
        least = np.partition(values, len(values) - k)[len(values) - k]
        above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
        rows = rows[np.sort(np.concatenate([above, equal[: k - len(above)]]))]
    return rows[np.argsort(-similarities[rows], kind="stable")]
