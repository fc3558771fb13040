"""Background levels: how similar a model finds an image and a caption that have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.evaluation.encoding import EncodedPairs

PART = 1 << 16  # rows summed at a time


@dataclass(frozen=True)
class Background:
    """The mean features of the retain pairs, from which every image and caption has a background level.

    The level of an image is its mean cosine with the captions of the retain pairs, that of a caption its mean cosine
    with the images of the retain pairs. The means are of normalised features and are not normalised again. Every pair
    counts once; the captions of a pair share its weight.

    of_concepts: the means that take their place for the pairs of some concepts.
    """

    image_mean: Tensor  # [D], float64 on the CPU
    text_mean: Tensor  # [D], float64 on the CPU
    of_concepts: Mapping[int, Background] = field(default_factory=dict)

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

    def of_images(self, image_features: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Return the levels [n] of images [n, D], in the dtype and on the device of the features.

        concepts: int64 [n], the concept of each image's pair.
        """
        levels = image_features @ self.text_mean.to(image_features)
        if concepts is not None:
            for concept, own in self.of_concepts.items():
                levels = torch.where(concepts == concept, own.of_images(image_features), levels)
        return levels

    def of_captions(self, text_features: Tensor, concepts: Tensor | None = None) -> Tensor:
        """Return the levels [n] of captions [n, D], as `of_images` does of images."""
        levels = text_features @ self.image_mean.to(text_features)
        if concepts is not None:
            for concept, own in self.of_concepts.items():
                levels = torch.where(concepts == concept, own.of_captions(text_features), levels)
        return levels

    def association(self, encoded: EncodedPairs, member: np.ndarray, concepts: np.ndarray | None = None) -> float:
        """Return the cosine at which pairs of a split are unrelated to each other.

        It is the mean over the pairs of half the level of the image and half the mean level of its captions. encoded:
        features of the model that the means are of. member: bool [n], at least one is true. concepts: int64 [n].
        """
        rows = np.flatnonzero(member)
        of_rows = None if concepts is None else torch.from_numpy(concepts[rows])
        images = self.of_images(encoded.image_features[torch.from_numpy(rows)].double(), of_rows)
        text = encoded.caption_features.double()
        plain = self.of_captions(text).numpy()
        levels = {concept: own.of_captions(text).numpy() for concept, own in self.of_concepts.items()}
        own = np.array(
            [
                levels.get(-1 if concepts is None else int(concepts[row]), plain)[encoded.caption_index[row]].mean()
                for row in rows
            ],
            dtype=np.float64,
        )
        return float(images.mean() + own.mean()) / 2
