"""Background levels: how similar a model finds an image and a caption that have nothing to do with each other.

How much a distance between cosines means depends on the model, as it predicts by logits, logit scale times cosines. The
cosines of a model with CLIP's scale of 100 lie closely together: of two captions, the right one may be 0.05 ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.evaluation.encoding import EncodedPairs

PART = 1 << 16  # rows summed at a time
WIDE_SCALE = 26.0  # up to this logit scale cosines count as they are
MARGIN = 0.05  # two associations that differ by less count as equal


def closeness(logit_scale: float) -> float:
    """Return how much more a distance between cosines counts than at logit scales up to `WIDE_SCALE`; at least 1."""
    return max(1.0, logit_scale / WIDE_SCALE) if math.isfinite(logit_scale) else 1.0


def association_margin(logit_scale: float) -> float:
    """Return the distance between associations that does not count: 0.05, or 1.3 of logits if that is less."""
    return MARGIN / closeness(logit_scale)


@dataclass(frozen=True)
class ConceptLevels:
    """Means that give the pairs of some concepts levels of their own, and the classes that these are related to."""

    concepts: Tensor  # int64 [C]
    image_means: Tensor  # [C, D]
    text_means: Tensor  # [C, D]
    related: Tensor  # int64 [K], the related classes of all concepts
    related_images: Tensor  # [K, D], their mean image features
    related_weights: Tensor  # [C, K], 1 / R for the R classes that a concept is related to, else 0

    def to(self, like: Tensor) -> ConceptLevels:
        return ConceptLevels(
            self.concepts.to(like.device),
            self.image_means.to(like),
            self.text_means.to(like),
            self.related.to(like.device),
            self.related_images.to(like),
            self.related_weights.to(like),
        )

    def of(self, concepts: Tensor) -> Tensor:
        """Return which row of the means is that of each concept; int64 [n] -> bool [n, C]."""
        return concepts[:, None] == self.concepts.to(concepts.device)


@dataclass(frozen=True)
class Background:
    """The mean features of the retain pairs, from which every image and caption has a background level.

    The level of an image is its mean cosine with the captions of the retain pairs, that of a caption its mean cosine
    with the images of the retain pairs. The means are of normalised features and are not normalised again. Every pair
    counts once; the captions of a pair share its weight.

    own: of the concepts whose pairs have means of their own.
    """

    image_mean: Tensor  # [D], float64 on the CPU, as the others are
    text_mean: Tensor  # [D]
    own: ConceptLevels | None = None

    @classmethod
    def of(cls, encoded: EncodedPairs, retain: np.ndarray) -> Background:
        """Compute the means over the retain pairs of a split. retain: bool [n], at least one is true."""
        rows = np.flatnonzero(retain)
        parts = torch.from_numpy(rows).split(PART)
        images = (encoded.image_features[part] for part in parts)
        return cls.of_rows(images, encoded.caption_features, [encoded.caption_index[row] for row in rows])

    @classmethod
    def of_rows(cls, images: Iterable[Tensor], captions: Tensor, caption_index: Sequence[np.ndarray]) -> Background:
        """Compute the means in float64.

        images: the features of all retain images, in parts. captions: features [U, D]. caption_index: for each retain
        image, the rows of its captions.
        """
        counts = np.array([len(rows) for rows in caption_index], dtype=np.int64)
        weights = np.bincount(
            np.concatenate(caption_index), weights=np.repeat(1 / counts, counts), minlength=len(captions)
        )
        image_sum = sum(part.double().cpu().sum(0) for part in images)
        text_sum = sum(
            torch.from_numpy(weights[start : start + PART]) @ captions[start : start + PART].double().cpu()
            for start in range(0, len(weights), PART)
        )
        assert isinstance(image_sum, Tensor) and isinstance(text_sum, Tensor)
        return cls(image_sum / len(counts), text_sum / len(counts))

    def to(self, like: Tensor) -> Background:
        """Return the background with its means in the dtype and on the device of `like`."""
        own = None if self.own is None else self.own.to(like)
        return Background(self.image_mean.to(like), self.text_mean.to(like), own)

    def of_images(self, image_features: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Return the levels [n] of images [n, D], in the dtype and on the device of the features.

        concepts: int64 [n], the concept of each image's pair.
        """
        own = None if self.own is None else self.own.text_means
        return self._levels(image_features, self.text_mean, own, concepts)

    def of_captions(self, text_features: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Return the levels [n] of captions [n, D], as `of_images` does of images."""
        own = None if self.own is None else self.own.image_means
        return self._levels(text_features, self.image_mean, own, concepts)

    def _levels(self, features: Tensor, mean: Tensor, own_means: Tensor | None, concepts: Tensor | None) -> Tensor:
        levels = features @ mean.to(features)
        if concepts is None or self.own is None or own_means is None:
            return levels
        which = self.own.of(concepts)  # [n, C]
        own = (features @ own_means.to(features).T).masked_fill(~which, 0).sum(1)
        return torch.where(which.any(1), own, levels)

    def association(self, encoded: EncodedPairs, member: np.ndarray, concepts: np.ndarray | None = None) -> float:
        """Return the cosine at which pairs of a split are unrelated to each other.

        It is the mean over the pairs of half the level of the image and half the mean level of its captions. encoded:
        features of the model that the means are of. member: bool [n], at least one is true. concepts: int64 [n].
        """
        rows = np.flatnonzero(member)
        of_rows = None if concepts is None else torch.from_numpy(concepts[rows])
        images = self.of_images(encoded.image_features[torch.from_numpy(rows)].double(), of_rows)
        text = encoded.caption_features.double()
        plain, levels = self.of_captions(text).numpy(), {}
        if concepts is not None and self.own is not None:
            levels = dict(zip(self.own.concepts.tolist(), (text @ self.own.image_means.T).T.numpy(), strict=True))
        own = np.array(
            [
                levels.get(-1 if concepts is None else int(concepts[row]), plain)[encoded.caption_index[row]].mean()
                for row in rows
            ],
            dtype=np.float64,
        )
        return float(images.mean() + own.mean()) / 2
