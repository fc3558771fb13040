"""`method="calibrated"`: what the loss gets from a run, and where forgetting stops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError, functional
from cliperase_fast.benchmarks.temperature import Closer
from cliperase_fast.models import load_model
from cliperase_fast.unlearning.engines.base import train_mode
from cliperase_fast.unlearning.methods import calibrated
from cliperase_fast.unlearning.methods.calibrated_terms import sigmoid_terms
from cliperase_fast.unlearning.objective import BatchFeatures


def steps(result):
    return [line for line in result.history if "total" in line]


def run(model=None, **changes):
    forget, retain = split_pairs(make_pairs(), "red")
    return cf.unlearn(model or make_tiny_clip(), forget, retain, **{**QUICK, "method": "calibrated", **changes})


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the loss."""
    seen = []
    own = functional.calibrated_loss

    def watched(*features, **options):
        seen.append((features, options))
        return own(*features, **options)

    monkeypatch.setattr("cliperase_fast.losses.calibrated_loss", watched)
    return seen


def test_terms_of_every_step_are_logged():
    lines = steps(run())
    weights = {"retain": 1, "forget": 3, "consistency": 3, "anchor": 30, "held": 3000, "level": 33}
    for line in lines:
        assert line["total"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-5)
    first, last = lines[0], lines[-1]
    assert first["anchor"] + first["held"] == pytest.approx(0, abs=1e-10)  # the student is the teacher
    assert first["level"] > last["level"] >= 0 and last["held"] > 0


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def features(count=9, forgotten=4, width=5, teacher_width=5):
    torch.manual_seed(3)
    image, text = unit(count, width).requires_grad_(), unit(count, width).requires_grad_()
    return BatchFeatures(
        image, text, torch.tensor(20.0), forgotten,
        teacher_image=unit(count, teacher_width), teacher_text=unit(count, teacher_width),
        background_image=torch.rand(count) - 0.5, background_text=torch.rand(count) - 0.5,
    )  # fmt: skip


def test_the_level_is_the_distance_of_forget_pairs_from_the_background():
    given = features()
    _, level = calibrated.pair_terms(given)
    above = (given.image * given.text).sum(1)[:4] - (given.background_image + given.background_text)[:4] / 2
    assert (above > 0).any() and (above < 0).any()
    assert level.item() == pytest.approx(above.abs().mean().item(), rel=1e-6)


def test_features_are_held_but_for_the_captions_of_forget_pairs():
    given = features()
    held, _ = calibrated.pair_terms(given)
    image, text = ((own - old).pow(2).sum(1) for own, old in
                   ((given.image, given.teacher_image), (given.text, given.teacher_text)))  # fmt: skip
    assert held.item() == pytest.approx((image[:4].mean() + image[4:].mean() + text[4:].mean()).item(), rel=1e-6)
    held.backward()
    assert torch.all(given.image.grad.abs().sum(1) > 0) and torch.all(given.text.grad[4:].abs().sum(1) > 0)
    assert torch.all(given.text.grad[:4] == 0)


def test_with_another_teacher_the_cosines_of_retain_pairs_are_held():
    given = features(teacher_width=3)
    held, _ = calibrated.pair_terms(given, own_teacher=False)
    own, before = ((a * b).sum(1) for a, b in ((given.image, given.text), (given.teacher_image, given.teacher_text)))
    assert held.item() == pytest.approx((own - before)[4:].square().mean().item(), rel=1e-6)


def test_a_run_holds_its_features_unless_it_has_another_teacher():
    own, other = (steps(run(teacher=teacher, epochs=1))[0]["held"] for teacher in (None, make_tiny_clip(seed=5)))
    assert own == pytest.approx(0, abs=1e-10) and other > 1e-3
    assert other < 4.0  # (C - C°)², not the distance of features of another model


def test_weights_and_options_reach_the_loss(calls):
    run(lambda_retain=2.0, lambda_forget=5.0, lambda_consistency=0.5, method_options={"lambda_anchor": 7.0}, epochs=1)
    given = {name: calls[0][1][f"lambda_{name}"] for name in ("retain", "forget", "consistency", "anchor")}
    assert given == {"retain": 2.0, "forget": 5.0, "consistency": 0.5, "anchor": 7.0}


