"""Background levels: how similar a model finds an image and a caption that have nothing to do with each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.evaluation.encoding import EncodedPairs


@dataclass(frozen=True)
class Background:
    """The mean features of the retain pairs, from which every image and caption has a background level.

    The level of an image is its mean cosine with the captions of the retain pairs, that of a caption its mean cosine
    with the images of the retain pairs. The means are of normalised features and are not normalised again. Every pair
    counts once; the captions of a pair share its weight.
    """

    image_mean: Tensor  # [D], float64 on the CPU
    text_mean: Tensor  # [D], float64 on the CPU

    @classmethod
    def of(cls, encoded: EncodedPairs, retain: np.ndarray) -> Background:
        """Compute the means over the retain pairs of a split in float64. retain: bool [n], at least one is true."""
        rows = np.flatnonzero(retain)
        weights = np.zeros(len(encoded.caption_features), dtype=np.float64)
        for row in rows:
            captions = encoded.caption_index[row]
            np.add.at(weights, captions, 1 / len(captions))
        image_sum = torch.zeros(encoded.image_features.shape[1], dtype=torch.float64, device="cpu")
        for part in torch.from_numpy(rows).split(1 << 16):
            image_sum += encoded.image_features[part].double().sum(0)
        text_sum = torch.zeros(encoded.caption_features.shape[1], dtype=torch.float64, device="cpu")
        for start in range(0, len(weights), 1 << 16):
            part = slice(start, start + (1 << 16))
            text_sum += torch.from_numpy(weights[part]) @ encoded.caption_features[part].double()
        return cls(image_sum / len(rows), text_sum / len(rows))

    def of_images(self, image_features: Tensor) -> Tensor:
        """Return the levels [n] of images [n, D], in the dtype and on the device of the features."""
        return image_features @ self.text_mean.to(image_features)

    def of_captions(self, text_features: Tensor) -> Tensor:
        """Return the levels [n] of captions [n, D], in the dtype and on the device of the features."""
        return text_features @ self.image_mean.to(text_features)

    def association(self, encoded: EncodedPairs, member: np.ndarray) -> float:
        """Return the cosine at which pairs of a split are unrelated to each other.

        It is the mean over the pairs of half the level of the image and half the mean level of its captions. encoded:
        features of the model that the means are of. member: bool [n], at least one is true.
        """
        rows = np.flatnonzero(member)
        images = self.of_images(encoded.image_features[torch.from_numpy(rows)].double())
        captions = self.of_captions(encoded.caption_features.double()).numpy()
        own = np.array([captions[encoded.caption_index[row]].mean() for row in rows], dtype=np.float64)
        return float(images.mean() + own.mean()) / 2
