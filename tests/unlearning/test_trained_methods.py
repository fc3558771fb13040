"""The methods that train by losses of their own: known answers for their terms and steps, and runs of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.functional import clip_loss
from cliperase_fast.unlearning.methods import balanced, make_method, masked_distillation, multidelete, relabel, salun
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures

METHODS = [
    "balanced",
    "gradient_difference",
    "kl_minimization",
    "masked_distillation",
    "multidelete",
    "relabel",
    "salun",
]


def run(method, model=None, **changes):
    forget, retain = split_pairs(make_pairs(), "red")
    return cf.unlearn(model or make_tiny_clip(), forget, retain, **{**QUICK, "method": method, **changes})


def steps(result):
    return [line for line in result.history if "total" in line]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def batch(groups=(0, 0, 1, 2, 1, 2), forget=2, width=5, teacher=None):
    """M forget and N retain pairs in float64. teacher: of how many pairs it has features."""
    torch.manual_seed(3)
    count = len(groups)
    image, text = unit(count, width).requires_grad_(), unit(count, width).requires_grad_()
    known = {}
    if teacher:
        known = {"teacher_image": unit(teacher, 4), "teacher_text": unit(teacher, 4),
                 "teacher_logit_scale": torch.tensor(6.0, dtype=torch.float64)}  # fmt: skip
    scale = torch.tensor(9.0, dtype=torch.float64)
    return BatchFeatures(image, text, scale, forget, torch.tensor(groups), **known)


def objective(method, **changes):
    return make_method(UnlearnConfig(method=method, backend="eager", **changes))[0].objective(None)


def gradients(loss, features):
    return torch.autograd.grad(loss, [features.image, features.text], retain_graph=True)


def retain_loss(features):
    return clip_loss(features.retain_image, features.retain_text, features.logit_scale,
                     group_ids=features.retain_group_ids, backend="eager")  # fmt: skip


def test_the_gradient_of_gradient_difference_is_that_of_both_losses():
    features = batch()
    terms = objective("gradient_difference")(features)
    parts = [gradients(loss, features) for loss in (retain_loss(features), forget_clip_loss(features))]
    for found, retain, forget in zip(gradients(terms.total, features), *parts, strict=True):
        assert found.dtype == torch.float64
        assert torch.allclose(found, retain - forget, rtol=0, atol=1e-14)
        assert retain.abs().max() > 0.01 and forget.abs().max() > 0.01


def test_kl_minimization_adds_the_divergence_of_the_retain_similarities():
    features = batch(teacher=4)
    terms = objective("kl_minimization")(features)
    own = features.logit_scale * features.retain_image @ features.retain_text.T
    teacher = features.teacher_logit_scale * features.teacher_image @ features.teacher_text.T
    expected = sum(
        F.kl_div(rows.log_softmax(1), others.log_softmax(1), log_target=True, reduction="batchmean")
        for rows, others in ((own, teacher), (own.T, teacher.T))
    )
    assert terms.consistency.item() == pytest.approx(expected.item(), rel=1e-12)
    assert terms.total.item() == pytest.approx((expected - forget_clip_loss(features)).item(), rel=1e-12)


def with_towers(features):
    """The same batch with tower features, of student and teacher."""
    pairs = len(features.image)
    widths = {"image_tower": 7, "text_tower": 3, "teacher_image_tower": 7, "teacher_text_tower": 3}
    towers = {name: torch.randn(pairs, width, dtype=torch.float64) for name, width in widths.items()}
    return replace(features, teacher_image=unit(pairs, 5), teacher_text=unit(pairs, 5), **towers)


def test_the_terms_of_multidelete_are_distances_from_the_original_and_from_unpaired_pairs():
    features = with_towers(batch(groups=(0, 0, 0, 1, 1, 2, 1), forget=3))
    images, captions = multidelete.unpaired(features)
    assert (images.tolist(), captions.tolist()) == ([3, 4, 5], [5, 5, 6])

    def joint(image, text):
        return torch.cat([image, text, (image * text).sum(1, keepdim=True)], 1)

    own = joint(features.image, features.text)
    unrelated = joint(features.teacher_image[images], features.teacher_text[captions])
    before = joint(features.teacher_image, features.teacher_text)
    towers = [(features.image_tower, features.teacher_image_tower), (features.text_tower, features.teacher_text_tower)]
    expected = {
        "decoupling": (own[:3] - unrelated).norm(dim=1).square().mean().item(),
        "multimodal": (own[3:] - before[3:]).norm(dim=1).square().mean().item(),
        "unimodal": sum(((now - old).norm(dim=1) / old.norm(dim=1)).square().mean().item() for now, old in towers),
    }
    weights = {"lambda_decoupling": 2, "lambda_multimodal": 3, "lambda_unimodal": 5}
    found = objective("multidelete", method_options=weights)(features)
    assert {name: getattr(found, name).item() for name in expected} == pytest.approx(expected, rel=1e-12)
    total = 2 * expected["decoupling"] + 3 * expected["multimodal"] + 5 * expected["unimodal"]
    assert found.total.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("groups", [(0, 0, 1, 2, 1, 2), (0, 0, 1, 1, 1, 1), None])
def test_an_unpaired_image_and_caption_are_of_different_concepts(groups):
    features = batch(groups or range(6))
    images, captions = multidelete.unpaired(replace(features, group_ids=features.group_ids if groups else None))
    assert len(images) == len(captions) == 2 and (images >= 2).all() and (images != captions).all()
    if groups:
        assert (features.group_ids[images] != features.group_ids[captions]).all()


@pytest.mark.parametrize("teacher_cache", ["disk", "off"])
def test_multidelete_starts_from_the_towers_of_the_original(tmp_path, teacher_cache):
    result = run("multidelete", epochs=2, teacher_cache=teacher_cache, output_dir=tmp_path / "run")
    first, last = steps(result)[0], steps(result)[-1]
    assert first["multimodal"] + first["unimodal"] < 1e-9 < 1e-6 < last["unimodal"]
    assert first["decoupling"] > 0.1
    other = run("multidelete", epochs=2)
    assert steps(other)[-1]["total"] == pytest.approx(last["total"], rel=1e-4)


def test_multidelete_refuses_another_teacher():
    with pytest.raises(InputError, match="leave out teacher="):
        run("multidelete", teacher=make_tiny_clip())


def test_relabel_gives_no_forget_image_a_caption_of_its_own_concept():
    features = batch(groups=(0, 1, 0, 0, 2, 1, 0, 3), forget=3)
    places = relabel.new_captions(features)
    assert (places >= 3).all() and len(set(places.tolist())) > 1
    assert (features.group_ids[places] != features.group_ids[:3]).all()


def test_relabel_is_the_clip_loss_of_the_new_captions_over_the_whole_batch():
    features = batch(groups=(0, 0, 7, 1, 7, 2, 1), forget=3)  # no other concept is missing for any of them
    places = relabel.new_captions(features).tolist()
    shown = [features.group_ids[place].item() for place in places] + features.group_ids[3:].tolist()
    expected = 0.0
    for m, place in enumerate(places):
        captions = [j for j in range(7) if j == place or features.group_ids[j] != shown[m]]
        images = [i for i in range(7) if i == m or shown[i] != shown[m]]
        for row, columns, own in ((features.image[m], features.text[captions], captions.index(place)),
                                  (features.text[place], features.image[images], images.index(m))):  # fmt: skip
            expected -= (9 * columns @ row).log_softmax(0)[own].item() / 6
    found = objective("relabel")(features)
    assert found.relabelled.item() == pytest.approx(expected, rel=1e-12)
    assert found.total.item() == pytest.approx(expected + retain_loss(features).item(), rel=1e-12)


def test_relabel_leaves_out_images_without_another_concept():
    features = batch(groups=(0, 1, 0, 0, 0, 0))
    assert relabel.new_captions(features).tolist() == [-1, 3]
    assert objective("relabel")(batch(groups=(0, 0, 0, 0), forget=1)).relabelled.item() == 0


def test_the_saliency_mask_has_one_threshold_for_all_weights():
    gradients = [torch.tensor([[3.0, -1.0], [0.0, 0.5]]), torch.tensor([-4.0, 2.0, 0.1, 0.0])]
    masks = salun.largest(gradients, 0.5)
    assert [mask.tolist() for mask in masks] == [[[True, True], [False, False]], [True, True, False, False]]
    everything = salun.largest(gradients, 1.0)
    assert all(torch.equal(mask, gradient != 0) for mask, gradient in zip(everything, gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, {"grad_cache_chunk": 2, "accumulate": 2, "optimizer": "adamw"}])
def test_masked_weights_are_bitwise_equal_after_salun(monkeypatch, changes):
    seen = {}

    def watched(self, run):
        own(self, run)
        seen.update(zip((name for name, _ in run.parameters), self.masks, strict=True))

    own = salun.SalUn.prepare
    monkeypatch.setattr(salun.SalUn, "prepare", watched)
    result = run("salun", trainable="image", method_options={"fraction": 0.3}, **changes)
    before, after = make_tiny_clip().state_dict(), result.model.state_dict()
    assert len(seen) > 10 and 0.29 < sum(m.sum() for m in seen.values()) / sum(m.numel() for m in seen.values()) < 0.31
    moved = 0
    for name, mask in seen.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        moved += int((after[name] != before[name]).sum())
    assert moved > 0.9 * sum(int(mask.sum()) for mask in seen.values())


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("relabel", {"false_negatives": "none"}, "false_negatives='none' leaves out; use 'auto'"),
        ("salun", {"trainable": "lora"}, "trainable='lora' leaves frozen; use 'all'"),
        ("salun", {"weight_decay": 0.1}, "method='salun' does not use weight_decay"),
        ("salun", {"method_options": {"fraction": 0}}, "fraction=0.0 must be above 0"),
        ("multidelete", {"deepspeed": "zero1"}, "method='multidelete' does not use deepspeed"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do_is_refused_by_name(method, changes, says):
    with pytest.raises(InputError, match=says):
        run(method, **changes)


def test_the_weights_of_balanced_give_both_gradients_the_same_length():
    torch.manual_seed(0)
    forget, retain = ([torch.randn(3, 2), torch.randn(4)] for _ in range(2))
    one, other = (torch.cat([part.reshape(-1) for part in parts]).double() for parts in (forget, retain))
    shared = (1 + F.cosine_similarity(one, other, dim=0)).sqrt()
    found = balanced.weights_of(forget, retain)
    assert [w.item() for w in found] == pytest.approx([(1 / (g.norm() * shared)).item() for g in (one, other)])
    opposed = balanced.weights_of(forget, [-2 * part for part in forget])
    assert opposed[0].item() == pytest.approx(1 / (one.norm().item() * 1e-3**0.5)) == 2 * opposed[1].item()
    assert balanced.weights_of([torch.zeros(2)], [torch.tensor([3.0, 4.0])])[1].item() == pytest.approx(0.2)


def test_a_step_of_balanced_follows_the_weighted_gradients(monkeypatch):
    seen = []
    own = balanced.BalancedEngine.reduce_gradients

    def watched(engine):
        sums = engine.sums
        own(engine)
        seen.append((sums, [parameter.grad.clone() for parameter in engine.parameters]))

    monkeypatch.setattr(balanced.BalancedEngine, "reduce_gradients", watched)
    lines = steps(run("balanced", epochs=1, accumulate=2))
    (forget, retain), gradient = seen[0]
    weights = balanced.weights_of(forget, retain)
    for one, other, found in zip(forget, retain, gradient, strict=True):
        assert torch.allclose(found, weights[0].float() * one + weights[1].float() * other)
    assert lines[0]["grad_norm"] == pytest.approx(2**0.5, rel=1e-4)  # of two unit vectors over sqrt(1 + cos)


def test_the_targets_of_masked_distillation_sum_to_1_without_the_concept():
    features = replace(batch(groups=(0, 1, 0, 2, 3, 2), forget=2), teacher_image=unit(6, 4), teacher_text=unit(6, 4),
                       teacher_logit_scale=torch.tensor(6.0, dtype=torch.float64))  # fmt: skip
    mask = masked_distillation.removed(features)
    assert mask.nonzero().tolist() == [[0, 0], [1, 1], [2, 0]]
    teacher = 6 * features.teacher_image @ features.teacher_text.T
    own = 9 * features.image @ features.text.T
    expected = 0.0
    for logits, student, removed in ((teacher, own, mask), (teacher.T, own.T, mask.T)):
        targets = masked_distillation.masked_targets(logits, removed)
        assert torch.allclose(targets.sum(1), torch.ones(6, dtype=torch.float64)) and (targets[removed] == 0).all()
        plain = logits.softmax(1)
        assert torch.allclose(targets[~removed], (plain * ~removed / (plain * ~removed).sum(1, True))[~removed])
        kept = targets.where(~removed, 1)
        expected += (targets * (kept.log() - student.log_softmax(1))).sum().item() / 6
    assert objective("masked_distillation")(features).total.item() == pytest.approx(expected, rel=1e-12)


REFUSED = {("salun", "lora"), ("balanced", 2)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes", [{"trainable": "lora"}, {"trainable": "last:1"}, {"grad_cache_chunk": 2, "accumulate": 3}],
    ids=["lora", "last block", "gradient cache"],
)  # fmt: skip
def test_a_method_trains_every_kind_of_parameters(method, changes):
    if any((method, value) in REFUSED for value in changes.values()):
        with pytest.raises(InputError, match=r"lora|does not use grad_cache_chunk"):
            run(method, **changes)
        return
    result = run(method, **changes)
    assert len(steps(result)) >= 2
    assert result.after["forget"]["association"] != result.before["forget"]["association"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_resumes_to_the_same_weights(tmp_path, method):
    class Stop(Exception):
        pass

    whole = run(method, epochs=4, output_dir=tmp_path / "whole", checkpoint_every=2)
    from cliperase_fast.unlearning.trainer import Trainer

    own = Trainer.step

    def stopping(trainer, done, batches):
        if done == 3:
            raise Stop
        return own(trainer, done, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "step", stopping)
        run(method, epochs=4, output_dir=tmp_path / "stopped", checkpoint_every=2)
    resumed = run(method, epochs=4, output_dir=tmp_path / "stopped", checkpoint_every=2, resume=True)
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(*both) for both in pairs)
