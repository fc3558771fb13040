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
from cliperase_fast.unlearning.methods import make_method, multidelete
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures

METHODS = ["gradient_difference", "kl_minimization", "multidelete"]


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes", [{}, {"trainable": "lora"}, {"trainable": "last:1"}, {"grad_cache_chunk": 2, "accumulate": 2}],
    ids=["all", "lora", "last block", "gradient cache"],
)  # fmt: skip
def test_a_method_trains_every_kind_of_parameters(method, changes):
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
