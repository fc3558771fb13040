"""`unlearn(audit=True)`: the audit of a run, what it leaves alone, and what happens when it fails or is killed."""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from processes import context
from safetensors.torch import load_file
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs
from transformers import CLIPModel

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError
from cliperase_fast.auditing import Audit
from cliperase_fast.models import load_model
from cliperase_fast.report import audit_advice
from cliperase_fast.unlearning import auditing

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import tiny_clip

PAIRS = split_pairs(make_pairs(), "red")
TEST = split_pairs(make_pairs(seed=5), "red")


def run(model=None, **changes):
    model = make_tiny_clip() if model is None else model
    return cf.unlearn(model, *PAIRS, **{"test": TEST, **QUICK, "audit": True, **changes})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights(result):
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}


def assert_scores_of_run(result):
    """The audit scored the models whose scores the run has."""
    for model, scores in (("before", result.before), ("after", result.after)):
        found = result.audit.scores[model]
        for group, score, ours in (
            ("forgetting", "association", scores["forget"]["association"]),
            ("forgetting", "zero_shot_top1", scores["forget"]["zero_shot_top1"]),
        ):
            assert found[group][score]["value"] == pytest.approx(ours, abs=1e-5)


def test_a_run_is_audited_on_its_own_test_split_and_the_audit_is_saved(tmp_path):
    output = tmp_path / "run"
    result = run(output_dir=output)
    assert isinstance(result.audit, Audit)
    assert_scores_of_run(result)
    assert result.audit.data["forget_test_pairs"] == len(TEST[0])
    assert read(output / "audit.json") == result.audit.to_dict()
    mentioned = read(output / "result.json")["audit"]
    assert mentioned == {
        "depth": True, "verdicts": result.audit.verdicts, "over_forgotten": result.audit.over_forgotten,
        "background": result.audit.background, "gap": None,
    }  # fmt: skip
    assert result.audit.verdicts["forgetting"] in result.summary()
    card = (output / "model" / "README.md").read_text(encoding="utf-8")
    assert "No audit was made" not in card
    assert "The cosine with their own captions is" in card
    assert result.record["seconds"]["total"] > result.record["seconds"]["audit"] > 0


def test_the_audit_changes_neither_the_result_nor_the_model_nor_the_generators():
    model = make_tiny_clip()
    given = copy.deepcopy(model.state_dict())
    torch.manual_seed(4)
    plain = run(model, audit=False)
    generator = torch.get_rng_state()
    torch.manual_seed(4)
    audited = run(model)
    assert plain.audit is None and plain.record["audit"] is None
    assert torch.equal(torch.get_rng_state(), generator)
    ours, theirs = weights(audited), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in audited.model.parameters())
    assert (audited.after, audited.history[-1]) == (plain.after, plain.history[-1])


@pytest.mark.parametrize(("chosen", "depth"), [(True, False), ("depth", True), ("full", "full")])
def test_the_setting_says_how_deep_the_audit_goes(monkeypatch, chosen, depth):
    asked = []

    def audit_models(*arguments, depth):
        asked.append(depth)
        return real(*arguments)

    real = auditing.audit_models
    monkeypatch.setattr(auditing, "audit_models", audit_models)
    result = run(audit=chosen)
    assert asked == [depth]
    assert result.record["audit"]["depth"] == chosen


def test_returned_weights_are_audited_where_they_are_rounded():
    result = run(make_tiny_clip().bfloat16(), learning_rate=3e-3)
    assert result.record["weights"]["returned"] == "bfloat16"
    assert_scores_of_run(result)
    trained = run(make_tiny_clip().bfloat16().float(), learning_rate=3e-3)
    assert trained.audit.scores["after"] != result.audit.scores["after"], "not those of the weights before rounding"


@pytest.mark.parametrize("trainable", ["lora", "text"])
def test_a_model_named_by_a_string_is_loaded_again(tmp_path, trainable):
    load_model(make_tiny_clip()).save(tmp_path / "model")
    named = run(f"local-dir:{tmp_path / 'model'}", trainable=trainable, audit=True)
    assert_scores_of_run(named)
    assert named.audit.scores["before"] == run(trainable=trainable).audit.scores["before"]


def test_an_original_that_changed_meanwhile_is_not_audited(tmp_path, monkeypatch):
    load_model(make_tiny_clip()).save(tmp_path / "model")

    def changed(*arguments):
        load_model(make_tiny_clip(seed=1)).save(tmp_path / "model")
        return original(*arguments)

    original = auditing._audit
    monkeypatch.setattr(auditing, "_audit", changed)
    with pytest.raises(UnlearningError, match="has other weights than when the run began"):
        run(f"local-dir:{tmp_path / 'model'}", output_dir=tmp_path / "run")
    assert read(tmp_path / "run" / "result.json")["after"]


