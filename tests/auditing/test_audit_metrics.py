"""Areas, rates, thresholds and resampled ranks are their definitions, ties included."""

import numpy as np
import pytest
import torch

from cliperase_fast.auditing import estimates, gap, metrics
from cliperase_fast.auditing.estimates import Estimate, auc_estimate, mean_estimate


def test_the_area_counts_ties_as_half():
    assert metrics.auc(np.ones(3), np.ones(4)) == 0.5
    rng = np.random.default_rng(0)
    positives, negatives = rng.integers(0, 5, 20) / 4, rng.integers(0, 5, 30) / 4
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert metrics.auc(positives, negatives) == pytest.approx(np.mean(wins))


def test_positives_must_exceed_the_threshold_that_a_hundredth_of_the_negatives_exceed():
    negatives = np.arange(1000.0)
    assert metrics.true_positive_rate(np.array([988.5, 989.0, 989.5, 2000.0]), negatives, 0.01) == 0.5
    assert metrics.true_positive_rate(np.ones(5), np.ones(1000), 0.01) == 0


def test_pairs_are_told_apart_by_the_threshold_of_the_other_half():
    true, shuffled = np.array([0.9, 0.4, 0.8, 0.3]), np.array([0.5, 0.1, 0.6, 0.2])
    # 0.7 of the first half refuses all pairs of the second; 0.25 of the second accepts all pairs of the first.
    assert metrics.separability(true, shuffled) == 0.5
    assert metrics.separability(np.ones(6), np.ones(6)) == 0.5


def test_a_resampled_rank_counts_ties_against_the_model():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    matches, counts = np.array([[True, False, False]]), np.array([[1, 1, 1], [1, 0, 2], [2, 2, 0]])
    assert metrics.first_right(gallery[:1], gallery, matches, counts).tolist() == [[1 / 2, 1.0, 1 / 3]]


def test_the_area_of_many_pairs_varies_as_in_resamples(monkeypatch):
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(size=400), rng.normal(-0.5, size=25)
    resampled = auc_estimate(positives, negatives).draws.std()
    monkeypatch.setattr(estimates, "_COMPARISONS", 0)
    assert auc_estimate(positives, negatives).draws.std() == pytest.approx(resampled, rel=0.15)


def test_an_estimate_of_a_single_value_has_no_interval():
    assert auc_estimate(np.array([0.5]), np.array([0.1, 0.9])).interval is None
    assert auc_estimate(np.array([0.1, 0.9]), np.array([0.5])).interval is None
    known = mean_estimate([Estimate(0.5, np.full(3, 0.5)), Estimate(0.7)])
    assert (known.value, known.interval) == (pytest.approx(0.6), None)


def test_gaps_and_floors_have_no_sign():
    def model(association, retain):
        return {
            "forgetting": {"association": Estimate(association)},
            "collateral": {"retain_top1": Estimate(retain)},
        }

    lower, higher = model(-0.4, 0.7), model(0.2, 0.9)
    for first, second in ((lower, higher), (higher, lower)):
        assert gap.gaps(first, second)["mean"] == pytest.approx((0.6 + 0.2) / 2)
        assert gap.noise_floor([first, second])[0] == pytest.approx(0.4)
    for ours, theirs in ((0.5, 0.75), (0.75, 0.5)):
        assert gap.tug_of_war({"forget": ours, "test": 1.0}, {"forget": theirs, "test": 1.0}) == 0.75
