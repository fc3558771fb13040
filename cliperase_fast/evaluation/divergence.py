"""How far a model has moved from the original on retain pairs, as a divergence of what they predict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.evaluation.encoding import EncodedPairs
from cliperase_fast.evaluation.queries import CHUNK

CAPTIONS = 256  # compared where there are no classes


@dataclass(frozen=True)
class Divergence:
    """KL(original || student) over the retain images of a split, in nats.

    worst_class: the class with the largest mean, None without classes. The errors are standard errors of the means,
    None for the mean of a single image.
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
    over the captions of a class, as in zero-shot classification). Without classes, with a fixed sample of at most 256
    captions of the split's retain pairs. Computed in float64.

    original: features of the original. logit_scale: the original's, exponentiated. pairs: the split. retain: bool [n].
    classes: numbers of the retained classes; by default those of the split's retain pairs. seed: of the sample.
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
        self.labels: np.ndarray | None = None
        self.names = pairs.classes
        if pairs.labels is not None and original.class_features is not None:
            self.labels = np.asarray(pairs.labels)[self.rows]
            columns = np.unique(self.labels) if classes is None else np.unique(classes)
        else:
            used = np.unique(np.concatenate([original.caption_index[row] for row in self.rows]))
            drawn = np.random.default_rng([seed, CAPTIONS]).permutation(len(used))[:CAPTIONS]
            columns = used[np.sort(drawn)]
        self.columns = torch.from_numpy(columns)
        self.original = self._log_probabilities(original, logit_scale)  # [n, C]

    def values(self, encoded: EncodedPairs, logit_scale: float) -> np.ndarray:
        """Return the divergence of each retain image of the split; float64 [n], at least 0 up to rounding."""
        found = np.empty(len(self.rows), dtype=np.float64)
        step = max(1, CHUNK // max(1, len(self.columns)))
        for start in range(0, len(self.rows), step):
            before = self.original[start : start + step]
            after = self._log_probabilities(encoded, logit_scale, start, start + step)
            found[start : start + step] = (before.exp() * (before - after)).sum(1).numpy()
        return found

    def __call__(self, encoded: EncodedPairs, logit_scale: float) -> Divergence:
        """Measure a model. encoded: its features of the split."""
        values = self.values(encoded, logit_scale)
        mean, error = _mean(values)
        if self.labels is None or self.names is None:
            return Divergence(mean, error, len(values))
        by_class = {label: values[self.labels == label] for label in np.unique(self.labels)}
        worst = max(by_class, key=lambda label: float(by_class[label].mean()))
        return Divergence(
            mean, error, len(values), self.names[worst], *_mean(by_class[worst]), worst_pairs=len(by_class[worst])
        )

    def _log_probabilities(
        self, encoded: EncodedPairs, logit_scale: float, start: int = 0, stop: int | None = None
    ) -> Tensor:
        captions = encoded.caption_features if self.labels is None else encoded.class_features
        assert captions is not None
        images = encoded.image_features[torch.from_numpy(self.rows[start:stop])].double()
        return (logit_scale * images @ captions[self.columns].double().T).log_softmax(1)


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean and its standard error."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error
