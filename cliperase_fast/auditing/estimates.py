"""Estimate values with 95 % bootstrap intervals.

The resampling depends only on the seed and on the sizes of the strata. Two models that are scored on the same pairs
therefore see the same resamples, and the mean over several models has an interval of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from cliperase_fast.auditing.metrics import auc

DRAWS = 1000
LARGEST = 4096  # values of a stratum that are resampled one by one; see `resampled_means`
_COMPARISONS = 2**22  # pairs of a positive and a negative that are resampled one by one; see `auc_estimate`


@dataclass(frozen=True)
class Estimate:
    """Hold a score and its bootstrap distribution.

    value: None where the score does not exist, such as a mean over no pairs.
    draws: float64 [DRAWS], the score of each resample; None where nothing can be resampled.
    notes: more about the score for `to_dict`, ready for JSON.
    """

    value: float | None
    draws: np.ndarray | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 2.5th and 97.5th percentiles of `draws`."""
        if self.value is None or self.draws is None:
            return None
        low, high = np.percentile(self.draws, [2.5, 97.5])
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Return {"value", "low", "high"} and the notes; None for what does not exist."""
        low, high = self.interval or (None, None)
        return {"value": self.value, "low": low, "high": high, **self.notes}


MISSING = Estimate(None)


def missing(reason: str) -> Estimate:
    """Return an estimate without a value, with the reason under "reason"."""
    return Estimate(None, None, {"reason": reason})


def stratified_mean(values: np.ndarray, strata: np.ndarray | None = None, *, seed: int = 0) -> Estimate:
    """Average the values within each stratum, then over the strata, so that every stratum has the same weight.

    values: [n], numbers or bools. strata: integers [n]; None puts all values in one.
    The bootstrap resamples within the strata. A single value, or strata of one value each, has no interval. Without
    values, or with one that is not finite, the estimate is `MISSING`.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0 or not np.isfinite(values).all():
        return MISSING
    groups = [values] if strata is None else [values[strata == stratum] for stratum in np.unique(strata)]
    value = float(np.mean([group.mean() for group in groups]))
    if max(map(len, groups)) < 2:
        return Estimate(value)
    draws = np.mean([resampled_means(group, seed, number) for number, group in enumerate(groups)], axis=0)
    return Estimate(value, draws)


def resampled_means(values: np.ndarray, seed: int, stratum: int) -> np.ndarray:
    """Return the means of `DRAWS` resamples of float64 `values` [n] with replacement; float64 [DRAWS].

    For more than `LARGEST` values, the means are drawn from their limiting normal distribution, whose standard
    deviation is that of the values divided by √n.
    """
    size = len(values)
    if size > LARGEST:
        rng = np.random.default_rng([seed, stratum, size])
        return values.mean() + values.std() / math.sqrt(size) * rng.standard_normal(DRAWS)
    return resampled_counts(size, seed, stratum) @ values / size


@lru_cache(maxsize=16)
def resampled_counts(size: int, seed: int, stratum: int) -> np.ndarray:
    """Count how often each of `size` values occurs in each resample; float32 [DRAWS, size], read-only."""
    rng = np.random.default_rng([seed, stratum, size])
    chosen = rng.integers(0, size, (DRAWS, size)) + size * np.arange(DRAWS)[:, None]
    counts = np.bincount(chosen.ravel(), minlength=DRAWS * size).reshape(DRAWS, size).astype(np.float32)
    counts.flags.writeable = False
    return counts


def auc_estimate(positives: np.ndarray, negatives: np.ndarray, *, seed: int = 0) -> Estimate:
    """Estimate `metrics.auc`, resampling both sets.

    Above `_COMPARISONS` pairs of a positive and a negative, draws come from the normal distribution with the variance
    of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988).
    """
    value = auc(positives, negatives)
    if value is None or not np.isfinite(np.concatenate([positives, negatives])).all():
        return MISSING
    if min(len(positives), len(negatives)) < 2:
        return Estimate(value)
    if len(positives) * len(negatives) > _COMPARISONS:
        spread = _placements(positives, negatives).var(ddof=1) / len(positives)
        spread += _placements(negatives, positives).var(ddof=1) / len(negatives)
        rng = np.random.default_rng([seed, len(positives), len(negatives)])
        return Estimate(value, value + math.sqrt(spread) * rng.standard_normal(DRAWS))
    above = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)  # [m, n]
    first = _counts_of_any_size(len(positives), seed, 0)
    second = _counts_of_any_size(len(negatives), seed, 1)
    return Estimate(value, ((first @ above) * second).sum(1) / above.size)


def _placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each value the share of the others below it, ties counted as half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, side="left") + np.searchsorted(ordered, values, side="right")) / (
        2 * len(others)
    )


def _counts_of_any_size(size: int, seed: int, stratum: int) -> np.ndarray:
    """Return `resampled_counts`; small ones are cached."""
    return (resampled_counts if size <= LARGEST else resampled_counts.__wrapped__)(size, seed, stratum)


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Average the estimates that have a value, such as those of several oracles or data sets.

    Resamples are averaged one by one, so all estimates must come from the same seed.
    """
    known = [estimate for estimate in estimates if estimate.value is not None]
    if not known:
        reasons = [estimate for estimate in estimates if "reason" in estimate.notes]
        return reasons[0] if reasons else MISSING
    value = float(np.mean([estimate.value for estimate in known]))
    draws = [estimate.draws for estimate in known if estimate.draws is not None]
    return Estimate(value, np.mean(draws, axis=0) if len(draws) == len(known) else None)
