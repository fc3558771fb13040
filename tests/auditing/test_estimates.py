import numpy as np
import pytest

from cliperase_fast.auditing import estimates
from cliperase_fast.auditing.estimates import Estimate, auc_estimate, mean_estimate, stratified_mean


def test_strata_weigh_the_same_and_give_a_bootstrap_interval():
    values, strata = np.array([1, 1, 1, 1, 0, 0.5]), np.array([3, 3, 3, 3, 8, 8])
    found = stratified_mean(values, strata)
    assert found.value == pytest.approx((1 + 0.25) / 2)
    low, high = found.interval
    assert (low, high) == (0.5, 0.75)  # the second class comes out as 0, 0.25 or 0.5


def test_the_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(size=2000)
    for size in (2000, 20000):  # resampled one by one, and from the normal distribution
        some = np.resize(values, size)
        low, high = stratified_mean(some).interval
        assert high - low == pytest.approx(2 * 1.96 * some.std() / size**0.5, rel=0.1)


def test_a_single_value_has_no_interval():
    assert stratified_mean(np.array([0.3])).to_dict() == {"value": 0.3, "low": None, "high": None}
    assert stratified_mean(np.array([])).value is None
    assert stratified_mean(np.array([0.3, np.nan])).value is None


def test_the_same_seed_gives_the_same_resamples():
    values = np.arange(20.0)
    same, again = stratified_mean(values, seed=1), stratified_mean(values + 1, seed=1)
    assert np.allclose(same.draws + 1, again.draws)  # two models see the same resamples
    assert not np.allclose(same.draws, stratified_mean(values, seed=2).draws)


def test_means_of_estimates_leave_out_what_does_not_exist():
    first, second = stratified_mean(np.arange(9.0)), stratified_mean(np.arange(9.0) + 2)
    mean = mean_estimate([first, second, Estimate(None)])
    assert mean.value == pytest.approx(5)
    assert np.allclose(mean.draws, first.draws + 1)
    assert mean_estimate([Estimate(None, None, {"reason": "why"})]).notes == {"reason": "why"}


def test_areas_have_the_same_interval_however_they_are_resampled(monkeypatch):
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(0.7, 1, 150), rng.normal(0, 1, 200)
    low, high = auc_estimate(positives, negatives).interval
    monkeypatch.setattr(estimates, "_COMPARISONS", 10)
    assert auc_estimate(positives, negatives).interval == pytest.approx((low, high), abs=0.02)
