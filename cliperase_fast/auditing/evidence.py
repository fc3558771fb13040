"""What the audit's page shows beside the scores: histograms of cosines, and the accuracy of each class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cliperase_fast.auditing import metrics
from cliperase_fast.auditing.scores import View

BIN_WIDTH = 0.005  # of a histogram of cosines; the page joins neighbouring bins


def evidence(views: Mapping[str, View]) -> dict[str, Any]:
    """Everything for the page that the scores do not hold, ready for JSON.

    views: of the models by name, all on the same pairs; the names of oracles start with "oracle".
    Returns {"similarities": {model: `similarities`}, "per_class": `per_class`}.
    """
    return {
        "similarities": {name: similarities(view) for name, view in views.items()},
        "per_class": per_class(views),
    }


def similarities(view: View) -> dict[str, dict[str, Any]]:
    """Histograms of the cosines of images with their own captions: "forget", "retain", and "other" where there is
    other data.

    The own caption is that of the class; without classes the mean over the image's captions counts. "other" has the
    images of the `other` data sets, whose concepts were never trained, with the captions of their own classes.
    See `histogram`; classes weigh the same in its mean.
    """
    layout, features = view.layout, view.features
    found = {}
    for name, images in (("forget", layout.forget_images), ("retain", layout.retain_images)):
        pairs = layout.pairs_among(images)
        cosines = metrics.own_cosines(features.images[images], features.concepts, *pairs)
        found[name] = histogram(cosines, layout.strata[images])
    if features.other:
        parts, labels, first = [], [], 0
        for unknown, classes, own in features.other.values():
            parts.append(metrics.own_cosines(unknown, classes, np.arange(len(unknown)), own))
            labels.append(own + first)
            first += len(classes)
        found["other"] = histogram(np.concatenate(parts), np.concatenate(labels))
    return found


def histogram(cosines: np.ndarray, strata: np.ndarray) -> dict[str, Any]:
    """Count float cosines [n] in bins of `BIN_WIDTH`.

    Returns "counts" of the bins from the first to the last that is not empty, "low" (the lower end of the first),
    "width" (of a bin), and "mean", over the strata (integers [n]) of their means; None without cosines.
    """
    if len(cosines) == 0:
        return {"low": 0.0, "width": BIN_WIDTH, "counts": [], "mean": None}
    bins = np.floor(cosines / BIN_WIDTH).astype(np.int64)
    first = int(bins.min())
    means = [cosines[strata == stratum].mean() for stratum in np.unique(strata)]
    return {
        "low": round(first * BIN_WIDTH, 6),
        "width": BIN_WIDTH,
        "counts": np.bincount(bins - first).tolist(),
        "mean": float(np.mean(means)),
    }


def per_class(views: Mapping[str, View]) -> dict[str, dict[str, Any]]:
    """The zero-shot accuracy of each class on its test images, in the order of the classes; empty without classes.

    {class: {"set", "pairs", "before", "after"}}, and with oracles "oracle", the mean of theirs. set: "forget", "retain"
    or "mixed", for a class with pairs of both. pairs: the number of its test images. Classes without any are left out.
    """
    layout = next(iter(views.values())).layout
    if layout.labels is None:
        return {}
    oracles = [view.correct for name, view in views.items() if name.startswith("oracle")]
    correct = {name: views[name].correct.astype(np.float64) for name in ("before", "after")}
    if oracles:
        correct["oracle"] = np.mean(oracles, axis=0)
    found = {}
    order = np.argsort(layout.labels, kind="stable")
    labels, starts = np.unique(layout.labels[order], return_index=True)
    for label, members in zip(labels, np.split(order, starts[1:]), strict=True):
        forget = layout.forget[members]
        found[str(layout.names[label])] = {
            "set": "forget" if forget.all() else "mixed" if forget.any() else "retain",
            "pairs": len(members),
            **{model: float(hits[members].mean()) for model, hits in correct.items()},
        }
    return found
