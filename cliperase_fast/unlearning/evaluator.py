"""Scores of a model on a split, and the evidence that the report is made from."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cliperase_fast.data.loading import PixelCache
from cliperase_fast.evaluation import (
    Divergence,
    DivergenceMeter,
    EncodedPairs,
    Unchanged,
    encode_pairs,
    pair_similarities,
    require_finite,
    score,
)
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Candidate
from cliperase_fast.unlearning.splits import Split


class Evaluator:
    """Encodes and scores models on a split, and counts the seconds this takes."""

    def __init__(self, runtime: Runtime, cache: PixelCache | None) -> None:
        self.runtime, self.cache, self.seconds = runtime, cache, 0.0
        self._reused: tuple[ClipAdapter, Split, Unchanged] | None = None

    def recompute(self) -> None:
        """End `reuse`."""
        self._reused = None

    def reuse(self, student: ClipAdapter, part: Split, *, text: bool, front: FrozenFront | None) -> None:
        """Compute frozen parts once for a split that every evaluation encodes.

        text: whether the text tower is not trained. front: of the image tower, None if all of it is trained. Its output
        takes the place of the images in the cache if there is room. Holds until `recompute`.
        """
        if self.cache is None:
            front = None
        budget = self.cache.room_without(part.pairs) if self.cache is not None else 0
        self._reused = student, part, Unchanged(text, front, budget)

    def encode(self, adapter: ClipAdapter, part: Split, finite: bool = False) -> EncodedPairs:
        began = time.perf_counter()
        unchanged = self._unchanged_of(adapter, part)
        kept = unchanged is not None and unchanged.complete
        encoded = encode_pairs(
            adapter,
            part.pairs,
            batch_size=self.runtime.batch_size,
            device=self.runtime.device,
            precision=self.runtime.precision,
            num_workers=self.runtime.num_workers,
            progress=self.runtime.progress,
            ranks=self.runtime.ranks,
            cache=self.cache,
            unchanged=unchanged,
        )
        if unchanged is not None and unchanged.complete and not kept and self.cache is not None:
            self.cache.drop(part.pairs, reserve=unchanged.size)
        if finite:
            require_finite(encoded, part.pairs)
        self.seconds += time.perf_counter() - began
        return encoded

    def _unchanged_of(self, adapter: ClipAdapter, part: Split) -> Unchanged | None:
        student, split, unchanged = self._reused or (None, None, None)
        return unchanged if adapter is student and part is split else None

    def score(self, encoded: EncodedPairs, part: Split) -> dict[str, Any]:
        began = time.perf_counter()
        scores = self.runtime.ranks.run_on_first(
            lambda: score(encoded, part.pairs, part.forget_mask, device=self.runtime.device)
        )
        self.seconds += time.perf_counter() - began
        return scores

    def candidate(
        self, encoded: EncodedPairs, part: Split, step: int, epoch: int, divergence: Divergence | None = None
    ) -> Candidate:
        """Summarise the scores of a split. Where the divergence was measured, scores that are missing become NaN."""
        scores = self.score(encoded, part)
        name = "zero_shot_top1" if part.pairs.classes is not None else "image_to_text_r@1"
        found = [scores["forget"][name], scores["retain"][name], scores["forget"]["association"]]
        if divergence is not None:
            found = [math.nan if value is None else value for value in found]
        forget, retain, association = found
        error = 0.0 if divergence is None else self._association_error(encoded, part)
        return Candidate(step, epoch, forget, retain, association, divergence, error)

    def _association_error(self, encoded: EncodedPairs, part: Split) -> float:
        """Return the standard error of the mean cosine of the forget pairs, 0 for fewer than two."""
        if part.n_forget < 2:
            return 0.0
        found = self.runtime.ranks.run_on_first(lambda: pair_similarities(encoded)[part.forget_mask])
        return float(found.std(ddof=1)) / math.sqrt(part.n_forget)

    def divergence(self, adapter: ClipAdapter, encoded: EncodedPairs, meter: DivergenceMeter) -> Divergence:
        """Measure how far a model has moved. encoded: its features of the meter's split."""
        scale = float(adapter.logit_scale().detach())
        began = time.perf_counter()
        found = self.runtime.ranks.run_on_first(lambda: meter(encoded, scale))
        self.seconds += time.perf_counter() - began
        return found


def lowest(evaluations: Sequence[Candidate]) -> dict[str, Any]:
    """Return the scores of the evaluation with the lowest forget score, whatever its retain score."""
    least = min(evaluations, key=lambda candidate: (candidate.forget, -candidate.retain))
    return {"epoch": least.epoch, "forget": least.forget, "retain": least.retain}


def per_class(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {"set": row["set"], "pairs": row["pairs"], "before": row["accuracy"], "after": after[name]["accuracy"]}
        for name, row in before.items()
    }


def by_set(values: np.ndarray, part: Split) -> dict[str, np.ndarray]:
    return {"forget": values[part.forget_mask], "retain": values[~part.forget_mask]}


def embeddings(before: EncodedPairs, after: EncodedPairs, part: Split, seed: int) -> dict[str, Any]:
    """Return the image features of at most 600 test images, up to 200 of them of forget pairs, with sets and labels."""
    generator = np.random.default_rng(seed)
    forget = generator.permutation(part.n_forget)[:200]
    retain = part.n_forget + generator.permutation(len(part.pairs) - part.n_forget)[: 600 - len(forget)]
    chosen = np.sort(np.concatenate([forget, retain]))
    labels, classes = part.pairs.labels, part.pairs.classes
    if labels is None or classes is None:
        names = [part.pairs.ids[index] for index in chosen]
    else:
        names = [classes[labels[index]] for index in chosen]
    return {
        "embeddings": {
            "before": np.asarray(before.image_features)[chosen],
            "after": np.asarray(after.image_features)[chosen],
        },
        "embedding_sets": ["forget" if index < part.n_forget else "retain" for index in chosen],
        "embedding_labels": names,
    }
