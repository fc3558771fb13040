"""The table of metrics: what `evaluate()`, result.json, the terminal table, the report and the docs know about each.

To add a metric, add an entry to `METRICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.queries import QueryResults
from cliperase_fast.terms import nearest_name

LOWER, HIGHER = "lower", "higher"


class Format(NamedTuple):
    """How values are written: `scale` times the value with `digits` decimals, then the unit; changes without it."""

    scale: float
    digits: int
    unit: str


SHARE = Format(100, 1, "%")  # changes are percentage points
COSINE = Format(1, 3, "")


@dataclass(frozen=True)
class Metric:
    """A score of a set of pairs: the mean of one value for each query (image or caption) of the set.

    name: its key in results.
    label: its name for people.
    meaning: what it measures, a phrase without a full stop.
    values: from the queries of the split and the members of the set (bool [n]) to the queries' values, bool or float.
    format: how it is written.
    better: for each set, whether a lower or a higher value is what unlearning aims at.
    needs_classes: whether data without classes has no such score.
    gallery: the count in the scores that says how many items are searched.
    k: of a recall, how many of them may be found; with at most k items it is 1 by definition.
    aliases: names under which older results have it.
    """

    name: str
    label: str
    meaning: str
    values: Callable[[QueryResults, np.ndarray], np.ndarray]
    format: Format = SHARE
    better: Mapping[str, str] = field(default_factory=lambda: {"forget": LOWER, "retain": HIGHER, "all": HIGHER})
    needs_classes: bool = False
    gallery: str = ""
    k: int = 0
    aliases: tuple[str, ...] = ()

    def compute(self, queries: QueryResults, member: np.ndarray) -> float | None:
        """The score of the images in `member` (bool [n]); None for an empty set, a missing need, or NaN."""
        if self.needs_classes and not queries.has_classes:
            return None
        values = self.values(queries, member)
        mean = float(values.mean(dtype=np.float64)) if len(values) else math.nan
        return mean if math.isfinite(mean) else None  # JSON has no NaN

    def read(self, scores: Mapping[str, Any]) -> Any:
        """This metric's value in the scores of a set, also of an older result; None where it has none."""
        return next((scores[name] for name in (self.name, *self.aliases) if name in scores), None)


def _image_recall(k: int) -> Metric:
    return Metric(
        f"image_to_text_r@{k}",
        f"Image to text, R@{k}",
        f"share of images with one of their captions among the {k} nearest" if k > 1 else
        "share of images whose nearest caption is one of their own",
        lambda queries, member: queries.image_ranks[member] < k,
        gallery="gallery_captions",
        k=k,
    )  # fmt: skip


def _caption_recall(k: int) -> Metric:
    return Metric(
        f"text_to_image_r@{k}",
        f"Text to image, R@{k}",
        f"share of captions with an image that carries them among the {k} nearest" if k > 1 else
        "share of captions whose nearest image carries them",
        lambda queries, member: queries.caption_ranks[queries.captions_of(member)] < k,
        gallery="gallery_images",
        k=k,
    )  # fmt: skip


_RECALL_AT = (1, 5, 10)
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "zero_shot_top1",
            "Zero-shot accuracy",
            "share of images whose nearest class is their own",
            lambda queries, member: queries.correct[member],
            needs_classes=True,
            gallery="gallery_classes",
        ),
        *map(_image_recall, _RECALL_AT),
        *map(_caption_recall, _RECALL_AT),
        Metric(
            "association",
            "Association",
            "mean cosine of an image and its captions, from -1 to 1",
            lambda queries, member: queries.similarities[member],
            format=COSINE,
            aliases=("pair_similarity",),
        ),
    )
}
# What a run is judged by: the first of these that the data has.
PRIMARY = ("zero_shot_top1", "image_to_text_r@1")


def find_metric(name: str) -> Metric:
    """Return the metric of this name or alias. Raises `InputError` for an unknown name, with the nearest one."""
    names = {alias: one for one in METRICS.values() for alias in (one.name, *one.aliases)}
    if name not in names:
        hint = nearest_name(name, names) or f"; use one of {', '.join(METRICS)}"
        raise InputError(f"metric {name!r} is not known{hint}")
    return names[name]