@pytest.mark.parametrize("teacher_cache", ["memory", "off"])
def test_background_levels_are_those_of_the_training_retain_pairs(calls, teacher_cache):
    result = run(teacher_cache=teacher_cache, epochs=1)
    original = load_model(make_tiny_clip())
    (_, _, teacher_image, teacher_text, *_), options = calls[0]
    mask = options["forget_mask"]
    assert mask.tolist() == sorted(mask.tolist(), reverse=True) and 0 < mask.sum() < len(mask)
    train = result.record["data"]["retain_pairs"]
    assert train < 24  # some of the 24 retain pairs validate or test
    with torch.no_grad():
        captions = original.encode_text(original.token_ids(["a green square", "a blue square"]))
    # Any mixture of the two captions that the training split may hold lies on their segment.
    low, high = (teacher_image @ captions.T).aminmax(dim=1)
    assert torch.all((options["background_image"] >= low - 1e-5) & (options["background_image"] <= high + 1e-5))
    assert options["background_text"].shape == teacher_text.shape[:1]


def test_concepts_are_the_classes(calls):
    run(epochs=1)
    ids, mask = calls[0][1]["group_ids"], calls[0][1]["forget_mask"]
    assert ids[mask].unique().tolist() == [2]  # blue, green, red
    assert set(ids[~mask].tolist()) == {0, 1}


def test_forget_pairs_are_one_concept_where_classes_are_not_used(calls):
    run(epochs=1, false_negatives="caption")
    ids, mask = calls[0][1]["group_ids"], calls[0][1]["forget_mask"]
    assert ids[mask].unique().tolist() == [calibrated._FORGET_CONCEPT]
    assert (ids[~mask] >= 0).all()


def test_forgetting_stops_at_the_background_where_cliperase_goes_on():
    settings = {"epochs": 40, "learning_rate": 2e-3, "batch_size": 16, "evaluate_every": 40, "select": "last"}
    stopped, pushed = (
        run(method=method, **settings).after["forget"]["association"] for method in ("calibrated", "cliperase")
    )
    assert stopped > pushed + 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"forget_loss": "hinge"}, "does not use forget_loss"),
        ({"consistency": "features"}, "does not use consistency"),
        ({"method_options": {"lambda_anchor": -1.0}}, "lambda_anchor=-1.0 must be a finite number"),
        ({"method_options": {"lambda_level": float("inf")}}, "lambda_level=inf must be finite"),
        ({"method_options": {"lambda_held": -0.5}}, "lambda_held=-0.5 must be a finite number"),
        ({"method_options": {"lambda_anchor": float("nan")}}, "lambda_anchor=nan must be finite"),
    ],
)
def test_unused_settings_and_wrong_options_are_errors(changes, says):
    with pytest.raises(InputError, match=says):
        run(**changes)


def test_gradient_caching_gives_the_same_terms_and_gradient():
    whole, parts = (steps(run(batch_size=12, epochs=1, grad_cache_chunk=chunk)) for chunk in (0, 5))
    for one, other in zip(whole, parts, strict=True):
        for name in ("total", "forget", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_the_students_features_equal_the_originals_where_dropout_would_count_as_a_change(calls):
    run(model=make_tiny_clip(patch_dropout=0.5))
    (image, text, teacher_image, teacher_text, *_), _ = calls[0]
    torch.testing.assert_close(image, teacher_image)
    torch.testing.assert_close(text, teacher_text)


@pytest.mark.parametrize(
    ("changes", "drops_out"),
    [
        ({"learning_rate": 1e-4, "epochs": 2, "method": "cliperase"}, True),
        ({"epochs": 2, "method": "cliperase"}, False),
        ({"learning_rate": 1e-4, "method": "cliperase"}, False),
        ({"learning_rate": 1e-4, "epochs": 2}, False),
    ],
)
def test_dropout_is_on_only_in_runs_with_given_numbers_that_know_no_target(changes, drops_out):
    assert cf.UnlearnConfig(**changes).drops_out is drops_out


@pytest.mark.parametrize("drops_out", [True, False])
def test_only_modules_that_drop_values_leave_training_mode(drops_out):
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    plain = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(block, plain)
    train_mode(model, drops_out)
    inputs = torch.randn(2, 3, 8)
    assert torch.equal(model(inputs), model(inputs)) is not drops_out
    assert model.training and all(part.training for part in plain.modules())


def dense_sigmoid_terms(given, concepts, weights):
    """The terms of a model with the sigmoid loss as their formulas say, with matrices of all pairs."""
    count, total = given.n_forget, len(given.image)
    cosines, frozen = given.image @ given.text.T, given.teacher_image @ given.teacher_text.T
    level = (given.background_image[:, None] + given.background_text[None]) / 2
    removed = torch.zeros(total, total, dtype=torch.bool)
    same = torch.ones(total, total, dtype=torch.bool) if concepts is None else concepts[:, None] == concepts
    removed[:, :count] = same[:, :count]
    if concepts is None:
        removed[count:] = False
    edited = torch.where(removed, level, frozen)
    logits = given.logit_scale * cosines + given.logit_bias
    target = given.teacher_logit_scale * edited + given.teacher_logit_bias
    kept, labels = logits[count:, count:], torch.eye(total - count, dtype=torch.float64)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(kept, labels, reduction="none")
    if given.group_ids is not None:
        ids = given.group_ids[count:]
        losses = losses.masked_fill((ids[:, None] == ids) & (labels == 0), 0)
    bernoulli = torch.distributions.Bernoulli
    divergence = torch.distributions.kl_divergence(bernoulli(logits=target), bernoulli(logits=logits))
    terms = (
        losses.sum() / (total - count), (cosines - level)[removed].relu().square().mean(), divergence.sum() / total,
        (cosines - edited)[~removed].square().mean(),
    )  # fmt: skip
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)), *terms


