"""The CLIPErase loss of models with a sigmoid loss, against float64 and against definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cliperase_fast.contrastive import sigmoid_cliperase_loss, sigmoid_loss
from cliperase_fast.errors import InputError
from cliperase_fast.ops import bernoulli


def batch(n=37, m=9, width=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(count, like=None):
        made = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return F.normalize(made if like is None else like + 0.3 * made, dim=1)

    image = rows(n)
    parts = [rows(m), rows(m), image, rows(n, image), rows(n, image), rows(n, image)]
    return [part.float().to(dtype) for part in parts]


def outcome(features, scale=15.0, bias=-9.0, teacher_scale=12.0, teacher_bias=-8.0, **options):
    """The terms and the gradients of image, text, scale and bias."""
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    leaves = [part.clone().requires_grad_() for part in features[:4]]
    numbers = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (scale, bias)]
    terms = sigmoid_cliperase_loss(*leaves, *features[4:], *numbers, teacher_scale, teacher_bias, **options)
    gradients = torch.autograd.grad(terms.total, [*leaves, *numbers], allow_unused=True)
    return terms, [torch.zeros_like(p) if g is None else g for p, g in zip([*leaves, *numbers], gradients, strict=True)]


OPTIONS = [
    {},
    {"group_ids": torch.arange(37) // 3},
    {"forget": "hinge", "margin": 0.1},
    {"forget": "contrastive", "lambda_consistency": 0.0},
    {"consistency": "features"},
    {"lambda_retain": 0.0},
    {"lambda_forget": 0.0, "group_ids": torch.zeros(37, dtype=torch.int64)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_strips_agree_with_float64(options, monkeypatch):
    monkeypatch.setattr(bernoulli, "strip_height", lambda *_: 5)
    truth, true_gradients = outcome(batch(dtype=torch.float64), backend="eager", **options)
    for backend in ("torch", "auto"):
        terms, gradients = outcome(batch(), backend=backend, **options)
        for ours, theirs in zip([*terms, *gradients], [*truth, *true_gradients], strict=True):
            assert (ours.double() - theirs).abs().max() <= 2e-6 * max(1.0, theirs.abs().max().item())


def test_the_terms_are_those_of_the_definition():
    features = batch(dtype=torch.float64)
    terms, _ = outcome(features)
    forget_image, forget_text, image, text, teacher_image, teacher_text = features
    x, frozen = 15.0 * image @ text.T - 9.0, 12.0 * teacher_image @ teacher_text.T - 8.0
    assert terms.retain.item() == pytest.approx(sigmoid_loss(image, text, 15.0, -9.0).item())
    of_teacher, of_student = (torch.distributions.Bernoulli(logits=logits) for logits in (frozen, x))
    divergence = torch.distributions.kl_divergence(of_teacher, of_student).sum() / len(image)
    assert terms.consistency.item() == pytest.approx(divergence.item())
    assert terms.forget.item() == pytest.approx((forget_image * forget_text).sum(1).mean().item())
    assert terms.total.item() == pytest.approx((terms.retain + 3 * terms.forget + 3 * terms.consistency).item())


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_contrastive_forgetting_is_minus_the_sigmoid_loss_of_the_forget_pairs(backend):
    features = batch(dtype=torch.float64)
    terms, gradients = outcome(
        features, forget="contrastive", lambda_retain=0.0, lambda_consistency=0.0, backend=backend
    )
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (15.0, -9.0)]
    leaves = [tensor.requires_grad_() for tensor in (*features[:2], *numbers)]
    loss = sigmoid_loss(*leaves, backend="eager")
    torch.testing.assert_close(terms.forget, -loss)
    torch.testing.assert_close([*gradients[:2], *gradients[4:]], [*torch.autograd.grad(-3 * loss, leaves)])


def test_a_student_equal_to_its_teacher_has_no_divergence_and_none_of_its_gradient():
    features = batch()
    features[4:] = features[2:4]
    numbers = {"scale": 110.0, "bias": -16.0, "teacher_scale": 110.0, "teacher_bias": -16.0}
    terms, gradients = outcome(features, lambda_retain=0.0, lambda_forget=0.0, backend="torch", **numbers)
    assert terms.consistency.item() == 0
    assert all(not gradient.any() for gradient in gradients)


def test_a_small_divergence_keeps_its_digits():
    features = batch(dtype=torch.float64)
    numbers = {"scale": 100.0, "bias": -10.0, "teacher_scale": 100.0, "teacher_bias": -10.0}
    features[4:] = [F.normalize(part + 1e-3 * torch.roll(part, 1, 1), dim=1) for part in features[2:4]]
    truth, _ = outcome(features, backend="eager", **numbers)
    terms, _ = outcome([part.float() for part in features], backend="torch", **numbers)
    assert terms.consistency.item() == pytest.approx(truth.consistency.item(), rel=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_teacher_that_is_sure_leaves_the_divergence_its_digits(sign):
    one, none = torch.ones(1, 1), torch.ones(0, 1)
    terms = sigmoid_cliperase_loss(
        none, none, one, one, one, one, sign * 19.0, 0.0, sign * 20.0, 0.0, lambda_retain=0.0, backend="torch"
    )
    of_teacher, of_student = (torch.distributions.Bernoulli(logits=torch.tensor(x).double()) for x in (20.0, 19.0))
    truth = torch.distributions.kl_divergence(of_teacher, of_student)
    assert terms.consistency.item() == pytest.approx(truth.item(), rel=1e-3)


def test_pairs_of_equal_group_are_not_pushed_apart():
    image = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    ids = torch.zeros(6, dtype=torch.int64)
    none = torch.zeros(0, 8)
    terms = sigmoid_cliperase_loss(
        none, none, image, image.detach().roll(1, 0), None, None, 10.0, -5.0, None, None, lambda_consistency=0.0,
        group_ids=ids,
    )  # fmt: skip
    own = (image * image.detach().roll(1, 0)).sum(1)
    assert terms.retain.item() == pytest.approx(F.softplus(5 - 10 * own).mean().item(), rel=1e-5)


def test_empty_batches_give_zeros_with_zero_gradients():
    for backend in ("eager", "torch"):
        terms, gradients = outcome(batch(n=0, m=0), backend=backend)
        assert [term.item() for term in terms] == [0, 0, 0, 0]
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    features = batch(dtype=dtype)
    truth, true_gradients = outcome([part.double() for part in features], backend="eager")
    terms, gradients = outcome(features, backend="torch")
    assert terms.total.dtype == torch.float32 and gradients[0].dtype == dtype
    assert terms.total.item() == pytest.approx(truth.total.item(), rel=1e-5)
    for ours, theirs in zip(gradients[:4], true_gradients, strict=False):
        assert (ours.double() - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"consistency": "intra"}, "consistency='intra' is not defined for a model with a logit_bias"),
        ({"teacher_bias": None}, "teacher_logit_bias is missing: the consistency needs a teacher"),
        ({"backend": "native"}, "does not compute the bernoulli loss; use auto, eager, torch"),
        ({"teacher_bias": torch.zeros(2)}, "teacher_logit_bias must be a number or one floating-point element"),
        ({"teacher_bias": torch.zeros((), requires_grad=True)}, "teacher_logit_bias requires grad"),
        ({"lambda_retain": -1.0}, "lambda_retain"),
        ({"group_ids": torch.zeros(3)}, "group_ids"),
    ],
)
def test_wrong_arguments_are_named(options, says):
    with pytest.raises(InputError, match=says):
        outcome(batch(), **options)


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("off", ["retain", "forget", "consistency"])
def test_a_term_of_weight_zero_is_zero_and_leaves_the_others(backend, off):
    full, _ = outcome(batch(), backend=backend)
    part, _ = outcome(batch(), backend=backend, **{f"lambda_{off}": 0.0})
    assert getattr(part, off) == 0
    for name in {"retain", "forget", "consistency"} - {off}:
        torch.testing.assert_close(getattr(part, name), getattr(full, name))


def test_widths_that_differ_are_named():
    features = batch()
    narrow = [part[:, :5] for part in features]
    with pytest.raises(InputError, match=r"forget_image .* and retain_image .* differ in width"):
        outcome([*narrow[:2], *features[2:]])
    with pytest.raises(InputError, match="teacher_image must be as wide as retain_image, 24"):
        outcome([*features[:4], *narrow[4:]], consistency="features")
    assert outcome([*features[:4], *narrow[4:]])[0].total.isfinite()


def test_the_consistency_of_features_needs_neither_scale_nor_bias_of_the_teacher():
    given, _ = outcome(batch(), consistency="features")
    without, _ = outcome(batch(), consistency="features", teacher_scale=None, teacher_bias=None)
    assert torch.equal(given.total, without.total)
