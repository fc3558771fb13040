"""Hold which image shows which concept and which are forget pairs: the same for every model of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from cliperase_fast.data import PairDataset


@dataclass(frozen=True)
class Layout:
    """Describe the pairs that are scored, without their features.

    A concept is a class; in data without classes every different caption is a concept of its own.

    forget: bool [n], the images of forget pairs.
    names: of the K concepts.
    image_of, concept_of: int64 [P], every (image, concept) pair, ascending by image.
    caption_image_of, caption_of: int64 [Q], every (image, caption) pair for retrieval, ascending by image.
    labels: int64 [n], the class of each image; None where concepts are captions.
    kinds: int64 [K], the kind of each concept (`ClassSpace.kinds`); an image is asked about the kind of its label only.
        None: all are of one kind.
    general: bool [n], the images of classes of the kind "general", which are not facts about somebody; None without.
    entities: int64 [n], whom each pair is about (`PairDataset.entities`); None where the data does not say.
    holdout_entities: the same for the images of each holdout that says so.
    """

    forget: np.ndarray
    names: tuple[Any, ...]
    image_of: np.ndarray
    concept_of: np.ndarray
    caption_image_of: np.ndarray
    caption_of: np.ndarray
    labels: np.ndarray | None
    kinds: np.ndarray | None = None
    general: np.ndarray | None = None
    entities: np.ndarray | None = None
    holdout_entities: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: PairDataset, forget: np.ndarray, holdouts: Mapping[str, PairDataset] | None = None) -> Layout:
        """Return the layout of some pairs. forget: bool [n]. holdouts: further pairs, by name."""
        captions, caption_index = pairs.different_captions()
        images = np.arange(len(pairs))
        image_of = np.repeat(images, [len(rows) for rows in caption_index])
        caption_of = np.concatenate(caption_index) if caption_index else np.zeros(0, dtype=np.int64)
        forget = np.asarray(forget, dtype=bool)
        if pairs.classes is None or pairs.labels is None:
            found = cls(forget, tuple(captions), image_of, caption_of, image_of, caption_of, None)
        else:
            labels = np.asarray(pairs.labels)
            found = cls(forget, pairs.classes, images, labels, image_of, caption_of, labels, pairs.class_kinds)
        others = {name: held.entities for name, held in (holdouts or {}).items() if held.entities is not None}
        return replace(found, general=pairs.general, entities=pairs.entities, holdout_entities=others)

    @property
    def has_classes(self) -> bool:
        return self.labels is not None

    @cached_property
    def strata(self) -> np.ndarray:
        """The class of each image, or 0 for all: scores weight these equally and resample within them; int64 [n]."""
        return np.zeros(len(self.forget), dtype=np.int64) if self.labels is None else self.labels

    @cached_property
    def forget_images(self) -> np.ndarray:
        """Images of forget pairs, int64."""
        return np.flatnonzero(self.forget)

    @cached_property
    def retain_images(self) -> np.ndarray:
        """Images of retain pairs, int64."""
        return np.flatnonzero(~self.forget)

    @cached_property
    def forget_concepts(self) -> np.ndarray:
        """Concepts that an image of a forget pair shows, int64 and sorted."""
        return np.unique(self.concept_of[self.forget[self.image_of]])

    @cached_property
    def other_concepts(self) -> np.ndarray:
        """Concepts that images show, but none of a forget pair, int64 and sorted."""
        return np.setdiff1d(np.unique(self.concept_of), self.forget_concepts)

    @cached_property
    def other_images(self) -> np.ndarray:
        """Images that show no forget concept, int64."""
        shows = np.zeros(len(self.forget), dtype=bool)
        shows[self.image_of[np.isin(self.concept_of, self.forget_concepts)]] = True
        return np.flatnonzero(~shows)

    @property
    def chance(self) -> float:
        """How often a forget image is named by guessing: the mean of 1 / the number of concepts of its kind."""
        if self.kinds is None:
            return 1 / max(1, len(self.names))
        return float(np.mean([1 / (self.kinds == self.kinds[label]).sum() for label in self.forget_concepts]))

    def pairs_among(self, images: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the (image, concept) pairs of some images (ascending), numbered by their place in `images`."""
        images = np.asarray(images)
        mine = np.isin(self.image_of, images)
        return np.searchsorted(images, self.image_of[mine]), self.concept_of[mine]
