"""Tests of the tables that docs/audit.md shows of the recorded audits."""

import pytest
from fake_audits import run

from cliperase_fast.benchmarks import audit, audit_report


@pytest.fixture
def records():
    runs = [run(relearned=0.7), run(method="other", after=-0.2, relearned=0.1), run("three"), run("three", "other")]
    return {"digits": {"runs": runs, "summary": audit.summary(runs), "references": audit.compared(runs)}}


def test_an_example_shows_the_original_each_method_and_the_range_of_the_oracles(records):
    head, rows = audit_report.example_table("association", records)
    assert head == ("", "original", "cliperase", "other", "oracles (range)")
    assert rows == [("digits: seven, three", "0.840", "-0.900", "-0.550", "0.010 (-0.040 to 0.060)")]


def test_the_relearning_curves_name_only_the_concepts_that_were_attacked(records):
    head, rows = audit_report.relearn_table(records)
    assert head == ("", "", "step 5", "step 10", "step 20")
    assert [row[:2] for row in rows] == [
        ("digits: seven", model) for model in ("original", "cliperase", "other", "oracles (range)")
    ]
    assert rows[2][2:] == ("10.0 %", "10.0 %", "10.0 %")


def test_the_gap_counts_the_audits_that_are_over_forgotten(records):
    _, rows = audit_report.gap_table(records)
    assert rows[1] == ("digits: seven, three", "other", "0.500", "0.100", "0.800", "1 of 2")


def test_a_reference_that_was_missed_stands_out(records):
    _, rows = audit_report.references_table(records)
    by_name = {row[0]: row for row in rows}
    assert by_name["relearned after 10 steps, CLIPErase"][1:] == ("0.00 ± 0.15", "0.70", "", "**no**")
    assert by_name["association, oracle"][3] == "-0.04, 0.06"


def test_every_score_of_the_examples_has_a_definition():
    defined = {name.rstrip("@…:`") for name, _ in ((name.strip("`"), _) for name, _ in audit_report.scores_table()[1])}
    assert {score.partition("@")[0] for score in audit_report.EXAMPLES} <= defined