@pytest.mark.parametrize("weights", [(1.0, 3.0, 3.0, 30.0), (0.0, 1.0, 2.0, 0.0), (2.0, 0.0, 0.0, 5.0)])
@pytest.mark.parametrize("concepts", [None, [4, 4, 5, 4, 0, 4, 1, 1, 5]])
def test_the_sigmoid_form_is_that_of_its_formulas(concepts, weights):
    made = features()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    ids = None if concepts is None else torch.tensor(concepts)
    given = dataclasses.replace(
        made, logit_scale=scale, teacher_logit_scale=torch.tensor(9.0, dtype=torch.float64), group_ids=ids,
        logit_bias=torch.tensor(-6.0, dtype=torch.float64), teacher_logit_bias=torch.tensor(-5.0, dtype=torch.float64),
        background_image=made.background_image.double(), background_text=made.background_text.double(),
    )  # fmt: skip
    found = sigmoid_terms(cf.CalibratedLoss(*weights), given, ids)
    expected = dense_sigmoid_terms(given, ids, weights)
    for term, own, weight in zip(found[1:], expected[1:], weights, strict=True):
        assert term.item() == pytest.approx(own.item() if weight else 0.0, rel=1e-5, abs=1e-9)
    inputs = (given.image, given.text, scale)
    for gradient, own in zip(
        torch.autograd.grad(2 * found.total, inputs), torch.autograd.grad(2 * expected[0], inputs), strict=True
    ):
        torch.testing.assert_close(gradient, own, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("own_teacher", [True, False])
def test_closer_cosines_at_a_larger_logit_scale_are_forgotten_in_the_same_way(own_teacher):
    def of(logit_scale, **options):
        models = [make_tiny_clip(seed=seed) for seed in (0, 5)]
        for model in models:
            model.logit_scale.data.fill_(math.log(26.0))  # at which a weight counts once
        if logit_scale is not None:
            tokenize = load_model(models[0]).tokenize
            models = [Closer(model, logit_scale) for model in models]
            options = {"tokenizer": tokenize, **options}
        return run(models[0], epochs=2, teacher=None if own_teacher else models[1], select="divergence", **options)

    wide, close = of(None), of(104.0)
    for name, factor in {"level": 4, "anchor": 16, "held": 4, "total": 1}.items():
        assert [line[name] for line in steps(wide)] == pytest.approx(
            [factor * line[name] for line in steps(close)], rel=1e-3, abs=1e-6
        ), name
    pixels = torch.stack([image for image, _ in make_pairs()])
    tokens = load_model(make_tiny_clip()).token_ids(["a red square", "a green square"])
    for name, given in (("encode_image", pixels), ("encode_text", tokens)):
        first, second = (getattr(towers, name)(given) for towers in (wide.model, close.model.towers))
        assert torch.allclose(first, second, atol=1e-4), name
    targets = [result.selection["target"] for result in (wide, close)]
    margins = [target["association"] - target["background"] for target in targets]
    assert margins == pytest.approx([0.05, 0.0125])
