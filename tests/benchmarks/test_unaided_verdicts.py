"""Tests of the verdicts on the benchmark without settings."""

from __future__ import annotations

import pytest
from unaided_runs import entry, failure, given, one

from cliperase_fast.benchmarks.unaided_verdicts import (
    CALIBRATED,
    CONTROL,
    FIXED,
    SEARCH,
    SEARCHED,
    UNRELATED,
    overall,
)
from cliperase_fast.benchmarks.unaided_verdicts import verdicts as verdicts_of


def seeds(method, gaps):
    return [one(method, seed=seed, gap=gap) for seed, gap in enumerate(gaps)]


def verdict(name, runs, data="digits"):
    return verdicts_of(data, runs)[name]


@pytest.mark.parametrize(("good", "bad", "failures", "holds"), [(19, 1, 0, True), (18, 2, 0, False), (19, 0, 2, False)])
def test_forgetting_counts_failed_runs_as_not_forgotten(good, bad, failures, holds):
    runs = [one(seed=i, forget=0.05) for i in range(good)] + [one(seed=i, forget=0.051) for i in range(bad)]
    found = verdict("forgets", [*runs, *(failure(seed=i) for i in range(failures))])
    assert (found["holds"], found["good"], found["runs"]) == (holds, good, good + bad + failures)


@pytest.mark.parametrize(("retained", "holds"), [((0.96, 0.96), True), ((0.98, 0.94), True), ((0.97, 0.94), False)])
def test_the_retain_drop_is_a_mean_over_runs(retained, holds):
    runs = [one(seed=seed, retain=value + 1e-9) for seed, value in enumerate(retained)]
    found = verdict("retain", runs)
    assert found["holds"] is holds and found["drop"] == pytest.approx(0.98 - sum(retained) / 2)


def test_the_worst_class_is_judged_by_its_lower_bound_in_every_run():
    runs = [one(worst=(0.3, 0.1)), one(CONTROL, worst=(0.4, 0.2))]
    found = verdict("worst class", runs)
    assert found["holds"] and (found["largest"], found["of_control"]) == (0.1, 0.2)
    assert "20.0 points" in found["text"]
    assert not verdict("worst class", [*runs, one(seed=1, worst=(0.3, 0.11))])["holds"]


@pytest.mark.parametrize(("ours", "holds"), [(0.1, True), (0.11, False)])
def test_the_towers_worst_class_must_fall_by_half_of_what_version_01_loses(ours, holds):
    runs = [one(worst=(ours, 0.0)), one(FIXED, worst=(0.3, 0.2)), one(FIXED, seed=1, worst=(0.1, 0.0))]
    assert verdict("worst class", runs, "towers")["holds"] is holds
    assert verdict("worst class", runs[:1], "towers")["holds"] is None


@pytest.mark.parametrize(("ours", "holds"), [(0.1, True), (0.101, False)])
def test_the_gap_must_be_a_quarter_of_that_of_version_01(ours, holds):
    runs = [*seeds(CALIBRATED, (ours, ours)), *seeds(FIXED, (0.3, 0.5))]
    assert verdict("gap", runs)["holds"] is holds
    assert "gap" not in verdicts_of("personas", runs) and "gap" not in verdicts_of("towers", runs)


def test_a_gap_that_is_too_large_names_what_the_level_of_unrelated_pairs_adds():
    run = one(gap=0.2)
    run["scores"]["oracle"]["association"] = 0.6
    said = verdict("gap", [run, *seeds(FIXED, (0.4,))])["text"]
    assert "0.150 of it come from the association alone" in said and "0.60 below the oracles" in said
    assert "association" not in verdict("gap", [one(gap=0.2), *seeds(FIXED, (0.4,))])["text"]


def test_cliperase_with_the_recipe_must_not_be_better():
    runs = seeds(CALIBRATED, (0.1, 0.2))
    assert verdict("not better with the recipe", [*runs, *seeds(SEARCHED, (0.1, 0.21))])["holds"]
    assert not verdict("not better with the recipe", [*runs, *seeds(SEARCHED, (0.1, 0.19))])["holds"]
    assert verdict("not better with the recipe", runs)["holds"] is None


@pytest.mark.parametrize(("intra", "holds"), [(0.899, True), (0.701, True), (0.91, False), (0.69, False)])
def test_the_identity_of_personas_must_be_near_the_oracles_mean_on_average(intra, holds):
    run = one(seed=1)
    run["scores"]["after"]["intra_identity"] = entry(intra)
    run["scores"]["before"] = {**run["scores"]["before"], "intra_identity": 0.77}
    found = verdict("identity", [one(), run], "personas")
    assert found["holds"] is holds
    assert f"intra_identity {(intra - 0.8) / 2:+.3f} on average (the originals -0.015)" in found["text"]
    assert f"{intra - 0.8:+.3f} in the farthest run (its original -0.030)" in found["text"]


