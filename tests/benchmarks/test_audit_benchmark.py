"""Tests of the audit benchmark: what is audited against what, and what is recorded of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_audits import entry, found, run

from cliperase_fast.benchmarks import audit, audit_report, records
from cliperase_fast.data.personas import FORGET_SETS
from cliperase_fast.errors import UnlearningError

STUDY = audit.Study("demo", {"seven": "class:seven", "three": "class:three"}, ["seven"], 2, test="t", other={"o": "p"})
METHODS = {"cliperase": {}, "cliperase, hinge": {"forget_loss": "hinge"}, "calibrated": {"method": "calibrated"}}


@pytest.fixture
def calls(monkeypatch):
    """What the benchmark calls, by name, in place of training and auditing."""
    seen = {"oracles": [], "unlearned": [], "audits": []}

    def oracles(source, selector, count, **options):
        seen["oracles"].append((source, selector, count))
        return [Path(f"{selector}-{number}") for number in range(count)]

    def forget(reference, folder, **settings):
        seen["unlearned"].append((reference, settings))
        folder.mkdir(parents=True, exist_ok=True)

    def audited(*models, **options):
        seen["audits"].append((models, options))
        return found(relearned=0.7 if options["depth"] else None)

    monkeypatch.setattr(audit, "cached_small_clip", lambda *given, **options: Path("base"))
    monkeypatch.setattr(audit, "require_known", lambda *given, **options: None)
    monkeypatch.setattr(audit, "cached_clean_model", lambda source, **options: Path(f"clean-{source}"))
    monkeypatch.setattr(audit, "cached_oracles", oracles)
    monkeypatch.setattr(audit, "run_demo", forget)
    monkeypatch.setattr(audit, "audit", audited)
    return seen


def test_every_method_is_audited_for_every_concept_against_its_own_oracles(tmp_path, calls):
    runs = audit.run_study(STUDY, tmp_path, METHODS)
    names = [(concept, method) for concept in STUDY.concepts for method in METHODS]
    assert [(one["concept"], one["method"]) for one in runs] == names
    assert calls["oracles"] == [("demo", "class:seven", 2), ("demo", "class:three", 2)]
    for (concept, method), (reference, settings), (models, options) in zip(
        names, calls["unlearned"], calls["audits"], strict=True
    ):
        assert reference == models[2] == f"demo#class:{concept}" and models[3] == "rest"
        assert METHODS[method].items() <= settings.items() and settings["test"] == options["test"] == "t"
        assert settings.get("learning_rate") == (None if method == "calibrated" else 1e-4)
        assert models[0] == "local-dir:base" and options["other"] == {"o": "p"}
        assert options["oracle"] == [f"local-dir:class:{concept}-{number}" for number in range(2)]
        assert options["depth"] == (concept == "seven")
    assert len({models[1] for models, _ in calls["audits"]}) == len(names)


def test_a_model_without_facts_is_audited_like_a_method(tmp_path, calls):
    runs = audit.run_study(replace(STUDY, clean=True), tmp_path, METHODS)
    clean = [one for one in runs if one["method"] == "clean"]
    assert [one["concept"] for one in clean] == list(STUDY.concepts)
    assert sum(models[1] == "local-dir:clean-demo" for models, _ in calls["audits"]) == 2
    assert len(calls["unlearned"]) == len(runs) - 2


def test_a_study_stops_before_it_trains_oracles_for_an_original_that_knows_nothing(tmp_path, calls, monkeypatch):
    def refuse(*given, **options):
        raise UnlearningError("knows nothing")

    monkeypatch.setattr(audit, "require_known", refuse)
    with pytest.raises(UnlearningError, match="knows nothing"):
        audit.run_study(STUDY, tmp_path, METHODS)
    assert calls["oracles"] == calls["unlearned"] == []


def test_personas_are_forgotten_in_three_sets_by_three_methods(monkeypatch, tmp_path, calls):
    monkeypatch.setattr(audit, "RESULTS", tmp_path / "results")
    audit.main(["personas", "--runs", str(tmp_path / "runs")])
    record = json.loads((tmp_path / "results" / "audit-personas.json").read_text())
    assert [(one["concept"], one["method"]) for one in record["runs"]] == [
        (name, method) for name in FORGET_SETS for method in ("cliperase", "calibrated", "gradient_ascent", "clean")
    ]
    assert record["oracles"] == 3
    head, rows = audit_report.personas_table({"personas": record})
    assert head[:2] == ("", "Association")
    assert [row[0] for row in rows] == [
        "original", "cliperase", "calibrated", "gradient_ascent", "no facts", "oracles (range)",
    ]  # fmt: skip
    assert rows[0][1] == "0.840" and rows[-1][1] == "0.010 (-0.040 to 0.060)" and rows[0][2] == ""
    assert audit_report.methods({"personas": record}) == ["cliperase", "calibrated", "gradient_ascent"]
    assert audit_report.personas_table({"digits": record})[1] == []
    assert audit_report.references_table({"personas": record})[1] == []


def test_an_unlearned_model_that_is_there_is_resumed(tmp_path, calls):
    audit.run_study(STUDY, tmp_path, METHODS)
    assert not any(settings["resume"] for _, settings in calls["unlearned"])
    audit.run_study(STUDY, tmp_path, METHODS)
    assert all(settings["resume"] for _, settings in calls["unlearned"][len(calls["unlearned"]) // 2 :])


def test_a_record_keeps_intervals_but_of_single_oracles_the_values_alone():
    kept = audit.kept(found())
    assert kept["scores"]["after"]["forgetting"]["association"] == {
        "value": -0.9,
        "low": -1.0,
        "high": -0.9,
        "note": "n",
    }
    assert kept["scores"]["oracle 2"]["forgetting"]["association"] == {"value": 0.06}
    assert kept["gap"]["floor"] == 0.1 and kept["over_forgotten"] is True


def test_the_summary_counts_the_original_and_each_oracle_once_a_concept():
    runs = [
        run("seven", after=-0.9, oracles=(-0.2, 0.0)), run("seven", "other", after=-0.3, oracles=(-0.2, 0.0)),
        run("three", after=-0.7, oracles=(0.1, 0.3)), run("three", "other", after=-0.1, oracles=(0.1, 0.3)),
    ]  # fmt: skip
    summary = audit.summary(runs)
    assert list(summary) == ["before", "cliperase", "oracle", "other"]
    found = summary["cliperase"]["association"]
    assert (found["mean"], found["low"], found["high"], found["count"]) == (pytest.approx(-0.8), -0.9, -0.7, 2)
    assert found["std"] == pytest.approx(0.2 / 2**0.5)
    assert summary["other"]["association"]["mean"] == pytest.approx(-0.2)
    assert summary["before"]["association"]["count"] == 2
    oracle = summary["oracle"]["association"]
    assert (oracle["count"], oracle["mean"], oracle["low"]) == (4, pytest.approx(0.05), -0.2)


def test_one_value_has_no_spread_and_a_score_that_is_none_no_summary():
    one = run(relearned=None)
    one["scores"]["after"]["forgetting"]["mrr"] = entry(None, reason="r")
    summary = audit.summary([one])
    assert summary["cliperase"]["association"]["std"] is None and "mrr" not in summary["cliperase"]


def test_reference_values_are_judged_by_their_tolerance_and_deviations_are_told():
    rows = audit.compared([run("three"), run(after=-0.94, oracles=(-0.3, 0.3), relearned=0.7)])
    by_name = {row["what"]: row for row in rows}
    assert len(by_name) == len(audit.REFERENCES)
    assert by_name["association, CLIPErase"]["within"] and by_name["association, original"]["within"]
    assert by_name["association, oracle"]["each"] == [-0.3, 0.3] and by_name["association, oracle"]["within"]
    assert by_name["relearned after 20 steps, CLIPErase"]["within"]
    assert not by_name["relearned after 10 steps, CLIPErase"]["within"]
    text = audit.comparison_text(rows)
    assert "relearned after 10 steps, CLIPErase: reference 0.00, measured 0.70, NOT within 0.15" in text
    assert "association, oracle: reference -0.04, measured 0.00 (each: -0.30, 0.30), within 0.05" in text
    assert audit.compared([run("three")]) == []


def test_a_record_is_json_with_a_score_on_a_line():
    record = {"runs": [{"scores": {"after": {"association": entry(0.123456789)}}, "notes": ["a", "b"]}], "empty": []}
    text = records.record_text(record)
    assert json.loads(text)["runs"][0]["scores"]["after"]["association"]["value"] == 0.123457
    assert any('"association": {"value": 0.123457, "low"' in line for line in text.splitlines())


def test_the_shards_must_be_named_for_cifar10(capsys):
    with pytest.raises(SystemExit):
        audit.main(["cifar10", "--shards", "a.tar"])
    assert "cifar10 needs --shards and --test-shards" in capsys.readouterr().err


def test_one_of_the_concepts_can_be_measured_alone(tmp_path, monkeypatch, capsys, calls):
    monkeypatch.setattr(audit, "RESULTS", tmp_path / "results")
    audit.main(["personas", "--only", "contacts"])
    record = json.loads((tmp_path / "results" / "audit-personas.json").read_text())
    assert {one["concept"] for one in record["runs"]} == {"contacts"}
    assert record["command"] == "python -m benchmarks.audit personas --only 'contacts'"
    with pytest.raises(SystemExit):
        audit.main(["personas", "--only", "letters"])
    assert "'letters' is not one of phones, contacts, profiles" in capsys.readouterr().err


def test_the_record_says_how_and_where_it_was_measured(tmp_path, monkeypatch, capsys, calls):
    monkeypatch.setattr(audit, "RESULTS", tmp_path / "results")
    audit.main(["digits", "--runs", str(tmp_path / "runs")])
    record = json.loads((tmp_path / "results" / "audit-digits.json").read_text())
    assert record["command"] == "python -m benchmarks.audit digits" and record["oracles"] == 5
    assert {"machine", "versions", "commit", "date", "seconds"} <= record.keys()
    assert len(record["runs"]) == 3 * len(audit.METHODS)
    assert [row["what"] for row in record["references"]] == [reference.what for reference in audit.REFERENCES]
    assert "association, original: reference 0.84, measured 0.84, within 0.05" in capsys.readouterr().out
