"""Tests of the benchmark without settings: resuming, failed runs, tables, and what each method is called with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unaided_runs import audited, failure, given, one, study

from cliperase_fast.benchmarks import towers, unaided, unaided_report, write_docs
from cliperase_fast.benchmarks.unaided_verdicts import (
    CALIBRATED,
    CONTROL,
    FIXED,
    GIVEN,
    METHODS,
    SEARCHED,
)
from cliperase_fast.benchmarks.unaided_verdicts import verdicts as verdicts_of
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.errors import UnlearningError


def test_the_gap_is_over_exactly_four_scores():
    kept = unaided.scores(audited(after=0.1, oracles=(0.0, 0.2)).to_dict())
    assert kept["gap"]["mean"] == pytest.approx((0.4 + 0.2 + 0.0 + 0.0) / 4)
    assert kept["floor"] == pytest.approx((0.2 + 0.2 + 0.6 + 0.2) / 4)
    assert kept["scores"]["oracle 2"]["association"] == 0.2
    assert kept["scores"]["after"]["worst_class_drop"]["low"] == pytest.approx(0.0)
    assert "intra_identity" not in kept["scores"]["after"], "scores without a value are left out"


def record(of):
    return unaided.Record("digits", "c", list(of.concepts))


def run_all(calls, seeds=2, **changes):
    of = study(calls)
    unaided.run_study(of, record(of), of.concepts, seeds, **changes)
    return json.loads((calls.folder / "unaided-digits.json").read_text())


def test_every_method_forgets_every_concept_in_every_original(calls):
    found = run_all(calls)
    assert [(run["concept"], run["seed"], run["method"]) for run in found["runs"]] == [
        (concept, seed, method) for concept in ("seven", "three") for seed in (0, 1) for method in METHODS
    ]
    assert calls.originals == [0, 10, 0, 10]
    assert {model for model, *_ in calls.unlearned} == {"local-dir:original-0", "local-dir:original-10"}
    assert all(settings["test"] == "t" and retain == "rest" for *_, retain, settings in calls.unlearned)
    models, options = calls.audits[0]
    assert models == ("loaded local-dir:original-0", "after calibrated", "demo#class:seven", "rest")
    assert options == {"oracle": ["loaded local-dir:seven-1", "loaded local-dir:seven-2"], "test": "t"}
    assert len(calls.audits) == 2 * 2 * 4


def test_the_methods_get_no_setting_version_01s_numbers_or_what_calibrated_found(calls):
    run_all(calls, seeds=1)
    settings = [{name: value for name, value in one[3].items() if name != "test"} for one in calls.unlearned[:6]]
    found = {"learning_rate": 3.16228e-05, "batch_size": 128, "forget_fraction": 0.25}
    assert settings == [
        {"method": "calibrated"},
        {"method": "calibrated", **found, "steps": 60},
        {"method": "calibrated", **found, "steps": 40},
        {"method": "cliperase", "epochs": 10, "batch_size": 64, "learning_rate": 1e-4},
        {"method": "cliperase"},
        {"method": "retain_finetune", **found, "steps": 40, "schedule": "cosine", "select": "last"},
    ]


def test_a_further_call_continues_with_what_is_missing(calls):
    whole = run_all(calls)
    path = calls.folder / "unaided-digits.json"
    for lost, again in ((CONTROL, [CONTROL]), (GIVEN, [CALIBRATED, GIVEN])):
        kept = [run for run in whole["runs"] if (run["concept"], run["seed"], run["method"]) != ("three", 0, lost)]
        path.write_text(json.dumps({**whole, "runs": kept}))
        calls.unlearned.clear()
        found = run_all(calls)
        assert [run["method"] for run in found["runs"]] == [run["method"] for run in whole["runs"]]
        methods = {one[3]["method"] for one in calls.unlearned}
        assert methods == {"retain_finetune" if lost == CONTROL else "calibrated"}
        assert len(calls.unlearned) == {1: 1, 2: 3}[len(again)]
    calls.unlearned.clear()
    calls.originals.clear()
    run_all(calls)
    assert calls.unlearned == calls.originals == []


def test_a_rate_is_the_same_after_the_file_was_read(calls):
    of = study(calls)
    run_all(calls, seeds=1)
    assert record(of).find("seven", 0, CALIBRATED)["recipe"]["learning_rate"] == 3.16228e-05


def test_every_run_is_written_at_once(calls):
    calls.fail = lambda settings: settings["method"] == "retain_finetune" and stop()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(calls)
    runs = json.loads((calls.folder / "unaided-digits.json").read_text())["runs"]
    assert [run["method"] for run in runs] == [CALIBRATED, GIVEN, FIXED, SEARCHED]


def test_a_failed_run_is_listed_with_its_error_and_repeated_on_request(calls, capsys):
    calls.fail = lambda settings: settings == {"method": "cliperase", "test": "t"}
    found = run_all(calls, seeds=1)
    assert [run["error"] for run in found["runs"] if run["method"] == SEARCHED] == ["UnlearningError: it broke"] * 2
    assert len(found["runs"]) == 2 * len(METHODS)
    assert "seven, seed 0, cliperase: FAILED: UnlearningError: it broke" in capsys.readouterr().out
    text = unaided_report.study_text("digits", found)
    assert "- three, seed 0, cliperase: UnlearningError: it broke" in text
    calls.fail = None
    calls.unlearned.clear()
    run_all(calls, seeds=1)
    assert calls.unlearned == []
    assert not any("error" in run for run in run_all(calls, seeds=1, retry=True)["runs"])
    assert len(calls.unlearned) == 2


def test_runs_that_need_what_a_failed_one_found_fail_too(calls):
    calls.fail = lambda settings: settings["method"] == "calibrated"
    found = run_all(calls, seeds=1)["runs"][: len(METHODS)]
    errors = {run["method"]: run.get("error") for run in found}
    assert errors[FIXED] is errors[SEARCHED] is None
    assert errors[CALIBRATED] == "UnlearningError: it broke"
    assert "calibrated failed or was not run" in errors[GIVEN] and errors[CONTROL] == errors[GIVEN]


def test_an_original_that_does_not_know_its_data_fails_all_of_its_runs(calls):
    def original(seed):
        if seed == 10:
            raise UnlearningError("knows nothing")
        return Path("original")

    of = study(calls, original=original)
    unaided.run_study(of, record(of), ["seven"], 2)
    runs = record(of).runs
    assert [run.get("error") for run in runs] == [None] * 5 + ["the original: knows nothing"] * 5


def test_the_record_says_how_and_where_it_was_measured(calls):
    found = run_all(calls)
    assert {"machine", "versions", "date", "seconds", "verdicts", "commit"} <= found.keys()
    assert found["gap"] == ["association", "image_side", "text_side", "retain_top1"]
    assert found["verdicts"]["time"]["holds"] is not None


def test_tables_have_a_row_for_each_method_and_each_choice():
    runs = [*(one(method, seed=seed) for method in (CALIBRATED, FIXED) for seed in (0, 1)), given(), failure(SEARCHED)]
    content = {"runs": runs, "verdicts": verdicts_of("digits", runs)}
    head, rows = unaided_report.scores_table(content)
    assert [row[:2] for row in rows] == [
        (CALIBRATED, "2"), (FIXED, "2"), (SEARCHED, "0 (1 failed)"), (CONTROL, "0"), ("the originals", ""),
        ("the oracles", ""),
    ]  # fmt: skip
    assert all(len(row) == len(head) for row in rows)
    assert dict(zip(head, rows[0], strict=True))["intra-identity"] == "0.80"
    assert dict(zip(head, rows[-1], strict=True))["mean gap"] == "0.020 between two"
    assert dict(zip(head, rows[0], strict=True))["mean gap"] == "0.050 ± 0.000"
    head, rows = unaided_report.choices_table(content)
    assert dict(zip(head, rows[0], strict=True))["times as long as with numbers"] == "1.25"
    assert len(rows) == 2 and all(len(row) == len(head) for row in rows)
    assert unaided_report.failure_lines(content) == ["- seven, seed 0, cliperase: UnlearningError: no"]
    lines = unaided_report.verdict_lines(content)
    assert any(line.startswith("- gap: **does not hold**: the mean gap is 0.050") for line in lines)
    assert any(line.startswith("- retain: holds: retain top-1 falls by 1.0 points") for line in lines)
    assert any(line.startswith("- wins: open") for line in lines)


def test_the_page_has_a_section_for_every_data_set_of_the_command():
    assert set(unaided_report.DATA) == {*unaided.STUDIES, *unaided.OF_SHARDS}
    assert {f"unaided-{name}" for name in unaided_report.DATA} <= set(write_docs.TABLES)


def test_no_oracle_has_the_seed_of_an_original():
    assert not {unaided.model_seed(number) for number in range(unaided.SEEDS)} & set(range(1, 6))


def test_the_fixed_numbers_are_those_of_version_01():
    """Version 0.1's demo had them as its recipes for digits and photographs, and for shapes."""
    assert unaided.STUDIES["digits"]().fixed["one"] == {"epochs": 10, "batch_size": 64, "learning_rate": 1e-4}
    assert unaided.STUDIES["shapes"]().fixed["red circle"] == {
        "epochs": 100, "batch_size": 128, "forget_fraction": 0.25, "learning_rate": 3e-4, "evaluate_every": 10,
    }  # fmt: skip