@pytest.mark.parametrize(("found", "holds"), [(0.3, True), (0.5, False)])
def test_a_search_with_a_forgotten_caption_must_not_find_more_than_the_oracles_find(found, holds):
    run, other = one(), one(UNRELATED)
    for each, value in ((run, found), (other, 0.1)):
        each["scores"]["after"][SEARCH] = entry(value)
        each["scores"]["before"] = {**each["scores"]["before"], SEARCH: 0.9}
        each["scores"]["oracle"] = {**each["scores"]["oracle"], SEARCH: 0.4}
    told = verdict("search", [run, other], "shapes")
    assert told["holds"] is holds
    assert f"first in {found:.0%} of the cases, before in 90%, with levels unrelated in 10%" in told["text"]
    assert "the oracles' 40%" in told["text"]
    assert "search" not in verdicts_of("shapes", [one()])


def test_the_time_is_compared_run_by_run_with_the_call_beside_it():
    runs = [one(), given(seconds=8.0), one(concept="three", seconds=20.0), given("three", seconds=8.0, chosen=4.0)]
    found = verdict("time", [*runs, one(seed=1)])
    assert found["holds"] and found["ratio"] == pytest.approx((10 / 8 + 20 / 8) / 2)
    assert found["largest"] == 2.5 and found["of_processor"] == 1.5
    assert found["to_choice"] == pytest.approx((10 / 5 + 20 / 4) / 2)
    assert not verdict("time", [*runs[:2], one(seed=1, seconds=40.0), given(seed=1, seconds=10.0)])["holds"]
    assert verdict("time", [one()])["holds"] is None


@pytest.mark.parametrize(
    ("searched", "fixed", "holds"),
    [
        ((0.20, 0.21, 0.22), (0.4, 0.4, 0.4), True),
        ((0.10, 0.12, 0.50), (0.4, 0.4, 0.4), False),  # the differences spread more than they are large
        ((0.20, 0.21, 0.22), (0.1, 0.1, 0.1), False),  # version 0.1 is as good
        ((0.20,), (0.4, 0.4, 0.4), None),
    ],
)
def test_a_win_is_a_smaller_gap_beyond_the_spread_of_the_seeds(searched, fixed, holds):
    runs = [*seeds(CALIBRATED, (0.1, 0.1, 0.1)), *seeds(SEARCHED, searched), *seeds(FIXED, fixed)]
    assert verdict("wins", runs)["holds"] is holds


def test_seeds_are_compared_after_the_mean_over_concepts():
    runs = [
        one(method, concept, seed, gap=gap)
        for seed in (0, 1)
        for method, gap in ((CALIBRATED, 0.1), (FIXED, 0.4), (SEARCHED, 0.2))
        for concept in ("seven", "three")
    ]
    runs[2]["gap"] = {"mean": 0.2}
    found = verdict("wins", runs)
    assert found["holds"] and "by 0.250 than with cliperase, version 0.1" in found["text"]


def test_a_failed_run_is_no_win():
    runs = [*seeds(CALIBRATED, (0.1, 0.1)), *seeds(SEARCHED, (0.2, 0.2)), *seeds(FIXED, (0.4, 0.4))]
    assert verdict("wins", runs)["holds"]
    assert verdict("wins", [*runs, failure(seed=2)])["holds"] is False
    assert verdict("wins", [*runs, failure(FIXED, seed=2)])["holds"]


def test_a_method_that_does_not_forget_is_no_win_however_small_its_gap():
    runs = [one(seed=seed, forget=0.5, gap=0.0) for seed in (0, 1)]
    found = verdict("wins", [*runs, *seeds(SEARCHED, (0.2, 0.2)), *seeds(FIXED, (0.4, 0.4))])
    assert found["holds"] is False and "do not forget" in found["text"]


def test_calibrated_wins_overall_where_it_wins_on_all_data():
    def record(holds):
        return {"verdicts": {"wins": {"holds": holds}}}

    assert overall({"a": record(True), "b": record(True)}, ("a", "b"))["holds"] is True
    assert overall({"a": record(True)}, ("a", "b"))["holds"] is None
    assert overall({"a": record(True), "b": record(None)}, ("a", "b"))["holds"] is None
    lost = overall({"a": record(True), "b": record(False)}, ("a", "b", "c"))
    assert lost["holds"] is False and lost["text"] == "calibrated does not win on b"
