"""The runs of `calibrated` with one setting of their own, and their verdicts beside the default."""

from __future__ import annotations

import pytest
from unaided_runs import one

from cliperase_fast.benchmarks.unaided import BFLOAT16, METHODS, SIMILAR, UNRELATED, Study, _Bench
from cliperase_fast.benchmarks.unaided_report import scores_table
from cliperase_fast.benchmarks.unaided_verdicts import verdicts


@pytest.mark.parametrize(("forget", "retain", "holds"), [(0.0, 0.97, True), (0.0, 0.955, False), (0.02, 0.97, False)])
def test_bfloat16_may_change_scores_by_a_point(forget, retain, holds):
    runs = [one(seed=seed) for seed in range(2)]
    half = [one(BFLOAT16, seed=1, forget=forget, retain=retain, cpu_seconds=4.5)]
    found = verdicts("towers", [*runs, *half])["bfloat16"]
    assert found["holds"] == holds
    assert "in 1 run forget" in found["text"] and "0.50 times the processor time" in found["text"]
    assert "bfloat16" not in verdicts("towers", runs)


@pytest.mark.parametrize(("gap", "holds"), [(0.03, True), (0.05, False)])
def test_similar_levels_must_be_nearer_to_the_oracles_than_the_default_on_the_same_originals(gap, holds):
    runs = [one(seed=0, gap=0.01), one(seed=1, gap=0.05)]
    runs[1]["scores"]["oracle"]["association"] = -0.1
    own = one(SIMILAR, seed=1, gap=gap, cpu_seconds=18.0)
    own["scores"]["oracle"]["association"] = 0.2
    found = verdicts("towers", [*runs, own])["gap, levels similar"]
    assert found["holds"] == holds
    assert f"is {gap:.3f} in 1 run, with the default 0.050" in found["text"]
    assert "ends 0.20 below the oracles', with the default 0.10 above it, in 2.00 times its" in found["text"]
    assert "gap, levels similar" not in verdicts("towers", runs)


@pytest.mark.parametrize("method", [BFLOAT16, SIMILAR, UNRELATED])
def test_their_rows_are_shown_where_they_were_run(method):
    runs = [one()]
    assert all(row[0] != method for row in scores_table({"runs": runs})[1])
    assert any(row[0] == method for row in scores_table({"runs": [*runs, one(method)]})[1])


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (BFLOAT16, {"precision": "bf16"}),
        (SIMILAR, {"forget_level": "similar"}),
        (UNRELATED, {"forget_level": "unrelated"}),
    ],
)
def test_each_has_its_setting_alone(method, setting):
    study = Study("demo", {"seven": "class:seven"}, {}, lambda seed: None, lambda concept: [], None, (*METHODS, method))
    assert _Bench(study, None, "seven", 0).settings(method) == {"method": "calibrated", **setting}
