"""`unlearn()` on two ranks: the curve, the scores and the files of one process; errors that name rank and remedy."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from ranks import COLLECTIVE_TIMEOUT, Ranks
from runs import (
    features_of,
    run,
    run_below_the_resolution,
    run_fatally,
    run_half,
    run_here,
    run_with_random_views,
    told,
)

from cliperase_fast import InputError, UnlearnConfig, UnlearningError
from cliperase_fast import distributed as cfd
from cliperase_fast.unlearning import auditing, trainer
from cliperase_fast.unlearning.engines.deepspeed import ZeroEngine
from cliperase_fast.unlearning.engines.deepspeed_config import read_deepspeed
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.engines.zero3 import Zero3Engine

SIGLIP = {"logit_bias": -4.0}
UNEVEN = {"batch_size": 12, "forget_fraction": 0.42}


def assert_same_run(found, alone):
    assert np.allclose(found["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
    assert np.allclose(found["norms"], alone["norms"], rtol=1e-3)
    for part in ("forget", "retain"):
        assert found["scores"][part]["zero_shot_top1"] == alone["scores"][part]["zero_shot_top1"]
    assert found["selection"]["step"] == alone["selection"]["step"]
    assert found["selection"]["background"] == pytest.approx(alone["selection"]["background"], abs=1e-5)
    assert np.allclose(found["features"], alone["features"], atol=1e-3)


SINGLE_PROCESS: dict[str, dict] = {}


def alone(**changes):
    """The run of one process, once for all tests that compare with it."""
    key = repr(sorted(changes.items()))
    if key not in SINGLE_PROCESS:
        SINGLE_PROCESS[key] = told(run(**changes))
    return SINGLE_PROCESS[key]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "grad_clip": 0.5, "grad_cache_chunk": 2},
        {"trainable": "image", "consistency": "intra"},
        {"method": "gradient_ascent", **UNEVEN},
        {"method": "retain_finetune", "forget_fraction": 0.1},
        {"method": "calibrated", **UNEVEN, "learning_rate": 1e-4},
        {"method": "gradient_difference", **UNEVEN},
        {"method": "kl_minimization", **UNEVEN},
        {"method": "multidelete", **UNEVEN},
        {"method": "salun", **UNEVEN},
        {"method": "balanced", **UNEVEN},
        {"method": "masked_distillation", **UNEVEN},
        {"method": "calibrated", **UNEVEN, "learning_rate": 1e-4, "clip": SIGLIP, "grad_cache_chunk": 2},
        {"method": "calibrated", **UNEVEN, "learning_rate": 1e-4, "trainable": "text",
         "method_options": {"lambda_hidden": 5.0}},
        {"method": "calibrated", **UNEVEN, "learning_rate": 1e-4, "rename": {"green square": "green dot"}},
        {"method": "cliperase", **UNEVEN, "select": "divergence", "rename": {"green square": "green dot"}},
    ],
    ids=[
        "plain",
        "accumulated, clipped, in chunks",
        "one tower",
        "gradient ascent, uneven shares",
        "no forget pairs",
        "calibrated, uneven shares",
        "gradient difference",
        "KL minimisation",
        "MultiDelete",
        "SalUn",
        "balanced",
        "masked distillation",
        "calibrated, the sigmoid loss, in chunks",
        "calibrated, hidden states held",
        "calibrated, levels of related classes",
        "cliperase, the level of related classes as target",
    ],
)  # fmt: skip
def test_the_curve_and_the_scores_are_those_of_one_process(two, changes):
    first, second = two.run(run_here, changes)
    assert_same_run(first, alone(**changes))
    assert first["losses"] == second["losses"] and first["scores"] == second["scores"]
    assert np.array_equal(first["features"], second["features"]), "the ranks' weights are equal to the last bit"


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": "zero1", "grad_clip": 0.5},
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "grad_cache_chunk": 2, "accumulate": 2},
        {"deepspeed": "zero3"},
        {"deepspeed": "zero3", "clip": SIGLIP, "method": "calibrated", "learning_rate": 1e-4},
        {"deepspeed": "zero3", "method": "calibrated", "learning_rate": 1e-4, **UNEVEN, "teacher_cache": "off",
         "rename": {"green square": "green dot"}},
        # Chunks of one: the second rank has a pair of each kind less, and encodes as often as the first.
        {"deepspeed": "zero3", "grad_cache_chunk": 1, "accumulate": 2, "teacher_cache": "off", "eval_batch_size": 1,
         **UNEVEN},
    ],
    ids=[
        "1",
        "2, offloaded, in chunks",
        "3",
        "3, the sigmoid loss",
        "3, levels of related classes, live teacher",
        "3, in chunks, live teacher",
    ],
)  # fmt: skip
def test_zero_follows_one_process(two, changes):
    plain = {name: value for name, value in changes.items() if name != "deepspeed"}
    for found in two.run(run_here, changes):
        assert_same_run(found, alone(**plain))


def _left_behind(rank: int) -> tuple[list[str], bool]:
    from deepspeed.ops.op_builder.builder import OpBuilder

    run(deepspeed="zero3", epochs=1)
    return list(OpBuilder._loaded_ops), torch.nn.functional.linear is torch._C._nn.linear


def test_deepspeed_compiles_nothing_and_torch_is_left_as_it_was(two):
    assert two.run(_left_behind) == [([], True)] * 2


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_bf16_under_zero_stays_near(two, deepspeed):
    found, _ = two.run(run_here, {"deepspeed": deepspeed, "precision": "bf16", "epochs": 1})
    assert np.allclose(found["losses"], alone(epochs=1)["losses"], atol=0.1)
    assert not np.allclose(found["losses"], alone(epochs=1)["losses"], atol=1e-4)


@pytest.mark.parametrize("deepspeed", ["", "zero2", "zero3"])
def test_half_precision_weights_and_tiny_steps_are_as_on_one_process(two, deepspeed):
    expected = run_half(0, {})
    for found in two.run(run_half, {"deepspeed": deepspeed}):
        assert np.allclose(found["losses"], expected["losses"], rtol=0, atol=1e-4)
        assert found["weights"] == {"given": "bfloat16", "trained": "float32", "returned": "bfloat16"}
        assert found["shares"] == pytest.approx(expected["shares"], abs=1e-3)
    assert all("changed none of the weights" in text for text in two.run(run_below_the_resolution, deepspeed))


def test_random_views_are_those_of_one_process(two):
    found, _ = two.run(run_with_random_views, {})
    assert_same_run(found, run_with_random_views(0, {}))


def test_dropout_draws_are_those_of_the_step_not_of_the_run(two):
    changes = {"clip": {"patch_dropout": 0.5}, "epochs": 1}
    first, again = two.run(run_here, changes)[0], two.run(run_here, changes)[0]
    assert first["losses"] == again["losses"]
    assert first["losses"] != alone(**changes)["losses"]


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
def test_one_rank_writes_and_the_model_loads_alone(two, tmp_path, deepspeed):
    output = tmp_path / "run"
    changes = {"deepspeed": deepspeed, "teacher_cache": "disk", "epochs": 1, "logger": "tensorboard"}
    found, _ = two.run(run_here, {"output_dir": output, **changes})
    assert len(list((output / "tensorboard").iterdir())) == 1
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "total" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)), "every step stands there once"
    assert all(len(line["rank_pairs_per_second"]) == 2 for line in steps)
    assert json.loads((output / "result.json").read_text())["ranks"] == 2
    assert not (output / "cache").exists()
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{output / 'model'}")
    assert np.allclose(features_of(model), found["features"], atol=1e-6)


def _audited(rank: int, changes: dict) -> dict:
    return run(epochs=1, audit=True, **changes).audit.to_dict()


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
def test_an_audited_run_gives_all_ranks_one_audit_and_the_first_writes_it(two, tmp_path, deepspeed):
    output = tmp_path / "run"
    first, second = two.run(_audited, {"deepspeed": deepspeed, "output_dir": output})
    assert first == second == json.loads((output / "audit.json").read_text())
    assert json.loads((output / "result.json").read_text())["audit"]["verdicts"] == first["verdicts"]
    alone = _audited(0, {})
    for model in ("before", "after"):
        ours, theirs = (found["scores"][model]["forgetting"]["association"]["value"] for found in (first, alone))
        assert ours == pytest.approx(theirs, abs=1e-4)


def _failing_audit(rank: int, output: Path) -> str:
    def fail(*arguments, **options):
        raise RuntimeError("bad features")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auditing, "audit_models", fail)
        try:
            run(epochs=1, audit=True, output_dir=output)
        except UnlearningError as error:
            return str(error)
    return "it ran"


def test_an_audit_that_fails_on_the_ranks_names_the_saved_result(two, tmp_path):
    output = tmp_path / "run"
    expected = f"RuntimeError: bad features); the unlearned model and its result are saved in {output}"
    assert all(expected in found for found in two.run(_failing_audit, output))


def back_to(output: Path, step: int) -> None:
    """As if the run had been killed after that step."""
    for path in (output / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (output / "result.json").unlink()


def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(two, tmp_path):
    settings = {"output_dir": tmp_path / "run", "keep_checkpoints": 9, "optimizer": "adamw", "weight_decay": 0.1}
    whole = alone(optimizer="adamw", weight_decay=0.1)
    two.run(run_here, {**settings, "deepspeed": "zero2"})
    for step, changes in ((3, None), (6, {"deepspeed": "zero3"}), (3, {}), (3, {"deepspeed": "zero1"})):
        back_to(tmp_path / "run", step)
        going_on = {**settings, "resume": True}
        found = told(run(**going_on)) if changes is None else two.run(run_here, {**going_on, **changes})[0]
        assert_same_run(found, whole)


def _with_a_bad_gradient(rank: int, changes: dict) -> tuple[str, list[str]]:
    """What is said of it, and which weights and moments that step has changed."""
    changed = []
    stage = changes.get("deepspeed")

    class Watched(Zero3Engine if stage == "zero3" else ZeroEngine if stage else LocalEngine):
        steps = 0

        def _held(self):
            return {**self.weights(), **self.state().moments["exp_avg"]}

        def _backpropagate(self, scalar):
            super()._backpropagate(scalar * float("nan") if rank == self.steps == 1 else scalar)

        def step(self, rate):
            before = {name: tensor.clone() for name, tensor in self._held().items()}
            self.steps += 1
            found = super().step(rate)
            if self.steps == 2:
                changed.extend(name for name, tensor in self._held().items() if not torch.equal(tensor, before[name]))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, Watched.__base__.__name__, Watched)
        try:
            run(**changes)
        except UnlearningError as error:
            return str(error), changed
    return "nothing", changed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deepspeed": "zero1", "precision": "bf16"},
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        {"deepspeed": "zero3", "grad_clip": 1.0},
    ],
    ids=["plain", "1, bf16", "2, offloaded", "3"],
)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weights(two, changes):
    for said, changed in two.run(_with_a_bad_gradient, changes):
        assert "the gradient is not finite at step 2" in said and "before that step changed the weights" in said
        assert changed == []


def _with_something_else(rank: int, what: str) -> None:
    changes = {"learning_rate": 1e-4} if what == "setting" else {"clip": {"width": 48}} if what == "model" else {}
    if what in ("data", "sizes"):
        from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

        import cliperase_fast as cf

    if what == "data":
        cf.unlearn(make_tiny_clip(), *split_pairs(make_pairs(6 + rank), "red"), **QUICK)
    if what == "sizes":  # the second rank's share of the retain test pairs are of another size
        forget, retain = split_pairs(make_pairs(), "red")
        retain_test = [
            (torch.cat([image] * 2, 2) if i >= 12 else image, text) for i, (image, text) in enumerate(retain)
        ]
        test = (forget, retain_test)
        cf.unlearn(make_tiny_clip(), forget, retain, test=test, **{**QUICK, "eval_batch_size": 12})
    if what == "directory" and rank == 0:
        changes = {"output_dir": __file__}
    run(**(changes if rank == 1 or what == "directory" else {}))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("setting", "ranks differ in learning_rate (0.001 on rank 0, 0.0001 on rank 1)"),
        ("model", "ranks differ in the model"),
        ("data", "ranks differ in the pairs"),
        ("directory", "test_unlearn_on_ranks.py is a file"),
        ("sizes", "the model cannot encode images of shape (3, 8, 16)"),
    ],
)
def test_ranks_that_differ_are_all_told_at_once(two, what, text):
    began = time.monotonic()
    for fine, answer in two.try_all(_with_something_else, what):
        assert not fine
        assert answer[0] == "InputError" and text in answer[1], answer[2]
    assert time.monotonic() - began < COLLECTIVE_TIMEOUT.total_seconds()


def _refused(rank: int, changes: dict) -> str:
    try:
        run(**changes)
    except InputError as error:
        return str(error)
    return "nothing"


def test_what_ranks_cannot_do_is_said_before_anything_is_done(two):
    for changes, text in (
        ({"batch_size": 2}, "each of the 2 ranks needs one forget and one retain pair: raise batch_size"),
        ({"backend": "eager"}, "backend='eager' does not work on several ranks"),
        ({"deepspeed": "zero9"}, "deepspeed='zero9' is neither one of zero1, zero2, zero3 nor a readable file"),
    ):
        assert all(text in found for found in two.run(_refused, changes)), changes


def _dies(rank: int, output: str) -> None:
    run_fatally(output, 40 if rank == 1 else None)


def test_a_rank_that_is_killed_stops_the_others_with_a_clear_error(tmp_path):
    ranks = Ranks(2, tmp_path)
    try:
        began = time.monotonic()
        fine, (kind, text, trace) = ranks.ask(0, _dies, str(tmp_path / "run"))
        assert not fine and kind == "UnlearningError", trace
        assert "rank 0 of 2 lost contact with another" in text and "start again with resume" in text
        assert time.monotonic() - began < 2 * COLLECTIVE_TIMEOUT.total_seconds()
        assert not (tmp_path / "run" / "result.json").exists()
    finally:
        ranks.stop(kill=True)


# --- settings alone ---------------------------------------------------------------------------------------------------

FOUR = cfd.Ranks(0, 4, 0, object())  # type: ignore[arg-type]  # a group that nothing is sent through


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"train_batch_size": 64}, "train_batch_size=64 contradicts batch_size x accumulate, which makes it 16"),
        ({"train_micro_batch_size_per_gpu": 16}, "train_micro_batch_size_per_gpu=16 on 4 ranks makes batches of 64"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 contradicts accumulate"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 contradicts grad_clip"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True contradicts precision='fp32'"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True contradicts precision='fp32'"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb' contradicts optimizer, which makes it 'adam'"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer.params.lr=0.1 contradicts learning_rate"),
        ({"optimizer": {"params": {"betas": [0, 0]}}}, "optimizer.params.betas is not supported"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler contradicts the settings schedule and warmup_steps"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow=False contradicts leaving out a step"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm=False"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0 and must be 1, 2 or 3"),
        ({"zero_optimization": {}}, "zero_optimization.stage is None"),
        ({"zero_optimization": {"stage": 2, "nonsense": 1}}, "refuses the configuration"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device='nvme'"),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_ours_is_refused_by_its_key(given, text):
    with pytest.raises(InputError) as error:
        read_deepspeed({"zero_optimization": {"stage": 2}, **given}, UnlearnConfig(batch_size=16), FOUR)
    assert text in str(error.value)


def test_a_deepspeed_configuration_that_agrees_passes_with_its_other_keys(tmp_path):
    given = {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6}},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 7},
        "bf16": {"enabled": True},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(given))
    config = UnlearnConfig(
        optimizer="adamw", precision="bf16", grad_clip=1.0, batch_size=16, learning_rate=1e-6, epochs=1
    )
    found = read_deepspeed(str(tmp_path / "ds.json"), config, FOUR)
    assert found["zero_optimization"].items() >= given["zero_optimization"].items()
    assert found["bf16"]["enabled"] and found["gradient_clipping"] == 1.0 and "optimizer" not in found


def test_deepspeed_says_what_it_lacks(monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"deepspeed needs a process group.*torchrun --nproc_per_node N"):
        run(deepspeed="zero1")
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(InputError, match=r"ds\.json is not valid JSON"):
        read_deepspeed(str(tmp_path / "ds.json"), UnlearnConfig(), FOUR)
    with monkeypatch.context() as patch:
        patch.setattr("deepspeed.__version__", "0.19.7")
        with pytest.raises(InputError, match=r"deepspeed 0\.19\.7 changes the weights.*and 0\.19\.8 does not"):
            read_deepspeed("zero1", UnlearnConfig(), FOUR)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install '\.\[deepspeed\]'"):
        read_deepspeed("zero1", UnlearnConfig(), FOUR)


def test_an_environment_that_is_half_a_launchers_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="the environment has RANK but no WORLD_SIZE"):
        run()


def test_shares_are_contiguous_and_leave_out_nothing():
    for size in (1, 2, 3, 7):
        for count in (7, 8, 20):
            parts = [range(count)[part] for part in cfd.Ranks(0, size).shares(count)]
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.equal(cfd.SINGLE_PROCESS.all_gather_rows(lambda: [torch.ones(2, 1)], [2]), torch.ones(2, 1))
