"""Compute cosines, ranks and areas from features, for the scores.

Features are float tensors with rows of unit length. Similarities are formed in blocks of at most `block` values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.evaluation.queries import TIE
from cliperase_fast.evaluation.queries import wrong_before_right as wrong_before_right_in_order

BLOCK = 2**24  # similarities held at once: 64 MiB in float32


def own_cosines(images: Tensor, captions: Tensor, image_of: np.ndarray, caption_of: np.ndarray) -> np.ndarray:
    """Return the mean cosine of each image with its own captions; float64 [n].

    images: [n, D]. captions: [U, D]. image_of, caption_of: int64 [P], the matching pairs; every image has at least one.
    """
    sums = np.zeros(len(images), dtype=np.float64)
    step = max(1, BLOCK // max(1, images.shape[1]))
    for start in range(0, len(image_of), step):
        rows, items = image_of[start : start + step], caption_of[start : start + step]
        cosines = (images[rows].double() * captions[items].double()).sum(1)  # [step]
        np.add.at(sums, rows, cosines.cpu().numpy())
    return sums / np.bincount(image_of, minlength=len(images))


def mean_cosines(queries: Tensor, gallery: Tensor) -> np.ndarray:
    """Return the mean cosine of each query with all rows of the gallery; float64 [Q].

    Exact without a [Q, G] matrix: it is the product of the query with the mean row.
    """
    return (queries.double() @ gallery.double().mean(0)).cpu().numpy()


def largest_cosines(queries: Tensor, gallery: Tensor, *, block: int = BLOCK) -> np.ndarray:
    """Return the cosine of each query with the nearest row of the gallery; float64 [Q]."""
    step = max(1, block // max(1, len(gallery)))
    parts = [(part @ gallery.T).amax(1) for part in queries.split(step)]
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)


def wrong_before_right(
    queries: Tensor,
    gallery: Tensor,
    query_of: np.ndarray,
    item_of: np.ndarray,
    *,
    item_kinds: np.ndarray | None = None,
    block: int = BLOCK,
) -> np.ndarray:
    """Count, for each query, the items that do not match it and score at least as high as its best match; int64 [Q].

    queries: [Q, D]. gallery: [G, D]. query_of, item_of: int64 [P], the matching pairs, in any order. item_kinds: int64
    [G]; only items of the kind of a query's matches count. None: all of them.
    Ties (up to `TIE`) count against the model, and so does NaN. 0 means that the best match comes first. A query
    without a match is behind all G items.
    """
    order = np.argsort(query_of, kind="stable")
    return wrong_before_right_in_order(queries, gallery, query_of[order], item_of[order], block, item_kinds)


def first_right(
    queries: Tensor, gallery: Tensor, matches: np.ndarray, counts: np.ndarray, *, block: int = BLOCK
) -> np.ndarray:
    """Return the reciprocal rank of each query's best match in resamples of the gallery; float64 [Q, B].

    queries: [Q, D]. gallery: [G, D]. matches: bool [Q, G]. counts: [B, G], how often an item is in each resample.
    The rank is 1 + the number of items in the resample that do not match and score at least as high as the best match
    in it (ties as in `wrong_before_right`). A resample without a match gives 0.
    """
    found = np.empty((len(queries), len(counts)))
    step = max(1, block // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        cosines = (queries[start : start + step] @ gallery.T).double().cpu().numpy()  # [step, G]
        for offset, row in enumerate(cosines):
            mine = matches[start + offset]
            right = np.flatnonzero(mine)[np.argsort(-row[mine], kind="stable")]  # best match first
            wrong = np.flatnonzero(~mine)[np.argsort(-row[~mine], kind="stable")]
            present = counts[:, right] > 0  # [B, R]
            best = row[right[present.argmax(1)]]  # [B]
            ahead = np.searchsorted(-row[wrong], -(best - TIE), side="left")  # wrong items above best - TIE
            before = np.concatenate([np.zeros((len(counts), 1)), counts[:, wrong].cumsum(1)], axis=1)  # [B, W + 1]
            rank = 1 + before[np.arange(len(counts)), ahead]
            found[start + offset] = np.where(present.any(1), 1 / rank, 0.0)
    return found


def auc(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Return the probability that a random positive is larger than a random negative, ties counted as half.

    None without positives or without negatives.
    """
    if len(positives) == 0 or len(negatives) == 0:
        return None
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    up_to = np.searchsorted(ordered, positives, side="right")
    return float((below + up_to).mean() / (2 * len(negatives)))


def true_positive_rate(positives: np.ndarray, negatives: np.ndarray, false_positive_rate: float) -> float:
    """Return the share of positives above the lowest threshold that at most this share of the negatives exceeds."""
    allowed = int(false_positive_rate * len(negatives))
    threshold = np.sort(negatives)[::-1][min(allowed, len(negatives) - 1)]
    return float((positives > threshold).mean())


def separability(true: np.ndarray, shuffled: np.ndarray) -> float | None:
    """Return the balanced accuracy of telling true pairs from shuffled ones by one threshold on the cosine.

    The best threshold for the pairs with even numbers is applied to those with odd numbers, and vice versa; the result
    is the mean of both. 0.5 is chance. None with fewer than two pairs of either kind.
    """
    if len(true) < 2 or len(shuffled) < 2:
        return None
    found = []
    for fitted in (0, 1):
        threshold = _best_threshold(true[fitted::2], shuffled[fitted::2])
        kept = ((true[1 - fitted :: 2] >= threshold).mean() + (shuffled[1 - fitted :: 2] < threshold).mean()) / 2
        found.append(kept)
    return float(np.mean(found))


def _best_threshold(true: np.ndarray, shuffled: np.ndarray) -> float:
    """Return the midpoint of adjacent values for which true >= threshold and shuffled < threshold hold most often."""
    values = np.unique(np.concatenate([true, shuffled]))
    cuts = np.concatenate([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])
    kept = 1 - np.searchsorted(np.sort(true), cuts, side="left") / len(true)
    rejected = np.searchsorted(np.sort(shuffled), cuts, side="left") / len(shuffled)
    return float(cuts[np.argmax(kept + rejected)])
