"""The scores of a split, for its forget and its retain pairs, by the table of metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.evaluation.encoding import EncodedPairs
from cliperase_fast.evaluation.metrics import METRICS
from cliperase_fast.evaluation.queries import CHUNK, QueryResults


def score(
    encoded: EncodedPairs,
    pairs: PairDataset,
    forget_mask: np.ndarray | None = None,
    class_features: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """Compute the scores of the forget and of the retain pairs, ready for JSON.

    forget_mask: bool [n]; without it all pairs form one set, "all".
    class_features: [C, D], unit rows, in the order of `pairs.classes`; without it those of `encoded`. Where the data
        has kinds of classes (`ClassSpace.kinds`), an image is compared with the classes of its own class's kind.
    device: where the similarities are computed, in float32.
    chunk: similarities held at once.

    Returns {"forget": set, "retain": set, "per_class": {name: {"set", "pairs", "accuracy"}}}. A set holds `pairs`, its
    number of images; `gallery_captions` and `gallery_images`, the numbers of items that retrieval searches;
    `gallery_classes`, the number of classes that an image is compared with (at most, where they have kinds); and each
    metric of `cliperase_fast.evaluation.METRICS`: fractions from 0 to 1, and cosines. A score is None for an empty set,
    where the data lacks what it needs (classes), and where a feature is NaN.

    Retrieval queries of a set search all captions, or all images, of `pairs` (as for Flickr30K: Karpathy and Fei-Fei,
    arXiv 1412.2306). A gallery of at most k items gives recall 1 at k. A query hits at k only if fewer than k wrong
    items score at least as high as its best right one (equal up to 1e-6), and an image is classified only if no other
    class scores as high. Features that all collapsed to one point therefore score 0, not 1.
    """
    if class_features is None:
        class_features = encoded.class_features
    queries = QueryResults(
        encoded, pairs.labels, class_features, class_kinds=pairs.class_kinds, device=device, chunk=chunk
    )
    members = {"all": np.ones(len(encoded), dtype=bool)}
    if forget_mask is not None:
        forget_mask = np.asarray(forget_mask, dtype=bool)
        members = {"forget": forget_mask, "retain": ~forget_mask}
    scores: dict[str, Any] = {
        name: {
            "pairs": int(member.sum()),
            "gallery_captions": len(queries.captions),
            "gallery_images": len(queries.images),
            "gallery_classes": _classes_compared(queries, member),
            **{metric.name: metric.compute(queries, member) for metric in METRICS.values()},
        }
        for name, member in members.items()
    }
    scores["per_class"] = _per_class(pairs, queries.correct, forget_mask) if queries.has_classes else {}
    return scores


def _classes_compared(queries: QueryResults, member: np.ndarray) -> int | None:
    """Return with how many classes an image of a set is compared at most; None without classes or images."""
    if queries.labels is None or queries.class_features is None or not member.any():
        return None
    kinds = queries.class_kinds
    if kinds is None:
        return len(queries.class_features)
    return int(np.bincount(kinds)[kinds[queries.labels[member]]].max())


def _per_class(pairs: PairDataset, correct: np.ndarray, forget_mask: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """Count by class name. The set of a class with both forget and retain pairs is "mixed"; classes without pairs are
    left out."""
    assert pairs.classes is not None
    assert pairs.labels is not None
    labels = np.asarray(pairs.labels)
    count = len(pairs.classes)
    total = np.bincount(labels, minlength=count)
    right = np.bincount(labels[correct], minlength=count)
    forgotten = (
        np.zeros(count, dtype=np.int64) if forget_mask is None else np.bincount(labels[forget_mask], minlength=count)
    )
    table = {}
    for label, name in enumerate(pairs.classes):
        if total[label] == 0:
            continue
        if forget_mask is None:
            belongs = "all"
        elif forgotten[label] == 0:
            belongs = "retain"
        else:
            belongs = "forget" if forgotten[label] == total[label] else "mixed"
        table[name] = {
            "set": belongs,
            "pairs": int(total[label]),
            "accuracy": int(right[label]) / int(total[label]),
        }
    return table
