"""Tests of the leaderboard and of the search of its settings: what runs, what is ranked how, and what the docs show."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from unaided_runs import audited, entry, study

from cliperase_fast.benchmarks import leaderboard, leaderboard_report, search
from cliperase_fast.benchmarks.unaided_verdicts import CALIBRATED, CONTROL
from cliperase_fast.config import UnlearnConfig, recipe_names
from cliperase_fast.unlearning.methods import make_method, methods


def run(method, seed=0, *, forget=0.0, gap=0.1, retain=0.9, concept="seven"):
    scores = {"zero_shot_top1": forget, "association": 0.1, "retain_top1": retain, "worst_class_drop": 0.02}
    others = {**scores, "zero_shot_top1": 0.9, "retain_top1": 0.95}
    oracle = {**scores, "zero_shot_top1": 0.1}
    return {
        "concept": concept, "seed": seed, "method": method, "commit": "c", "gap": {"mean": gap}, "floor": 0.02,
        "scores": {"before": others, "after": {name: entry(value) for name, value in scores.items()},
                   "oracle": oracle, "oracle 1": oracle},
        "over_forgotten": False, "background": 0.0, "pairs": {"forget": 36, "retain": 324}, "seconds": 3.0,
        "cpu_seconds": 2.0, "audit_seconds": 1.0, "peak_mib": 5.0, "changed_mib": 1.0,
    }  # fmt: skip


@pytest.fixture
def board(calls, monkeypatch):
    """A board of three rows on two originals, whose runs are replaced."""

    def audit(*models, **options):
        data = audited().to_dict()
        depth = {"depth": {"relearn_area": entry(0.5)}}
        scores = {who: {**groups, **depth} for who, groups in data["scores"].items()}
        content = {
            **data, "scores": scores, "background": 0.0, "data": {"forget_test_pairs": 36, "retain_test_pairs": 324},
        }  # fmt: skip
        return SimpleNamespace(to_dict=lambda: content)

    monkeypatch.setattr(leaderboard, "audit", audit)
    monkeypatch.setattr(leaderboard.unaided, "load_model", lambda name: SimpleNamespace(module=name))
    monkeypatch.setattr(leaderboard, "weights_of", lambda module: module)
    monkeypatch.setattr(leaderboard, "changed_bytes", lambda weights, model: 2**20)
    rows = {CALIBRATED: {"method": CALIBRATED}, "slug": {"method": "slug"}, CONTROL: {"method": CONTROL}}
    found = leaderboard.Board(study(calls), ["seven"], rows, seeds=2, trains=False)
    monkeypatch.setattr(leaderboard.unaided.Record, "content", lambda self: {"runs": self.runs, **self.extra()})
    return found


@pytest.fixture
def unlearned(calls, monkeypatch):
    own = leaderboard.unaided.unlearn
    monkeypatch.setattr(
        leaderboard.unaided, "unlearn", lambda *a, **k: SimpleNamespace(**vars(own(*a, **k)), model="m")
    )
    return calls.unlearned


def test_every_row_runs_seed_by_seed_and_a_further_call_continues(board, unlearned):
    record = leaderboard.Leaderboard("digits", board)
    leaderboard.run_board(board, record)
    order = [(run["seed"], run["method"]) for run in record.runs]
    assert order == [(seed, name) for seed in (0, 1) for name in board.rows]
    control = unlearned[2][3]
    assert control["method"] == CONTROL and (control["learning_rate"], control["steps"]) == (3.16228e-05, 40)
    assert all(run["changed_mib"] == 1.0 and run["pairs"]["forget"] == 36 for run in record.runs)
    kept = json.loads(record.path.read_text())
    kept["runs"] = [run for run in kept["runs"] if (run["seed"], run["method"]) != (1, "slug")]
    record.path.write_text(json.dumps(kept))
    unlearned.clear()
    again = leaderboard.Leaderboard("digits", board)
    assert again.extra()["missing"] == {"seven, seed 1": ["slug"]}
    assert leaderboard_report.missing_line(again.content()).startswith("**Not complete**: 1 of 6 runs are missing (")
    assert leaderboard.estimate(board, again).startswith("digits: 1 runs are missing, about 0 minutes")
    leaderboard.run_board(board, again)
    assert [one[3]["method"] for one in unlearned] == ["slug"] and len(again.runs) == 6


def test_attacks_also_go_to_the_oracles(board, unlearned, calls, monkeypatch):
    monkeypatch.setattr(leaderboard, "ORACLES", ("oracle 1", "oracle 2"))
    board = leaderboard.replace(board, depth=True, seeds=1)
    record = leaderboard.Leaderboard("depth", board)
    leaderboard.run_board(board, record)
    assert [run["method"] for run in record.runs] == ["oracle 1", "oracle 2", *board.rows]
    assert all(run["depth"]["after"]["relearn_area"]["value"] == 0.5 for run in record.runs)
    _, rows = leaderboard_report.depth_table({"runs": record.runs})
    assert [row[0] for row in rows] == [*board.rows, "the oracles, 2", "the original"]
    assert rows[0][1:3] == ("50.0 % (50 to 50)", "–")
    assert rows[-2][1] == "50.0 % ± 0.0 %"
    assert "36 forget and 324 retain pairs" in leaderboard_report.text("depth", {"runs": record.runs})


def test_methods_that_forget_come_first_by_their_gap():
    runs = [run("a", gap=0.3), run("b", gap=0.2), run("c", forget=0.5, gap=0.0), run(CALIBRATED, gap=0.4)]
    record = {"runs": [*runs, run("b", seed=1, gap=0.24), {"method": "d", "seed": 0, "concept": "seven", "error": "e"}]}
    assert leaderboard_report.ranking(record) == ["b", "a", CALIBRATED, "c"]
    head, rows = leaderboard_report.board_table(record)
    assert rows[0][:2] == ("b", "2") and rows[0][head.index("gap")] == "0.220 ± 0.028"
    assert rows[3][head.index("forgets")] == "0 of 1"
    said = leaderboard_report.winner_line(record)
    assert "3 methods" in said and "`b` has the smallest gap" in said and "`calibrated` ranks number 3" in said
    assert "- seven, seed 0, d: e" in leaderboard_report.text("digits", record)


def test_more_than_five_percent_is_forgotten_if_an_oracle_has_as_much():
    assert leaderboard_report.forgets(run("a", forget=0.1)) and not leaderboard_report.forgets(run("a", forget=0.11))


def test_the_overview_keeps_our_own_methods_and_the_control_in_sight():
    names = ["a", "b", "c", CALIBRATED, "cliperase", CONTROL]
    record = {"runs": [run(name, gap=0.1 * number) for number, name in enumerate(names)]}
    other = {"runs": [run("a", gap=0.7)]}
    _, rows = leaderboard_report.overview_table({"digits": record, "shapes": other}, most=2)
    assert [row[0] for row in rows] == ["1. `a`", "2. `b`", "4. `calibrated`", "5. `cliperase`", "6. `retain_finetune`"]
    assert rows[0][-1] == "0.700" and rows[1][-1] == "–"


def test_every_term_of_both_methods_is_left_out_once(monkeypatch):
    options = {"lambda_held": 1000.0}
    monkeypatch.setattr(leaderboard, "recipe_settings", lambda name: {"method": name, "method_options": options})
    found = leaderboard.ablated()
    assert len(found) == 2 + 3 + 6
    assert found["cliperase without FM"]["lambda_forget"] == 0
    assert found["calibrated without level"]["method_options"] == {"lambda_held": 1000.0, "lambda_level": 0.0}


def test_every_method_is_searched_with_as_many_settings_that_it_accepts():
    assert set(search.SETTINGS) == set(methods())
    assert {len(settings) for settings in search.SETTINGS.values()} == {3}
    for method, settings in search.SETTINGS.items():
        assert settings[0] == {}
        for setting in settings:
            made, _ = make_method(UnlearnConfig.from_dict({"method": method, **search.COMMON, **setting}))
            made.check_inputs(None)


def test_every_method_has_a_recipe_that_it_accepts():
    assert recipe_names() == sorted(methods())
    for method in recipe_names():
        made, _ = make_method(UnlearnConfig.recipe(method))
        assert made.name == method
        made.check_inputs(None)


def judgement(kept=True, left=0.0, divergence=0.1):
    return {"kept": kept, "left": left, "divergence": divergence}


def test_a_run_is_judged_by_what_is_left_above_the_target():
    selection = {
        "validation": {"forget": 0.25, "retain": 0.9, "forget_before": 1.0, "retain_before": 0.95},
        "target_reached": False, "within_floor": True, "association": 0.4, "background": 0.1,
        "divergence": {"mean": 0.3},
    }  # fmt: skip
    judged = search.judged(selection)
    assert judged["left"] == pytest.approx((0.4 - 0.1 - 0.05) + (0.25 - 0.05))
    assert judged["kept"] and judged["divergence"] == 0.3
    assert search.judged({**selection, "target_reached": True})["left"] == 0.0


def test_settings_are_ranked_by_what_they_keep_then_by_the_target_then_by_the_divergence():
    better = [
        [judgement(divergence=0.1)], [judgement(divergence=0.2)], [judgement(left=0.2, divergence=0.0)],
        [judgement(kept=False, divergence=0.3)], [judgement(kept=False, left=0.2, divergence=0.4)], [{"error": "e"}],
    ]  # fmt: skip
    ranks = [search.rank(runs) for runs in better]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)


def test_only_complete_rounds_of_the_search_count(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "PATH", tmp_path / "search.json")
    monkeypatch.setattr(search, "SETTINGS", {"a": [{}, {"x": 1}], "b": [{}, {"x": 1}]})
    found = search.Search()

    def add(method, setting, divergence, data=search.FIRST):
        where = {"method": method, "setting": setting, "source": data[0], "concept": data[1]}
        found.runs.append({**where, **judgement(divergence=divergence)})

    assert found.chosen() == {}
    add("a", {}, 0.2)
    add("b", {}, 0.2)
    add("a", {"x": 1}, 0.1)
    assert found.tried == 1 and found.chosen() == {"a": {}, "b": {}}
    add("b", {"x": 1}, 0.3)
    assert found.tried == 2 and found.chosen() == {"a": {"x": 1}, "b": {}}
    for method in ("a", "b"):
        add(method, {}, 0.0, search.SECOND)
        add(method, {"x": 1}, 0.5, search.SECOND)
    assert found.chosen() == {"a": {}, "b": {}}, "both concepts count"
