"""Methods that read gradients but do not train the student: ssd, slug, task_vector, negmerge."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_pairs, make_tiny_clip, split_pairs
from torch import nn

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.models import load_model
from cliperase_fast.unlearning.methods import gradients, slug, ssd, task_vector
from cliperase_fast.unlearning.methods.gradients import AllPairs
from cliperase_fast.unlearning.methods.strength import search_strength
from cliperase_fast.unlearning.selection import Candidate

sys.path.append(str(Path(__file__).parents[1] / "auditing"))
from small import make_model, training_and_test

METHODS = ["ssd", "slug", "task_vector", "negmerge"]


def run(method, **changes):
    forget, retain, test = training_and_test()
    settings = {"progress": False, "report": False, "batch_size": 16, "test": test, **changes}
    return cf.unlearn(make_model(), forget, retain, method=method, **settings)


def changed_tensors(result):
    original = make_model().state_dict()
    return [name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, original[name])]


def candidate(forget=0.0, retain=1.0):
    return Candidate(step=1, epoch=1, forget=forget, retain=retain, forget_similarity=0.0)


def test_fisher_and_dampening_of_two_parameters_are_those_by_hand(monkeypatch):
    """A model of two parameters: the loss of batch x is a x + b², so that its gradient is (x, 2 b)."""
    a, b = nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.tensor([0.5]))
    batches = {"forget": [3.0, 5.0], "all": [1.0, 1.0, 2.0]}

    def found(_, loader, numbers, losses):
        for number in numbers:
            x = batches[loader][number]
            yield [list(torch.autograd.grad((a * x + b**2).sum(), [a, b]))]

    monkeypatch.setattr(ssd, "gradients", found)
    two = SimpleNamespace(parameters=[("a", a), ("b", b)])
    forget = ssd.fisher(two, "forget", 2, None)
    whole = ssd.fisher(two, "all", 3, None)
    assert [float(part) for part in forget] == pytest.approx([(9 + 25) / 2, 1])
    assert [float(part) for part in whole] == pytest.approx([(1 + 1 + 4) / 3, 1])
    factors = [ssd.dampening_factor(f, w, alpha=5, dampening=1) for f, w in zip(forget, whole, strict=True)]
    assert [float(factor) for factor in factors] == pytest.approx([2 / 17, 1])
    assert float(ssd.dampening_factor(forget[0], whole[0], alpha=10, dampening=1)) == 1
    assert float(ssd.dampening_factor(forget[0], whole[0], alpha=5, dampening=100)) == 1
    assert float(ssd.dampening_factor(torch.zeros(1), torch.zeros(1), alpha=5, dampening=1)) == 1


def test_ssd_only_shrinks_weights_and_a_larger_alpha_shrinks_fewer():
    counts = []
    for alpha in (0.5, 4.0):
        result = run("ssd", method_options={"alpha": alpha})
        original = make_model().state_dict()
        after = {name: tensor for name, tensor in result.model.state_dict().items() if tensor.is_floating_point()}
        assert all((tensor.abs() <= original[name].abs()).all() for name, tensor in after.items())
        counts.append(sum(int((tensor != original[name]).sum()) for name, tensor in after.items()))
    assert counts[0] > counts[1] > 0


def test_batches_of_all_pairs_visit_every_pair_once_in_a_pass():
    plan = AllPairs(5, 12, 1, 4, "retain", seed=0, with_forget=False)
    drawn = [plan.batch(number) for number in range(plan.batches_per_epoch)]
    assert all(len(forget) == 0 for forget, _ in drawn)
    assert sorted(plan.n_forget + index for _, retain in drawn for index in retain) == list(range(12))


def test_the_gradient_of_a_batch_is_that_of_the_loss_in_evaluation_mode(monkeypatch):
    """Of one batch that holds every retain pair, as a direct computation has it; dropout does not act."""
    seen = {}

    class Looking(ssd.SelectiveSynapticDampening):
        def edit(self, run, evaluate):
            plan = run.loader.plan
            (found,) = next(gradients.gradients(run, run.loader, range(1), [slug.forget_cosine]))
            forget, _ = plan.batch(0)
            pairs = run.data.train.pairs
            pixels = torch.stack([pairs.image(int(index)) for index in forget])
            rows = [run.captions.of_pair[index][0] for index in forget]
            with torch.enable_grad():
                text = run.student.encode_text(run.captions.rows(rows))
                cosine = (run.student.encode_image(pixels) * text).sum(1).mean()
                expected = torch.autograd.grad(cosine, [p for _, p in run.parameters], allow_unused=True)
            seen.update(found=found, expected=expected)

    monkeypatch.setitem(cf.unlearning.methods.registry._METHODS, "ssd", Looking)
    run("ssd")
    assert len(seen["found"]) == len(seen["expected"]) > 10
    for got, wanted in zip(seen["found"], seen["expected"], strict=True):
        assert torch.allclose(got, torch.zeros_like(got) if wanted is None else wanted, atol=1e-6)


def test_slug_changes_exactly_one_tensor_and_forgets():
    result = run("slug")
    (name,) = changed_tensors(result)
    assert name in slug.layer_names(load_model(make_model()))
    assert result.after["forget"]["association"] < result.before["forget"]["association"]
    assert len([line for line in result.history if "validation" in line]) % 10 == 0


def test_slug_counts_the_first_five_where_there_are_many_classes(monkeypatch):
    few = run("slug")
    monkeypatch.setattr(slug, "_FEW", 2)
    monkeypatch.setattr(slug.own_class_among_first, "__defaults__", (None, 1))  # the data has four classes
    assert changed_tensors(run("slug")) == changed_tensors(few), "the first class alone is the score itself"


def test_a_class_is_recognised_among_the_first_that_count():
    images, classes = torch.eye(3)[[0, 0, 1]], torch.tensor([[0.9, 0.1, 0], [1.0, 0, 0], [0.5, 0.5, 0], [0, 0.4, 0]])
    shares = [slug.own_class_among_first(images, classes, np.array([0, 2, 3]), None, first) for first in (1, 2, 3)]
    assert shares == pytest.approx([0, 2 / 3, 1])
    kinds = np.array([0, 1, 1, 0])  # class 1 is of another kind than class 0, class 2 than class 3
    assert slug.own_class_among_first(images, classes, np.array([0, 2, 3]), kinds, 1) == pytest.approx(2 / 3)


def test_layers_are_matrices_of_the_towers_without_embeddings_and_positions():
    names = slug.layer_names(load_model(make_tiny_clip()))
    assert {"text_projection", "visual.proj", "visual.conv1.weight"} <= set(names)
    assert not [
        name for name in names if "embedding" in name or name.endswith("bias") or "ln_" in name or "scale" in name
    ]


def test_importance_and_alignment_are_those_by_hand():
    weight, forget, retain = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[-1.0, -1.0]])
    layer = slug.measure_layer("w", "text", weight, forget, retain)
    assert layer.importance == pytest.approx(2 / 5)
    assert layer.alignment == pytest.approx(1 / 2**0.5)
    assert slug.measure_layer("w", "text", weight, forget, torch.zeros(1, 2)).alignment == 0


def test_the_front_of_a_tower_has_the_layers_that_no_other_beats_in_both():
    layers = [
        slug.Layer("best", "image", 3.0, 0.1),
        slug.Layer("beaten", "image", 2.0, 0.1),
        slug.Layer("least aligned", "image", 1.0, 0.0),
        slug.Layer("other tower", "text", 0.1, 0.9),
    ]
    assert [layer.name for layer in slug.pareto_fronts(layers)] == ["best", "least aligned", "other tower"]


@pytest.mark.parametrize(("needed", "tried"), [(5.0, [1, 2, 4, 8, 6, 5, 4.5, 4.75]), (0.3, [1, 0.5, 0.25, 0.375])])
def test_strengths_are_doubled_and_then_bisected(needed, tried):
    seen = []

    def evaluate(strength):
        seen.append(strength)
        return candidate(forget=0.0 if strength >= needed else 1.0)

    search_strength(evaluate, lambda one: one.forget > 0, evaluations=len(tried))
    assert seen == tried


def test_a_search_ends_at_the_largest_strength_that_is_not_enough():
    seen = []
    search_strength(lambda s: (seen.append(s), candidate(1.0))[1], lambda one: True, most=3.0)
    assert seen == [1, 2, 3]


def test_only_entries_whose_sign_agrees_in_all_vectors_are_kept():
    rows = [[1.0, -1.0, 2.0, 0.0], [3.0, -2.0, -1.0, 1.0], [2.0, -6.0, 4.0, 2.0]]
    vectors = [[torch.tensor(row)] for row in rows]
    assert task_vector.merge_agreeing(vectors)[0].tolist() == [2, -3, 0, 0]


def test_an_entry_that_disagreed_once_stays_zero():
    vectors = [[torch.tensor([1.0, 2.0])], [torch.tensor([-1.0, 2.0])], [torch.tensor([-1.0, 2.0])]]
    assert task_vector.merge_agreeing(vectors)[0].tolist() == [0, 2]


def test_size_0_is_the_original_and_size_1_moves_away_from_the_fine_tune():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    one, start, vector = (
        SimpleNamespace(parameters=[("w", weight)]),
        weight.detach().clone(),
        [torch.tensor([0.5, -1.0])],
    )
    task_vector.subtract(one, [start], vector, 1.0)
    assert weight.tolist() == [0.5, 3]
    task_vector.subtract(one, [start], vector, 0.0)
    assert torch.equal(weight, start)


def test_a_fine_tune_lowers_the_forget_loss_and_leaves_the_student_as_it_was(monkeypatch):
    seen = {}

    class Looking(task_vector.TaskVector):
        def edit(self, run, evaluate):
            def watched(features):
                losses.append(task_vector.forget_clip_loss(features.gather()))
                return losses[-1]

            def loss():
                next(gradients.gradients(run, run.loader, range(1), [watched]))
                return float(losses[-1])

            losses = []
            before, weights = loss(), [parameter.clone() for _, parameter in run.parameters]
            vector = task_vector.fine_tune(run, 1e-3, 20)
            assert all(torch.equal(p, w) for (_, p), w in zip(run.parameters, weights, strict=True))
            assert all(parameter.grad is None for _, parameter in run.parameters)
            task_vector.subtract(run, weights, vector, -1.0)
            seen.update(before=before, after=loss())

    monkeypatch.setitem(cf.unlearning.methods.registry._METHODS, "task_vector", Looking)
    run("task_vector")
    assert seen["after"] < 0.9 * seen["before"]


def test_subtracting_a_fine_tune_forgets():
    result = run("task_vector", method_options={"learning_rate": 1e-3, "steps": 20})
    assert result.after["forget"]["association"] < result.before["forget"]["association"] - 0.1


def test_the_fine_tunes_of_negmerge_differ_in_rate_and_batches(monkeypatch):
    seen = []

    def fine_tune(run, rate, steps, first=0):
        seen.append((rate, steps, first))
        return [torch.ones_like(parameter) for _, parameter in run.parameters]

    monkeypatch.setattr(task_vector, "fine_tune", fine_tune)
    run("negmerge", method_options={"models": 3, "learning_rate": 1e-4, "steps": 5})
    assert seen == [(pytest.approx(5e-5), 5, 0), (pytest.approx(1e-4), 5, 5), (pytest.approx(2e-4), 5, 10)]


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_edit_is_not_repeated(tmp_path, monkeypatch, method):
    first = run(method, output_dir=tmp_path / "run")
    monkeypatch.setattr(cf.unlearning.methods.registry._METHODS[method], "edit", None)
    again = run(method, output_dir=tmp_path / "run", resume=True)
    weights, resumed = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
    assert (again.after, again.selection) == (first.after, first.selection)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_tower, self.text_tower = nn.Linear(192, 4), nn.Embedding(49408, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return self.image_tower(pixels.flatten(1)).detach()

    def encode_text(self, tokens):
        return self.text_tower(tokens).mean(1).detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_gradients_is_refused_before_anything_is_written(tmp_path, method):
    pairs = [(image, torch.tensor([1, 2 if "red" in caption else 3])) for image, caption in make_pairs()]
    with pytest.raises(InputError, match="no gradient reaches"):
        cf.unlearn(Detached(), pairs[:12], pairs[12:], method=method, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("ssd", {"method_options": {"alpha": 0}}, "alpha=0.0 must be"),
        ("ssd", {"method_options": {"dampening": -1}}, "dampening=-1.0 must be"),
        ("slug", {"method_options": {"evaluations": 0}}, "evaluations=0 must be at least 1"),
        ("task_vector", {"method_options": {"learning_rate": 0}}, "learning_rate=0.0 must be"),
        ("task_vector", {"method_options": {"steps": 0}}, "steps=0 must be at least 1"),
        ("negmerge", {"method_options": {"models": 1}}, "models=1 must be at least 2"),
        ("task_vector", {"learning_rate": 1e-3}, "does not use learning_rate"),
        ("ssd", {"deepspeed": "zero2"}, "does not use deepspeed"),
        ("slug", {"steps": 3}, "does not use steps"),
    ],
)
def test_wrong_options_and_settings_of_training_are_refused(method, changes, says):
    with pytest.raises(InputError, match=says):
        cf.unlearn(object(), *split_pairs(make_pairs(), "red"), method=method, **changes)
