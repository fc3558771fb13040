"""Zero-shot accuracy and retrieval recall from features, counted exactly, in pieces that fit in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.evaluation.encoding import EncodedPairs, matching, pair_similarities

# Cosines closer than this count as equal: the float32 rounding of a dot product of unit vectors stays below
# it, so equal features tie wherever they stand in a matrix.
TIE = 1e-6
RECALL_AT = (1, 5, 10)
CHUNK = 2**24  # similarities held at once: 64 MiB


def score(
    encoded: EncodedPairs,
    pairs: PairDataset,
    forget_mask: np.ndarray | None = None,
    class_features: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    chunk: int = CHUNK,
) -> dict[str, Any]:
    """Scores of the forget and of the retain pairs, as fractions from 0 to 1, ready for JSON.

    forget_mask: bool [n]; without it all pairs make one set, "all".
    class_features: [C, D], unit rows, in the order of `pairs.classes`; without it those of `encoded`.
    device: where the similarities are computed, in float32.
    chunk: similarities held at once.

    Returns {"forget": set, "retain": set, "per_class": {name: {"set", "pairs", "accuracy"}}}, a set being

    - pairs: images in the set; gallery_captions, gallery_images: what retrieval chooses from;
    - zero_shot_top1: the share of images nearer to their own class than to every other; None without classes;
    - image_to_text_r@k: the share of the set's images with one of their captions among the k nearest of all
      different captions of `pairs`;
    - text_to_image_r@k: the share of the different captions of the set's images with an image that carries
      the caption among the k nearest of all images of `pairs`;
    - pair_similarity: the mean cosine of an image and its captions.

    Recall as in CLIP-style retrieval (Flickr30K: Karpathy and Fei-Fei, arXiv 1412.2306). A
    gallery of at most k gives recall 1 by this definition. An empty set's scores are None.

    Ties count against the model: a query hits at k only if fewer than k wrong items score at least as high as
    its best right one (equal up to 1e-6), and an image is classified only if no other class scores as high.
    Features that all collapsed to one point therefore score 0, not 1. A NaN similarity is never a hit, and a
    mean with NaN in it is None.
    """
    image_of, caption_of = matching(encoded)
    images, captions = encoded.image_features.to(device), encoded.caption_features.to(device)
    by_caption = np.argsort(caption_of, kind="stable")
    image_ranks = _wrong_before_right(images, captions, image_of, caption_of, chunk)  # [n]
    caption_ranks = _wrong_before_right(captions, images, caption_of[by_caption], image_of[by_caption], chunk)  # [U]
    similarities = pair_similarities(encoded)  # [n]
    if class_features is None:
        class_features = encoded.class_features
    correct = None
    if class_features is not None and pairs.labels is not None:
        labels = torch.as_tensor(np.asarray(pairs.labels), dtype=torch.long, device=images.device)
        correct = _classified(images, class_features.to(device), labels, chunk)  # [n]

    members = {"all": np.ones(len(encoded), dtype=bool)}
    if forget_mask is not None:
        forget_mask = np.asarray(forget_mask, dtype=bool)
        members = {"forget": forget_mask, "retain": ~forget_mask}
    scores: dict[str, Any] = {}
    for name, member in members.items():
        asked = np.zeros(len(captions), dtype=bool)
        asked[caption_of[member[image_of]]] = True
        scores[name] = {
            "pairs": int(member.sum()),
            "gallery_captions": len(captions),
            "gallery_images": len(images),
            "zero_shot_top1": None if correct is None else _share(correct[member]),
            **{f"image_to_text_r@{k}": _share(image_ranks[member] < k) for k in RECALL_AT},
            **{f"text_to_image_r@{k}": _share(caption_ranks[asked] < k) for k in RECALL_AT},
            "pair_similarity": _mean(similarities[member]),
        }
    scores["per_class"] = {} if correct is None else _per_class(pairs, correct, forget_mask)
    return scores


def _wrong_before_right(
    queries: Tensor,  # [Q, D]
    gallery: Tensor,  # [G, D]
    query_of: np.ndarray,  # [P] ascending: the query ...
    item_of: np.ndarray,  # [P] ... and the gallery item of each matching pair
    chunk: int,
) -> np.ndarray:
    """For each query, how many items that do not match it score at least as high as its best matching one;
    int64 [Q]."""
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
        lower = (similarity <= best[:, None] - TIE).sum(1)  # [step], the matching items among them
        ranks[start:stop] = (len(gallery) - lower).cpu().numpy()
    return ranks


def _classified(images: Tensor, classes: Tensor, labels: Tensor, chunk: int) -> np.ndarray:
    """Whether each image is nearer to its class than to every other class; bool [n]."""
    correct = np.empty(len(images), dtype=bool)
    step = max(1, chunk // max(1, len(classes)))
    for start in range(0, len(images), step):
        own = labels[start : start + step, None]  # [step, 1]
        similarity = images[start : start + step] @ classes.T  # [step, C]
        mine = similarity.gather(1, own)
        similarity.scatter_(1, own, -torch.inf)
        correct[start : start + step] = (similarity <= mine - TIE).all(1).cpu().numpy()
    return correct


def _share(hits: np.ndarray) -> float | None:
    return int(hits.sum()) / len(hits) if len(hits) else None


def _mean(values: np.ndarray) -> float | None:
    mean = float(values.mean(dtype=np.float64)) if len(values) else math.nan
    return mean if math.isfinite(mean) else None  # JSON knows no NaN


def _per_class(pairs: PairDataset, correct: np.ndarray, forget_mask: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """By class name; a class with forget and retain pairs belongs to the set "mixed". Classes without pairs
    are left out."""
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
