"""`method="retain_finetune"`: the control that trains on retain pairs alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError, functional
from cliperase_fast.unlearning import recipe
from cliperase_fast.unlearning.batches import BatchLoader, BatchPlan

sys.path.append(str(Path(__file__).parents[1] / "auditing"))
from small import make_model, training_and_test

METHOD = "retain_finetune"


class Counted(torch.utils.data.Dataset):
    """Pairs that count how often each image is read."""

    def __init__(self, pairs):
        self.pairs, self.reads = pairs, 0

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.reads += 1
        return self.pairs[index]


def run(forget=None, retain=None, **changes):
    own = split_pairs(make_pairs(), "red")
    pairs = (own[0] if forget is None else forget, own[1] if retain is None else retain)
    return cf.unlearn(make_tiny_clip(), *pairs, **{**QUICK, "method": METHOD, **changes})


def reads_of_a_run(method, epochs):
    """How often forget pairs and retain pairs are read by a run that keeps no image and validates once."""
    forget, retain = (Counted(pairs) for pairs in split_pairs(make_pairs(), "red"))
    run(forget, retain, method=method, epochs=epochs, evaluate_every=epochs, image_cache_mib=0, test_fraction=0.5)
    return forget.reads, retain.reads


def test_no_forget_pair_is_read_in_training():
    short, long = reads_of_a_run(METHOD, 30), reads_of_a_run(METHOD, 60)
    assert long[0] == short[0], "forget pairs are read for the checks and the evaluations alone"
    assert long[1] > short[1]
    assert reads_of_a_run("gradient_ascent", 40)[0] > long[0]


def test_no_forget_pair_is_in_a_batch(monkeypatch):
    seen = []
    batches = BatchLoader.batches

    def watched(self, start, stop):
        for batch in batches(self, start, stop):
            seen.append((batch, self.plan))
            yield batch

    monkeypatch.setattr(BatchLoader, "batches", watched)
    run()
    assert seen
    for batch, plan in seen:
        assert batch.n_forget == 0 and len(batch.pairs) == plan.retain_pairs == 3
        assert batch.pairs.min() >= plan.n_forget


@pytest.mark.parametrize("epoch_over", ["forget", "retain"])
def test_the_retain_pairs_and_the_length_of_an_epoch_are_those_of_the_other_methods(epoch_over):
    plans = [BatchPlan(10, 23, 4, 5, epoch_over, seed=3, with_forget=with_forget) for with_forget in (True, False)]
    assert plans[0].batches_per_epoch == plans[1].batches_per_epoch
    assert (plans[0].sizes, plans[1].sizes) == ((4, 5), (0, 5))
    for number in range(12):
        (_, theirs), (forget, retain) = (plan.batch(number) for plan in plans)
        assert len(forget) == 0 and retain.tolist() == theirs.tolist()


def test_the_loss_is_the_clip_loss_of_the_retain_pairs(monkeypatch):
    from cliperase_fast.unlearning.methods import clip_losses

    calls = []

    def watched(image, text, scale, **options):
        calls.append((image.detach(), text.detach(), scale.detach(), options["group_ids"]))
        return functional.clip_loss(image, text, scale, **options)

    monkeypatch.setattr(clip_losses, "clip_loss", watched)
    result = run(epochs=1)
    lines = [line for line in result.history if "total" in line]
    assert len(lines) == len(calls)
    for line, (image, text, scale, groups) in zip(lines, calls, strict=True):
        logits = (scale * image @ text.T).double()
        same = groups[:, None] == groups[None]
        logits = logits.masked_fill(same & ~torch.eye(len(groups), dtype=torch.bool), -torch.inf)
        expected = sum(
            torch.nn.functional.cross_entropy(rows, torch.arange(len(rows))) / 2 for rows in (logits, logits.T)
        )
        assert line["total"] == line["retain"] == pytest.approx(float(expected), rel=1e-4)
        assert not {"forget", "consistency", "anchor"} & line.keys()


def test_fine_tuning_improves_the_retain_pairs():
    lines = [line for line in run(epochs=20).history if "total" in line]
    assert lines[-1]["retain"] < 0.8 * lines[0]["retain"]


def test_the_recipe_takes_the_highest_rate_that_changes_the_model_little_enough(monkeypatch):
    monkeypatch.setattr(recipe, "MAX_STEPS", 60)
    forget, retain, test = training_and_test()
    result = cf.unlearn(
        make_model(), forget, retain, test=test, method=METHOD, progress=False, report=False, val_fraction=0.25
    )
    found = result.record["recipe"]
    assert not any(probe["reached"] for probe in found["probes"])
    gentle = [probe["rate"] for probe in found["probes"] if probe["divergence"] <= recipe.DIVERGENCE]
    assert found["learning_rate"] == max(gentle) < max(probe["rate"] for probe in found["probes"])
    assert "no rate reaches the target" in found["why"]


def test_the_result_says_that_the_method_is_a_control():
    result = run()
    assert any("retain_finetune is a control" in note for note in result.record["notes"])
    assert "retain_finetune is a control" in result.summary()


@pytest.mark.parametrize("setting", [{"lambda_forget": 1.0}, {"forget_loss": "hinge"}, {"teacher_cache": "off"}])
def test_settings_of_terms_that_it_does_not_have_are_refused(setting):
    with pytest.raises(InputError, match=f"does not use {next(iter(setting))}"):
        run(**setting)
    with pytest.raises(InputError, match="does not use a teacher"):
        run(teacher=make_tiny_clip())
