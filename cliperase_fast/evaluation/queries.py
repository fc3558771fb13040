"""What each image and each caption of a split finds: ranks and classifications, counted exactly in pieces that fit in
memory."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.evaluation.encoding import EncodedPairs, matching, pair_similarities

# Cosines closer than this count as equal. The float32 rounding of a dot product of unit vectors stays below it, so
# equal features tie wherever they stand in a matrix.
TIE = 1e-6
CHUNK = 2**24  # similarities held at once: 64 MiB


class QueryResults:
    """The result of every retrieval and zero-shot query over n images and U captions, each computed when first used.

    encoded: the features.
    labels: int64 [n], the class of each image; None without classes.
    class_features: [C, D], unit rows; None without classes.
    class_kinds: int64 [C]; an image is compared only with classes of its own class's kind. None: with all.
    device: where the similarities are computed, in float32.
    chunk: similarities held at once.

    Ties count against the model: a wrong item that scores as high as the right one, up to `TIE`, is ahead of it. A NaN
    similarity is never a hit.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        labels: np.ndarray | None = None,
        class_features: Tensor | None = None,
        *,
        class_kinds: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
    ) -> None:
        self.encoded, self.chunk = encoded, chunk
        self.images, self.captions = encoded.image_features.to(device), encoded.caption_features.to(device)
        self.image_of, self.caption_of = matching(encoded)  # [P] each
        self.labels, self.class_features, self.class_kinds = labels, class_features, class_kinds

    @property
    def has_classes(self) -> bool:
        return self.labels is not None and self.class_features is not None

    @cached_property
    def image_ranks(self) -> np.ndarray:
        """How many wrong captions score at least as high as an image's best own one; int64 [n]."""
        return wrong_before_right(self.images, self.captions, self.image_of, self.caption_of, self.chunk)

    @cached_property
    def caption_ranks(self) -> np.ndarray:
        """How many wrong images score at least as high as the best image that carries a caption; int64 [U]."""
        order = np.argsort(self.caption_of, kind="stable")
        return wrong_before_right(self.captions, self.images, self.caption_of[order], self.image_of[order], self.chunk)

    @cached_property
    def similarities(self) -> np.ndarray:
        """The mean cosine of each image and its captions; float32 [n]."""
        return pair_similarities(self.encoded)

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each image is nearer to its class than to all others of its kind; bool [n]. Only with classes."""
        assert self.labels is not None and self.class_features is not None
        labels = torch.as_tensor(np.asarray(self.labels), dtype=torch.long, device=self.images.device)
        classes = self.class_features.to(self.images.device)
        return _classified(self.images, classes, labels, self.chunk, self.class_kinds)

    def captions_of(self, member: np.ndarray) -> np.ndarray:
        """Which captions belong to an image of `member` (bool [n]); bool [U]."""
        chosen = np.zeros(len(self.captions), dtype=bool)
        chosen[self.caption_of[member[self.image_of]]] = True
        return chosen


def wrong_before_right(
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [G, D]
    query_of: np.ndarray,  # [P] ascending: the query ...
    item_of: np.ndarray,  # [P] ... and the gallery item of each matching pair
    chunk: int,
    item_kinds: np.ndarray | None = None,  # [G]
) -> np.ndarray:
    """Count, for each query, the items that do not match it and score at least as high as its best match; int64 [Q].

    Ties (up to `TIE`) count against the model, and so does NaN. A query without a match is behind all G items. With
    `item_kinds`, only items of the kind of a query's matches count.
    """
    kinds = None if item_kinds is None else torch.as_tensor(item_kinds, dtype=torch.int64, device=queries.device)
    ranks = np.empty(len(queries), dtype=np.int64)
    step = max(1, chunk // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        first, last = np.searchsorted(query_of, [start, stop])
        rows = torch.as_tensor(query_of[first:last] - start, dtype=torch.int64, device=queries.device)
        items = torch.as_tensor(item_of[first:last], dtype=torch.int64, device=queries.device)
        similarity = queries[start:stop] @ gallery.T  # [step, G]
        best = similarity.new_full((stop - start,), -torch.inf)
        best.scatter_reduce_(0, rows, similarity[rows, items], "amax")
        similarity[rows, items] = -torch.inf
        if kinds is not None:
            own = torch.zeros(stop - start, dtype=torch.int64, device=queries.device)
            own[rows] = kinds[items]
            similarity.masked_fill_(own[:, None] != kinds, -torch.inf)
        lower = _count_true(similarity <= best[:, None] - TIE)  # [step], the matching items among them
        ranks[start:stop] = len(gallery) - lower
    return ranks


def _count_true(mask: Tensor) -> np.ndarray:  # [n, G] -> int64 [n]
    """Count what is true in each row. On the CPU numpy is several times as fast as torch."""
    return np.count_nonzero(mask.numpy(), axis=1) if mask.device.type == "cpu" else mask.sum(1).cpu().numpy()


def _classified(
    images: Tensor, classes: Tensor, labels: Tensor, chunk: int, class_kinds: np.ndarray | None
) -> np.ndarray:
    """Whether each image is nearer to its class than to every other class of its kind; bool [n]."""
    kinds = None if class_kinds is None else torch.as_tensor(class_kinds, dtype=torch.int64, device=images.device)
    correct = np.empty(len(images), dtype=bool)
    step = max(1, chunk // max(1, len(classes)))
    for start in range(0, len(images), step):
        own = labels[start : start + step, None]  # [step, 1]
        similarity = images[start : start + step] @ classes.T  # [step, C]
        mine = similarity.gather(1, own)
        similarity.scatter_(1, own, -torch.inf)
        if kinds is not None:
            similarity.masked_fill_(kinds[own] != kinds, -torch.inf)
        correct[start : start + step] = (similarity <= mine - TIE).all(1).cpu().numpy()
    return correct
