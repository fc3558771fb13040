"""Tests of the benchmark without settings: its verdicts, resuming, failed runs, and what each method is called with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cliperase_fast.benchmarks import records, towers, unaided, unaided_report, write_docs
from cliperase_fast.benchmarks.unaided_verdicts import (
    CALIBRATED,
    CONTROL,
    FIXED,
    GIVEN,
    METHODS,
    SEARCH,
    SEARCHED,
    UNRELATED,
    overall,
)
from cliperase_fast.benchmarks.unaided_verdicts import verdicts as verdicts_of
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.errors import UnlearningError

FOUND = {"learning_rate": 3.16228e-05, "batch_size": 128, "forget_fraction": 0.25, "steps": 60, "chosen_step": 40}


def entry(value, low=None):
    return {"value": value, "low": value if low is None else low, "high": value}


def one(method=CALIBRATED, concept="seven", seed=0, *, forget=0.0, retain=0.97, worst=(0.02, 0.0), gap=0.05, **more):
    """A run of a method that is audited."""
    levels = {"association": 0.0, "image_side": 0.0, "text_side": 0.0, "intra_identity": 0.8, "inter_identity": 0.8}
    own = {"zero_shot_top1": entry(forget), "retain_top1": entry(retain), "worst_class_drop": entry(*worst)}
    others = {"zero_shot_top1": 0.9, "retain_top1": 0.98, "worst_class_drop": 0.0, **levels}
    scores = {
        "before": others,
        "after": {**{name: entry(value) for name, value in levels.items()}, **own},
        "oracle": {**others, "zero_shot_top1": 0.0},
    }
    recipe = {**FOUND, "probes": 2, "target_reached": True, "within_floor": True}
    run = {
        "concept": concept, "seed": seed, "method": method, "commit": "c", "recipe": recipe, "seconds": 10.0,
        "cpu_seconds": 9.0, "audit_seconds": 1.0, "scores": scores, "gap": {"mean": gap}, "floor": 0.02,
    }  # fmt: skip
    return {**run, **more}


def given(concept="seven", seed=0, seconds=8.0, chosen=5.0):
    run = {"concept": concept, "seed": seed, "method": GIVEN, "commit": "c", "seconds": seconds, "cpu_seconds": 6.0}
    return {**run, "chosen": {"steps": 40, "seconds": chosen, "cpu_seconds": 4.0}}


def failure(method=CALIBRATED, concept="seven", seed=0):
    return {"concept": concept, "seed": seed, "method": method, "commit": "c", "error": "UnlearningError: no"}


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


def audited(after=0.1, oracles=(0.0, 0.2)):
    """What `audit()` returns."""
    names = {name: group for group, of_group in unaided.SCORES.items() for name in of_group}
    missing = ("intra_identity", "inter_identity", "general")

    def groups(value):
        found = {group: {} for group in unaided.SCORES}
        for name, group in names.items():
            found[group][name] = {"value": None if name in missing else value, "low": value - 0.1, "high": value + 0.1}
        return found

    mean = sum(oracles) / len(oracles)
    gap = {name: abs(after - mean) for name in names if name not in missing}
    gap |= {"association": 0.4, "image_side": 0.2, "retain_association": 9.0}
    models = {"before": groups(0.9), "after": groups(after), "oracle": groups(mean)}
    models |= {f"oracle {number}": groups(value) for number, value in enumerate(oracles, 1)}
    gap["floors"] = dict.fromkeys(names, 0.2) | {"text_side": 0.6, "retain_association": 9.0}
    data = {"scores": models, "gap": gap, "over_forgotten": False}
    return SimpleNamespace(to_dict=lambda: data)


def test_the_gap_is_over_exactly_four_scores():
    kept = unaided.scores(audited(after=0.1, oracles=(0.0, 0.2)).to_dict())
    assert kept["gap"]["mean"] == pytest.approx((0.4 + 0.2 + 0.0 + 0.0) / 4)
    assert kept["floor"] == pytest.approx((0.2 + 0.2 + 0.6 + 0.2) / 4)
    assert kept["scores"]["oracle 2"]["association"] == 0.2
    assert kept["scores"]["after"]["worst_class_drop"]["low"] == pytest.approx(0.0)
    assert "intra_identity" not in kept["scores"]["after"], "scores without a value are left out"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the benchmark unlearns and audits, in place of doing so, and the folder of its records."""
    seen = SimpleNamespace(unlearned=[], audits=[], originals=[], fail=None, folder=tmp_path)

    def forget(model, forget, retain, **settings):
        seen.unlearned.append((model, forget, retain, settings))
        if seen.fail is not None and seen.fail(settings):
            raise UnlearningError("it broke")
        automatic = "learning_rate" not in settings
        recipe = {
            "learning_rate": 3.16228e-05, "steps": 60, "stop": "s", "target": {"association": 0.1},
            "probes": [{"steps": 30}, {"steps": 10}],
        }  # fmt: skip
        steps = 60 if automatic else settings.get("steps", 20)
        return SimpleNamespace(
            record={"recipe": recipe if automatic else None},
            selection={
                "step": 40 if automatic else steps, "target_reached": True, "within_floor": True, "reason": "r",
            },
            config=SimpleNamespace(
                learning_rate=settings.get("learning_rate"), batch_size=128, forget_fraction=0.25,
            ),
            history=[{"total": 1.0, "step": step} for step in (1, steps)] + [{"total": 1.0, "step": 99, "probe": 1.0}],
            adapter=f"after {settings['method']}",
        )  # fmt: skip

    def audit(*models, **options):
        seen.audits.append((models, options))
        return audited()

    monkeypatch.setattr(unaided, "RESULTS", tmp_path)
    monkeypatch.setattr(unaided, "unlearn", forget)
    monkeypatch.setattr(unaided, "audit", audit)
    monkeypatch.setattr(unaided, "load_model", lambda name: f"loaded {name}")
    return seen


def study(calls, **changes):
    def original(seed):
        calls.originals.append(seed)
        return Path(f"original-{seed}")

    concepts = {"seven": "class:seven", "three": "class:three"}
    parts = {
        "source": "demo", "concepts": concepts, "fixed": dict.fromkeys(concepts, records.DEMO),
        "original": original, "oracles": lambda concept: [Path(f"{concept}-1"), Path(f"{concept}-2")], "test": "t",
    }  # fmt: skip
    return unaided.Study(**{**parts, **changes})


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
