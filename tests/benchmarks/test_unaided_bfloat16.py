"""The verdict on bfloat16: the scores are those of float32 on the same originals."""

from __future__ import annotations

import pytest
from unaided_runs import one

from cliperase_fast.benchmarks.unaided import BFLOAT16, METHODS, Study, _Bench
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


def test_its_row_is_shown_where_it_was_run():
    runs = [one()]
    assert all(row[0] != BFLOAT16 for row in scores_table({"runs": runs})[1])
    assert any(row[0] == BFLOAT16 for row in scores_table({"runs": [*runs, one(BFLOAT16)]})[1])


def test_it_sets_the_precision_alone():
    study = Study(
        "demo", {"seven": "class:seven"}, {}, lambda seed: None, lambda concept: [], None, (*METHODS, BFLOAT16)
    )
    assert _Bench(study, None, "seven", 0).settings(BFLOAT16) == {"method": "calibrated", "precision": "bf16"}
