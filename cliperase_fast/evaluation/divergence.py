"""Measure how far a model has moved from the original on retain pairs, as a divergence of their predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.evaluation.encoding import EncodedPairs
from cliperase_fast.evaluation.queries import CHUNK

CAPTIONS = 256  # at most compared in data without classes
LEAST_SCALE = 5.0  # a softmax over smaller multiples of cosines is nearly flat, whatever the model predicts
LEAST_PAIRS = 4  # of a class that is judged on its own


@dataclass(frozen=True)
class Divergence:
    """How far the retain images of a split have moved, in nats: the mean of `DivergenceMeter.values`.

    worst_class: the class with the largest mean less its standard error, None without classes. Classes of fewer than
    `LEAST_PAIRS` images are judged together, as their own means tell little. The errors are standard errors of the
    means, None for the mean of a single image.
    """

    mean: float
    error: float | None
    pairs: int
    worst_class: str | None = None
    worst_mean: float | None = None
    worst_error: float | None = None
    worst_pairs: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class DivergenceMeter:
    """Compares models with the original on the retain images of a split.

    Each image has a distribution: the softmax of the scaled cosines with the captions of the retained classes (averaged
    over the captions of a class, as in zero-shot classification). Where classes have kinds, those of the kind of the
    image's class count. Without classes, a fixed sample of at most 256 captions of the split's retain pairs takes their
    place. The divergence of an image is

        KL(original || student) + max(0, log((1 - f°) / (1 - f))),

    where f is the probability of the forgotten captions (at most 256 without classes) if they are added to the softmax,
    and f° that of the original. An image that moves to a forgotten caption counts, and one that leaves it does not.
    Computed in float64. If the original's scale is less than `LEAST_SCALE`, all scales are multiplied up to there.

    original: features of the original. logit_scale: the original's, exponentiated. pairs: the split. retain: bool [n].
    classes: numbers of the retained classes; by default those of the split's retain pairs. seed: of the samples.
    """

    def __init__(
        self,
        original: EncodedPairs,
        logit_scale: float,
        pairs: PairDataset,
        retain: np.ndarray,
        *,
        classes: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = np.flatnonzero(retain)
        self.sharpness = max(1.0, LEAST_SCALE / max(logit_scale, 1e-6))
        self.labels: np.ndarray | None = None
        self.names = pairs.classes
        if pairs.labels is not None and original.class_features is not None:
            labels = np.asarray(pairs.labels)
            self.labels = labels[self.rows]
            columns = np.unique(self.labels) if classes is None else np.unique(classes)
            forgotten = np.setdiff1d(labels[~retain], columns)
        else:
            columns = _captions(original, self.rows)
            forgotten = np.setdiff1d(_captions(original, np.flatnonzero(~retain)), columns)
            columns, forgotten = (_sample(found, seed) for found in (columns, forgotten))
        self.columns, self.forgotten = torch.from_numpy(columns), torch.from_numpy(forgotten)
        kinds = None if self.labels is None else pairs.class_kinds
        self.kinds = None if kinds is None else torch.from_numpy(np.asarray(kinds, dtype=np.int64))  # [K]
        self.original = self._log_probabilities(original, logit_scale)

    def values(self, encoded: EncodedPairs, logit_scale: float) -> np.ndarray:
        """Return the divergence of each retain image of the split; float64 [n], at least 0 up to rounding."""
        found = np.empty(len(self.rows), dtype=np.float64)
        step = max(1, CHUNK // max(1, len(self.columns) + len(self.forgotten)))
        for start in range(0, len(self.rows), step):
            before, kept_before = (rows[start : start + step] for rows in self.original)
            after, kept = self._log_probabilities(encoded, logit_scale, start, start + step)
            moved = (kept_before - kept).clamp_min(0)
            found[start : start + step] = ((before.exp() * (before - after)).sum(1) + moved).numpy()
        return found

    def __call__(self, encoded: EncodedPairs, logit_scale: float) -> Divergence:
        """Measure a model. encoded: its features of the split."""
        values = self.values(encoded, logit_scale)
        mean, error = _mean(values)
        if self.labels is None or self.names is None:
            return Divergence(mean, error, len(values))
        by_class = self._by_class(values)
        found = {name: _mean(of) for name, of in by_class.items()}
        worst = max(found, key=lambda name: lower_bound(*found[name]))
        return Divergence(mean, error, len(values), worst, *found[worst], worst_pairs=len(by_class[worst]))

    def _by_class(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of each class, and together those of classes with few images."""
        assert self.labels is not None and self.names is not None
        numbers, counts = np.unique(self.labels, return_counts=True)
        small = numbers[counts < LEAST_PAIRS]
        found = {self.names[label]: values[self.labels == label] for label in np.setdiff1d(numbers, small)}
        if len(small) == 1:
            found[self.names[small[0]]] = values[self.labels == small[0]]
        elif len(small) > 1:
            found[f"{len(small)} classes of fewer than {LEAST_PAIRS} pairs"] = values[np.isin(self.labels, small)]
        return found

    def _log_probabilities(
        self, encoded: EncodedPairs, logit_scale: float, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the probabilities [n, C] of the retained captions among themselves, and of their sum
        [n] among all captions."""
        captions = encoded.caption_features if self.labels is None else encoded.class_features
        assert captions is not None
        images = self.sharpness * logit_scale * encoded.image_features[torch.from_numpy(self.rows[start:stop])].double()
        logits, others = (
            self._of_own_kind(images @ captions[some].double().T, some, start, stop)
            for some in (self.columns, self.forgotten)
        )
        own = logits.logsumexp(1)  # [n]
        return logits - own[:, None], own - torch.logaddexp(own, others.logsumexp(1))

    def _of_own_kind(self, logits: Tensor, classes: Tensor, start: int, stop: int | None) -> Tensor:
        """Take classes of another kind than the image's out of the softmax. logits: [n, C]."""
        if self.kinds is None or self.labels is None:
            return logits
        own = self.kinds[torch.from_numpy(self.labels[start:stop])]  # [n]
        # Finite, so that the difference of two such entries is 0.
        return logits.masked_fill(self.kinds[classes] != own[:, None], torch.finfo(logits.dtype).min)


def _captions(encoded: EncodedPairs, rows: np.ndarray) -> np.ndarray:
    """Return the captions of these images."""
    return np.unique(np.concatenate([encoded.caption_index[row] for row in rows])) if len(rows) else rows


def _sample(captions: np.ndarray, seed: int) -> np.ndarray:
    drawn = np.random.default_rng([seed, CAPTIONS]).permutation(len(captions))[:CAPTIONS]
    return captions[np.sort(drawn)]


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and its standard error."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def lower_bound(mean: float, error: float | None) -> float:
    """Return a mean less its standard error where that is known; infinity for a mean that is not a number."""
    return mean - (error or 0.0) if np.isfinite(mean) else float("inf")