def test_originals_and_oracles_have_the_same_split_and_recipe(monkeypatch):
    seen = []
    monkeypatch.setattr(
        unaided,
        "cached_model",
        lambda pairs, recipe, *, seed, **options: seen.append((len(pairs), recipe, seed)) or Path(),
    )
    monkeypatch.setattr(unaided, "cached_oracles", lambda *given, **options: seen.append((*given, options)) or [])
    of = unaided.STUDIES["digits"]()
    for seed in (0, 10):
        of.original(seed)
    of.oracles("one")
    assert (
        seen[0][:2] == seen[1][:2] and seen[0][1] == demo_model_for("demo") and [one[2] for one in seen[:2]] == [0, 10]
    )
    assert seen[2][:3] == ("demo", "class:one", 5) and "seed" not in seen[2][3], "the seeds 1 to 5"


def test_cosines_that_the_data_does_not_have_have_no_column():
    run = one()
    del run["scores"]["after"]["intra_identity"]
    head, rows = unaided_report.scores_table({"runs": [run, one(FIXED)]})
    assert "intra-identity" not in head and "inter-identity" in head and all(len(row) == len(head) for row in rows)


def test_the_towers_oracles_never_saw_the_class_and_have_seeds_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(towers, "towers_model", lambda shards, **options: seen.append((shards, options)) or Path())
    of = unaided.towers("s.tar", "t.tar")
    of.original(20)
    of.oracles("airplane")
    assert (of.source, of.test) == ("wds:s.tar", "wds:t.tar")
    assert [(options["seed"], options.get("without")) for _, options in seen] == [
        (20, None), (1, "airplane"), (2, "airplane"), (3, "airplane"),
    ]  # fmt: skip


def test_only_models_are_trained_to_prepare(calls, monkeypatch):
    monkeypatch.setattr(unaided, "STUDIES", {"digits": lambda: study(calls)})
    unaided.main(["digits", "--prepare", "--seeds", "2"])
    assert calls.originals == [0, 10] and calls.unlearned == [] and not list(calls.folder.iterdir())


def test_the_command_measures_prints_and_checks_its_words(calls, monkeypatch, capsys):
    monkeypatch.setattr(unaided, "STUDIES", {"digits": lambda: study(calls)})
    unaided.main(["digits", "--only", "three", "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "- forgets:" in printed and "unaided digits: 5 runs; written to" in printed
    for words, says in (
        (["digits", "--only", "nine"], "'nine' is not one of seven, three"),
        (["digits", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["cifar10"], "cifar10 needs --shards and --test-shards"),
    ):
        with pytest.raises(SystemExit):
            unaided.main(words)
        assert says in capsys.readouterr().err