def test_the_pairs_held_out_as_test_split_are_noted():
    result = run(test=None)
    assert_scores_of_run(result)
    assert any("no test split" in note for note in result.audit.notes)
    assert not any("no test split" in note for note in run().audit.notes)


@pytest.mark.filterwarnings("ignore:oracle . seems to know")
def test_oracles_give_the_gap():
    oracles = [make_tiny_clip(seed=1), make_tiny_clip(seed=2)]
    result = run(oracle=oracles)
    assert {"oracle", "oracle 1", "oracle 2"} < set(result.audit.scores)
    assert result.record["audit"]["gap"] == result.audit.gap["mean"] > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"audit": False, "oracle": make_tiny_clip()}, "oracle= is for the audit: pass audit=True"),
        ({"oracle": "local-dir:absent"}, "oracle 1: .*absent"),
        (
            {"oracle": [make_tiny_clip(), make_tiny_clip(image_size=12)]},
            "oracle 2 cannot encode the images",
        ),
        ({"audit": "deep"}, "audit='deep' must be true, false, depth or full"),
    ],
    ids=["no audit", "absent", "other images", "unknown"],
)
def test_wrong_input_for_the_audit_is_an_error_before_training(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        run(output_dir=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("raised", "expected"), [(InputError("bad features"), InputError), (RuntimeError("bad features"), UnlearningError)]
)
def test_a_failed_audit_costs_nothing_of_the_saved_result(tmp_path, monkeypatch, raised, expected):
    output = tmp_path / "run"

    def fail(*arguments, **options):
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(auditing, "audit_models", fail)
        with pytest.raises(expected, match="bad features") as error:
            run(output_dir=output)
    record = read(output / "result.json")
    assert f"are saved in {output}" in str(error.value) and "\n" not in str(error.value)
    assert audit_advice(record, output / "model", output) in str(error.value)
    assert record["audit"] is None and not (output / "audit.json").exists()
    assert "No audit was made" in (output / "model" / "README.md").read_text()
    saved = load_file(output / "model" / "open_clip_model.safetensors")

    result = run(output_dir=output, resume=True)
    assert read(output / "audit.json") == result.audit.to_dict()
    again = load_file(output / "model" / "open_clip_model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_without_a_directory_a_failed_audit_is_a_warning_and_a_note(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("bad features")

    monkeypatch.setattr(auditing, "audit_models", fail)
    with pytest.warns(UserWarning, match="the audit failed, and the result has none: RuntimeError: bad features"):
        result = run()
    assert result.audit is None
    assert "The audit failed: RuntimeError: bad features." in result.summary()


def _killed_during_the_audit(output):
    def kill(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    auditing.audit_models = kill
    run(output_dir=output)


def test_a_run_killed_during_its_audit_resumes_with_the_audit(tmp_path):
    output = tmp_path / "run"
    process = context().Process(target=_killed_during_the_audit, args=(output,), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read(output / "result.json")["audit"] is None, "the result was saved before the audit began"
    resumed = run(output_dir=output, resume=True)
    whole = run(output_dir=tmp_path / "whole")
    assert resumed.audit.to_dict() == whole.audit.to_dict() == read(output / "audit.json")
    files = [{path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (output, tmp_path / "whole")]
    assert files[0] == files[1]


def test_a_finished_run_can_be_audited_later_and_a_result_without_audit_keeps_no_old_one(tmp_path):
    output = tmp_path / "run"
    assert run(output_dir=output, audit=False).audit is None
    result = run(output_dir=output, resume=True)
    assert result.audit is not None and (output / "audit.json").exists()
    result.save(tmp_path / "copy")
    assert read(tmp_path / "copy" / "audit.json") == result.audit.to_dict()
    assert "No audit was made" not in (tmp_path / "copy" / "model" / "README.md").read_text()
    run(output_dir=output, resume=True, audit=False)
    assert not (output / "audit.json").exists() and not (output / "audit.html").exists()


def test_a_transformers_model_with_a_card_loads_in_its_library(tmp_path):
    pairs = [(torch.full((3, 16, 16), i % 3 - 1.0) + i / 50, torch.tensor([8, 1 + i % 3, 9])) for i in range(36)]
    forget, retain = [p for p in pairs if p[1][1] == 1], [p for p in pairs if p[1][1] != 1]
    result = cf.unlearn(tiny_clip(), forget, retain, output_dir=tmp_path / "run", **{**QUICK, "audit": True})
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.library_name == "transformers"
    loaded, ours = CLIPModel.from_pretrained(tmp_path / "run" / "model").state_dict(), result.model.state_dict()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)
    assert result.audit.scores["after"]["forgetting"]["association"]["value"] is not None
