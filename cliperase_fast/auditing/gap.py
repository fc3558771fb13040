"""Measure how far an unlearned model is from models that never saw the forget pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from cliperase_fast.auditing.estimates import Estimate
from cliperase_fast.evaluation import association_margin
from cliperase_fast.report.audit_scores import SCORES

Scores = Mapping[str, Mapping[str, Estimate]]  # by group and name

IN_MEAN = tuple(name for name, score in SCORES.items() if score.in_mean)


def gaps(after: Scores, target: Scores) -> dict[str, float | None]:
    """Return |after - target| of every score that both have, and "mean" over those of `IN_MEAN`."""
    first, second = _values(after), _values(target)
    found: dict[str, float | None] = {name: abs(first[name] - second[name]) for name in first if name in second}
    return {**found, "mean": _mean_gap(after, target)}


def noise_floor(oracles: Sequence[Scores]) -> tuple[float | None, dict[str, float]]:
    """Return the mean gap between two oracles, and that of each score. None with fewer than two oracles."""
    pairs = list(combinations(oracles, 2))
    means = [mean for first, second in pairs if (mean := _mean_gap(first, second)) is not None]
    by_score: dict[str, list[float]] = {}
    for first, second in pairs:
        for name, value in gaps(first, second).items():
            if value is not None and name != "mean":
                by_score.setdefault(name, []).append(value)
    return float(np.mean(means)) if means else None, {name: float(np.mean(found)) for name, found in by_score.items()}


def tug_of_war(after: Mapping[str, float], target: Mapping[str, float]) -> float:
    """Return Π (1 - |after - target|) over accuracies: 1 if the model behaves like the oracles, 0 at worst.

    after, target: zero-shot accuracy on the forget training pairs, the retain training pairs and the test pairs.
    """
    return float(np.prod([1 - abs(after[name] - target[name]) for name in target]))


def background(before: Scores) -> float | None:
    """Return the mean cosine of unrelated pairs in the original: the mean of `image_side` and `text_side`.

    This is the mean over forget images and forget captions of (b_i + b'_j) / 2, with b_i the cosine of the image with
    the mean caption of the other concepts and b'_j that of the caption with the mean other image.
    """
    sides = [before["collateral"][name].value for name in ("image_side", "text_side")]
    known = [side for side in sides if side is not None]
    return float(np.mean(known)) if known else None


def over_forgotten_below(oracles: Sequence[Scores], level: float | None, logit_scale: float) -> float | None:
    """Return the association below which a model is over-forgotten: not knowing the concept does not explain it.

    With oracles: a margin below the lowest of them. Without: two margins below the background `level` of the original.
    None where neither is known. logit_scale: the original's, for `association_margin`.
    """
    margin = association_margin(logit_scale)
    known = [value for oracle in oracles if (value := oracle["forgetting"]["association"].value) is not None]
    if known:
        return min(known) - margin
    return None if level is None else level - 2 * margin


def _values(scores: Scores) -> dict[str, float]:
    return {
        name: estimate.value
        for group in scores.values()
        for name, estimate in group.items()
        if estimate.value is not None
    }


def _mean_gap(after: Scores, target: Scores) -> float | None:
    first, second = _values(after), _values(target)
    found = [abs(first[name] - second[name]) for name in IN_MEAN if name in first and name in second]
    return float(np.mean(found)) if found else None
