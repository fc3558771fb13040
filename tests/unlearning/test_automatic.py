"""`unlearn()` without numbers, on a small model that knows four colours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import kill_once
from safetensors.torch import load_file

import cliperase_fast as cf
from cliperase_fast.evaluation import EncodedPairs
from cliperase_fast.unlearning import recipe, selection
from cliperase_fast.unlearning.methods import ClosedFormMethod, registry
from cliperase_fast.unlearning.preflight import check_forgettable
from cliperase_fast.unlearning.selection import Candidate
from cliperase_fast.unlearning.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "auditing"))
from small import make_model, make_pairs, training_and_test

QUIET = {"method": "cliperase", "progress": False, "report": False, "val_fraction": 0.25}
FORGET, RETAIN, TEST = training_and_test()


def run(output=None, resume=False, model=None, **changes):
    model = make_model() if model is None else model
    return cf.unlearn(model, FORGET, RETAIN, test=TEST, output_dir=output, resume=resume, **{**QUIET, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, run(output)


def test_a_call_without_numbers_forgets_and_keeps_the_rest(whole):
    _, result = whole
    assert result.before["forget"]["image_to_text_r@1"] > 0.9
    assert result.after["forget"]["image_to_text_r@1"] == 0
    assert result.after["retain"]["image_to_text_r@1"] > 0.9
    assert result.config.learning_rate == result.config.epochs == "auto"
    assert (result.config.batch_size, result.config.forget_fraction, result.config.select) == (128, 0.25, "divergence")


def test_the_record_says_what_was_tried_and_why_training_ended(whole):
    record = whole[1].record["recipe"]
    target = record["target"]
    assert target["association"] == pytest.approx(target["background"] + 0.05)
    reached = [probe for probe in record["probes"] if probe["reached"]]
    assert reached and record["learning_rate"] == min(reached, key=lambda probe: probe["divergence"])["rate"]
    for probe in reached:
        assert probe["association"] <= target["association"] and probe["forget"] <= 0.05 and probe["steps"] == 30
    assert "the target was reached at step" in record["stop"]
    assert record["why"]


def test_the_chosen_probe_is_the_beginning_of_the_run(whole):
    _, result = whole
    own = [line for line in result.history if "probe" not in line and "total" in line]
    assert [line["step"] for line in own] == list(range(1, result.record["recipe"]["steps"] + 1))
    rate = result.record["recipe"]["learning_rate"]
    rates = [line["learning_rate"] for line in own]
    assert rates == sorted(rates, reverse=True)
    first, second = result.record["recipe"]["lowered"]
    assert [rates[step] / rate for step in (first - 1, first, second)] == pytest.approx([1.0, 0.3, 0.1])
    assert sorted(set(rates), reverse=True) == pytest.approx([rate * factor for factor in recipe.STAGES])
    tried = {line["probe"] for line in result.history if "probe" in line}
    assert tried == {probe["rate"] for probe in result.record["recipe"]["probes"]}


def test_the_result_says_how_uncertain_the_choice_is(whole):
    selection = whole[1].selection
    assert selection["pairs"] == {"forget": 3, "retain": 9}
    assert selection["intervals"]["forget"] == pytest.approx([0.0, 0.5615], abs=1e-3)
    assert selection["target_reached"] and selection["within_floor"]
    assert selection["target"] == whole[1].record["recipe"]["target"] and selection["outside_floors"] == 0
    assert selection["divergence"]["mean"] < 0.1 and selection["divergence"]["pairs"] == 9
    assert selection["association"] <= selection["background"] + 0.05
    assert any("rests on 3 forget and 9 retain pairs" in note for note in whole[1].record["notes"])


def test_the_same_numbers_given_lead_to_the_same_weights():
    found = run(method="gradient_ascent", select="last", steps=45)
    given = run(
        method="gradient_ascent", select="last", learning_rate=found.record["recipe"]["learning_rate"], steps=45,
        batch_size=128, forget_fraction=0.25,
    )  # fmt: skip
    assert given.record["recipe"] is None
    ours, theirs = found.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("steps", [8, 35])
def test_a_given_number_of_steps_is_obeyed(steps):
    result = run(steps=steps)
    record = result.record["recipe"]
    assert record["steps"] == steps and record["stop"] == "the number of steps was given"
    assert max(probe["steps"] for probe in record["probes"]) == min(steps, 30)


def test_a_rate_and_a_number_of_steps_leave_nothing_to_find():
    result = run(learning_rate=1e-3, steps=25)
    own = [line["step"] for line in result.history if "total" in line]
    evaluated = [line["step"] for line in result.history if "validation" in line]
    assert own == list(range(1, 26)) and evaluated == [10, 20, 25]
    assert result.record["recipe"] is None
    assert (result.config.batch_size, result.config.select) == (16, "floor")
    assert result.selection["reason"].startswith("Step ")


def test_a_given_rate_is_trained_until_the_target_without_probes():
    record = run(learning_rate=1e-3).record["recipe"]
    assert record["probes"] == [] and record["learning_rate"] == 1e-3
    assert "the target was reached" in record["stop"]


@pytest.mark.parametrize("epochs", [8, 35])
def test_a_given_number_of_epochs_is_obeyed(epochs):
    result = run(epochs=epochs)
    record = result.record["recipe"]
    assert record["steps"] == epochs and record["probes"]
    assert max(probe["steps"] for probe in record["probes"]) == min(epochs, 30)


@pytest.mark.parametrize(
    "changes",
    [{"trainable": "lora"}, {"trainable": "last:1"}, {"trainable": "text"}, {"grad_cache_chunk": 8, "accumulate": 2},
     {"precision": "bf16"}, {"warmup_steps": 5}],
    ids=str,
)  # fmt: skip
def test_every_way_of_training_finds_a_rate(changes):
    result = run(epochs=30, **changes)
    assert result.record["recipe"]["probes"]
    assert result.after["forget"]["association"] < result.before["forget"]["association"] - 0.3


class Stop(Exception):
    pass


def stop_at(monkeypatch, calls):
    """Raise in the step with this number, counted over all probes."""
    step, seen = Trainer.step, []

    def counted(self, done, batches):
        seen.append(done)
        if len(seen) == calls:
            raise Stop
        return step(self, done, batches)

    monkeypatch.setattr(Trainer, "step", counted)
    return seen


def weights(output):
    return load_file(Path(output) / "model" / "open_clip_model.safetensors")


def assert_same_run(output, other):
    ours, theirs = weights(output), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads((Path(path) / "result.json").read_text()) for path in (output, other)]
    for record in records:
        for probe in record["recipe"]["probes"]:
            del probe["seconds"]
    assert records[0]["recipe"] == records[1]["recipe"]
    assert records[0]["selection"] == records[1]["selection"]


@pytest.mark.parametrize(("first", "calls", "saved"), [(-8, 5, 0), (-8, 35, 1), (-6, 65, 2)])
def test_a_run_that_stops_during_the_probes_continues_to_the_same_bits(tmp_path, monkeypatch, first, calls, saved):
    """The last case stops in a probe after the one that is chosen, whose steps are repeated."""
    monkeypatch.setattr(recipe, "first_rate", lambda parameters: recipe.rate_at(first))
    monkeypatch.setattr(recipe, "UNNOTICED", 0.0)  # so that lower rates are tried
    whole = run(tmp_path / "whole", epochs=45)
    with monkeypatch.context() as patched:
        stop_at(patched, calls)
        with pytest.raises(Stop):
            run(tmp_path / "run", epochs=45)
    done = [probe["steps"] for probe in whole.record["recipe"]["probes"]]
    state = json.loads((tmp_path / "run/checkpoints/step-00000000/state.json").read_text())
    assert [probe["steps"] for probe in state["probes"]] == done[:saved]
    with monkeypatch.context() as patched:
        seen = stop_at(patched, -1)
        result = run(tmp_path / "run", resume=True, epochs=45)
    chosen = [probe["rate"] for probe in result.record["recipe"]["probes"]].index(
        result.record["recipe"]["learning_rate"]
    )
    assert seen.count(0) == len(done) - saved + (chosen < saved)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [line["step"] for line in result.history] == [line["step"] for line in whole.history]


def test_a_run_that_stalls_gives_the_level_more_weight_and_resumes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MARGIN", -3.0)  # below every cosine, so that no run gets there
    monkeypatch.setattr(recipe, "LEAST_IMPROVEMENT", 1.0)  # nothing counts as coming closer
    options = {"method": "calibrated", "learning_rate": 1e-3, "early_stop": 1, "checkpoint_every": 10}
    whole = run(tmp_path / "whole", **options)
    pressed = whole.record["recipe"]["pressed"]
    assert [step - pressed[0] for step in pressed] == [0, 20, 40]
    weights = {"retain": 1, "forget": 3, "consistency": 3, "anchor": 30, "held": 3000}
    for line in whole.history:
        if "total" in line:
            level = line["total"] - sum(weight * line[name] for name, weight in weights.items())
            rises = sum(line["step"] > step for step in pressed)
            assert level == pytest.approx(33 * 3**rises * line["level"], rel=1e-3, abs=1e-4)
    with monkeypatch.context() as patched:
        stop_at(patched, pressed[1] + 5)
        with pytest.raises(Stop):
            run(tmp_path / "run", **options)
    run(tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("method", ["cliperase", "calibrated"])
def test_a_rate_at_which_the_weights_overflow_is_not_taken(monkeypatch, method):
    monkeypatch.setattr(recipe, "first_rate", lambda parameters: recipe.rate_at(40))
    result = run(method=method, epochs=45)
    probes = result.record["recipe"]["probes"]
    assert probes[0]["stopped"] == "not finite" and probes[0]["divergence"] is None
    chosen = next(probe for probe in probes if probe["rate"] == result.record["recipe"]["learning_rate"])
    assert chosen["stopped"] != "not finite" and chosen["divergence"] is not None


def fail_steps(monkeypatch, fails):
    """Let the gradient be not finite in steps of which `fails` (given the trainer and how many are done) says so."""
    step = Trainer._step

    def failing(self, done, batches):
        if fails(self, done):
            raise self._not_finite(done, "gradient", {"total": 1.0})
        return step(self, done, batches)

    monkeypatch.setattr(Trainer, "_step", failing)


def test_where_every_rate_overflows_the_error_names_those_that_were_tried(monkeypatch):
    fail_steps(monkeypatch, lambda trainer, done: done > 0)
    with pytest.raises(cf.UnlearningError, match=r"no learning rate was found: .* 29 rates .* to 0.0001\. Give"):
        run(steps=8)


@pytest.mark.parametrize(
    ("reached", "says"),
    [(True, "proves too high. Give a lower"), (False, "No rate that was tried reached the target: check that forget")],
)
def test_training_that_overflows_at_a_rate_that_was_found_says_so(monkeypatch, reached, says):
    if not reached:
        monkeypatch.setattr(selection, "MARGIN", -3.0)  # below every cosine
    fail_steps(monkeypatch, lambda trainer, done: trainer.state.rate > 0 and done == 31)
    with pytest.raises(cf.UnlearningError, match=r"The learning rate 0.* was found automatically and proves") as told:
        run()
    assert says in str(told.value) and "(now" not in str(told.value) and "fp32" not in str(told.value)


def test_values_that_overflow_before_any_step_are_not_blamed_on_the_rate(monkeypatch):
    fail_steps(monkeypatch, lambda trainer, done: done == 0)
    with pytest.raises(cf.UnlearningError, match=r"No step has changed the weights yet, .*: check the model") as told:
        run()
    assert "learning_rate" not in str(told.value)


@pytest.mark.parametrize("lines", [20, 90])
def test_a_run_killed_by_sigkill_resumes_to_the_same_weights(tmp_path, whole, lines):
    output = tmp_path / "run"
    log = output / "metrics.jsonl"
    kill_once(lambda: log.is_file() and log.read_bytes().count(b"\n") >= lines, run, output)
    assert not (output / "result.json").exists(), "the run ended before it could be killed"
    run(output, resume=True)
    assert_same_run(output, whole[0])


def test_forget_pairs_at_the_target_are_an_error_before_anything_is_written(tmp_path):
    model = run(learning_rate=1e-3, epochs=30, batch_size=64).model
    with pytest.raises(cf.InputError, match=r"there is nothing to forget: on the validation split the model scores"):
        run(tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("score", "count", "noted"),
    [(0.5, 40, False), (0.25, 40, True), (0.0, 10, True), (0.25, 4, False), (0.0, 1, False)],  # 1: it cannot tell
)
def test_forget_pairs_known_only_by_chance_are_noted_if_enough_of_them_say_so(score, count, noted):
    encoded = EncodedPairs(torch.eye(8, 4), torch.eye(4), [np.array([row % 4]) for row in range(8)], torch.eye(4))
    pairs = SimpleNamespace(classes=("a", "b", "c", "d"))
    part = SimpleNamespace(pairs=pairs, n_forget=count, forget_mask=np.arange(8) < 4)
    baseline = SimpleNamespace(validation=Candidate(0, 0, score, 1.0, 1.0), validation_encoded=encoded)
    notes = check_forgettable(False, "related", part, baseline, 1.0)
    assert any("did not know the forget pairs better than by chance" in note for note in notes) is noted


def test_a_target_that_no_rate_reaches_within_the_floor_is_reported(monkeypatch):
    monkeypatch.setattr(recipe, "MAX_STEPS", 40)
    result = run(worst_class_floor=0.0, method="gradient_ascent")
    assert result.selection["target_reached"] is False or result.selection["within_floor"] is False
    assert "gave way" in result.selection["reason"]
    assert result.selection["outside_floors"] > 0


def test_retain_pairs_whose_captions_are_mostly_unique_need_no_shared_classes():
    """The forget captions make classes, of which each split has others, as each caption of its own is one."""
    retain = [(image, f"{caption} number {i}") for i, (image, caption) in enumerate(RETAIN)]
    test = TEST[0], [(image, f"{caption} number {i}") for i, (image, caption) in enumerate(TEST[1])]
    result = cf.unlearn(make_model(), FORGET, retain, test=test, steps=10, **QUIET)
    assert result.selection["divergence"]["pairs"] == 9


OWN = tuple([pair for pair in make_pairs(6, seed=7) if ("red" in pair[1]) is wanted] for wanted in (True, False))


def test_own_validation_pairs_replace_the_held_out_ones(tmp_path):
    result = run(tmp_path / "run", validation=OWN, epochs=10)
    assert result.selection["pairs"] == {"forget": 6, "retain": 18}
    assert result.record["data"]["forget_pairs"] == len(FORGET), "none of them is held out"
    joined = run(validation=[*OWN[0], *OWN[1]], epochs=10)
    assert joined.selection["validation"] == result.selection["validation"]
    with pytest.raises(cf.InputError, match="it was made with other data"):
        run(tmp_path / "run", resume=True, validation=(OWN[0], OWN[1][:-1]), epochs=10)


def test_as_many_validation_pairs_as_test_pairs_are_other_pairs():
    own = tuple([pair for pair in make_pairs(8, seed=7) if ("red" in pair[1]) is wanted] for wanted in (True, False))
    assert [len(part) for part in own] == [len(part) for part in TEST]
    assert run(validation=own, epochs=1).selection["pairs"] == {"forget": 8, "retain": 24}


def test_test_pairs_are_refused_as_validation_pairs():
    with pytest.raises(cf.InputError, match="the forget validation pairs are the forget test pairs"):
        run(validation=TEST)
    with pytest.raises(cf.InputError, match="0 of the 18 validation pairs share a caption with the forget pairs"):
        run(validation=OWN[1])


class Nudge(ClosedFormMethod):
    name, summary, source = "nudge", "moves the weights a little", "a test"

    def edit(self, run, evaluate):
        for _, parameter in run.parameters:
            parameter.mul_(1.01)


@pytest.mark.parametrize(("select", "measured"), [("auto", False), ("divergence", True)])
def test_a_method_without_training_selects_by_the_floor_unless_asked(monkeypatch, select, measured):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    cf.register_method(Nudge)
    result = run(method="nudge", select=select)
    assert result.config.select == ("divergence" if measured else "floor")
    assert (result.selection["divergence"] is not None) is measured
    assert (result.selection["background"] is not None) is measured
    assert result.record["recipe"] is None
