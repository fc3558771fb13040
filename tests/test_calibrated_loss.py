"""Test calibrated forgetting: values and gradients of every option, special batches, precision, wrong input."""

from __future__ import annotations

import pickle

import pytest
import torch
from calibrated_cases import STUDENT, TERMS, batch, exact, expected_terms, features, masks, step

import cliperase_fast as cf
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.functional import CalibratedTerms, calibrated_loss, clip_loss, similarity_kl
from cliperase_fast.losses import CalibratedLoss
from cliperase_fast.ops.registry import REGISTRY
from cliperase_fast.validation import computes

BACKENDS = tuple(
    name
    for name, backend in REGISTRY.items()
    if backend.missing is None and computes(backend, "calibrated", "cpu") and torch.float64 in backend.dtypes
)
WEIGHTS = (1.0, 3.0, 3.0, 30.0)


def assert_formula(b, backend, weights=WEIGHTS, tolerance=1e-11, **options) -> None:
    """Each term, and the gradients of the total, against the second writing of the formulas."""
    found = step(b, backend=backend, **options)
    leaves = {name: b[name].detach().clone().requires_grad_() for name in STUDENT}
    expected = expected_terms({**b, **leaves})
    total = sum(weight * expected[name] for weight, name in zip(weights, TERMS, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name in TERMS:
        torch.testing.assert_close(found[name], expected[name].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found["total"], total.detach(), rtol=tolerance, atol=tolerance)
    for name, gradient in zip(STUDENT, gradients, strict=True):
        torch.testing.assert_close(found[f"d {name}"], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forget", ["some", "none", "all"])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
@pytest.mark.parametrize("background", [True, False], ids=["background", "from the batch"])
def test_terms_and_gradients_are_those_of_the_formulas(backend, forget, groups, background):
    # a student of another width than the teacher, and of the same
    for widths in ((6, 4), (5, 5)):
        assert_formula(batch(9, *widths, forget=forget, groups=groups, background=background), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("forget", ["some", "none", "all"])
def test_smallest_batches(backend, n, forget):
    for groups in (True, False):
        assert_formula(batch(n, forget=forget, groups=groups), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_background_may_be_given_and_the_other_come_from_the_batch(backend):
    for name in ("background_image", "background_text"):
        assert_formula({**batch(), name: None}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forget", ["some", "none", "all"])
def test_gradients_agree_with_finite_differences(backend, forget):
    b = batch(5, 3, 2, forget=forget)

    def total(*student):
        return calibrated_loss(
            **{**b, **dict(zip(STUDENT, student, strict=True))}, lambda_retain=0.7, lambda_anchor=2.0, backend=backend
        )

    assert torch.autograd.gradcheck(total, [b[name].requires_grad_() for name in STUDENT])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("term", range(5))
def test_each_term_has_its_own_gradient_for_any_incoming_one(backend, term):
    b = batch(12)
    weights = tuple(-2.5 * (place == term) for place in range(5))
    found = step(b, weights, backend=backend)
    leaves = {name: b[name].clone().requires_grad_() for name in STUDENT}
    terms = expected_terms({**b, **leaves})
    total = sum(weight * terms[name] for weight, name in zip(WEIGHTS, TERMS, strict=True))
    value = -2.5 * (total if term == 0 else terms[TERMS[term - 1]])
    for name, gradient in zip(
        STUDENT, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True
    ):
        expected = torch.zeros_like(leaves[name]) if gradient is None else gradient
        torch.testing.assert_close(found[f"d {name}"], expected, rtol=1e-11, atol=1e-11)


def test_any_image_of_the_concept_counts_and_other_images_do_not():
    # pairs 0 and 1 have the concept, only 0 is to be forgotten: its caption leaves both images
    b = batch(4, background=False)
    b |= {
        "forget_mask": masks(4)["none"].index_fill(0, torch.tensor([0]), True),
        "group_ids": torch.tensor([5, 5, 6, 7]),
    }
    image, text = torch.eye(4, 6).double(), torch.eye(4, 6).double()
    text[0] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) / 3**0.5
    terms = calibrated_loss(**{**b, "image_features": image.requires_grad_(), "text_features": text})
    terms.forget.backward()
    assert image.grad.any(1).tolist() == [True, True, False, False]


def test_no_retain_pair_has_the_concept_without_ids():
    b = batch(6, groups=False)
    image = b["image_features"].requires_grad_()
    b["text_features"] = image.detach()  # cosines of 1 on the diagonal, above any background
    calibrated_loss(**b).forget.backward()
    assert image.grad.any(1).tolist() == b["forget_mask"].tolist()


def test_forgetting_stops_at_the_background():
    image = features(5, 6, 1)
    below = {**batch(5, forget="all", groups=False), "image_features": image, "text_features": -image}
    below |= {"background_image": torch.ones(5).double(), "background_text": torch.ones(5).double()}
    found = step(below, (0, 0, 1, 0, 0))
    assert found["forget"] == 0 and not found["d image_features"].any()
    above = {**below, "background_image": -torch.ones(5).double(), "background_text": -torch.ones(5).double()}
    assert step(above, (0, 0, 1, 0, 0))["forget"] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_forget_pairs_the_terms_are_those_of_the_other_losses(backend):
    b = batch(7, forget="none")
    student, teacher = (
        [b[name] for name in STUDENT],
        [b[f"teacher_{name}"] for name in ("image", "text", "logit_scale")],
    )
    terms = calibrated_loss(**b, backend=backend)
    torch.testing.assert_close(terms.retain, clip_loss(*student, group_ids=b["group_ids"]))
    torch.testing.assert_close(terms.consistency, similarity_kl(*student, *teacher))
    assert terms.forget == 0
    torch.testing.assert_close(terms.anchor, (student[0] @ student[1].T - teacher[0] @ teacher[1].T).square().mean())


def test_default_weights():
    terms = calibrated_loss(**batch())
    expected = terms.retain + 3 * terms.forget + 3 * terms.consistency + 30 * terms.anchor
    torch.testing.assert_close(terms.total, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("off", TERMS)
def test_a_term_of_weight_zero_is_zero_and_leaves_the_others(backend, off):
    b = batch()
    full = calibrated_loss(**b, backend=backend)
    found = step(b, backend=backend, **{f"lambda_{off}": 0.0})
    for name in TERMS:
        torch.testing.assert_close(found[name], torch.zeros_like(full.total) if name == off else getattr(full, name))
    total = sum(weight * found[name] for name, weight in zip(TERMS, WEIGHTS, strict=True))
    torch.testing.assert_close(found["total"], total)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_an_empty_batch_is_zero_and_has_zero_gradients(backend):
    found = step(batch(0), backend=backend)
    assert all(found[name] == 0 for name in ("total", *TERMS))
    assert found["d image_features"].shape == (0, 6) and found["d logit_scale"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_precision_is_computed_in_float32(backend, dtype):
    b = batch(12, dtype=dtype)
    found, expected = step(b, backend=backend), step(exact(b), backend="eager")
    assert found["total"].dtype == found["d logit_scale"].dtype == torch.float32
    assert found["d image_features"].dtype == found["d text_features"].dtype == dtype
    for name, value in found.items():
        tolerance = 1e-5 if value.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_levels_may_have_any_floating_dtype(backend):
    b = batch(9, dtype=torch.float32)
    b["background_image"], b["background_text"] = b["background_image"].double(), b["background_text"].bfloat16()
    torch.testing.assert_close(step(b, backend=backend)["total"].double(), step(exact(b), backend="eager")["total"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    b = batch(9, dtype=torch.float32)
    expected = step(b, backend=backend)
    for name in ("image_features", "text_features", "teacher_image", "teacher_text"):
        b[name] = torch.stack((b[name], torch.full_like(b[name], torch.nan)), 2).flatten(1)[:, ::2]
    for name in ("forget_mask", "group_ids", "background_image", "background_text"):
        b[name] = b[name][:, None].repeat(1, 2).T.contiguous().T[:, 0]
    leaves = {name: b[name].requires_grad_() for name in STUDENT[:2]}
    terms = calibrated_loss(**b, backend=backend)
    gradients = torch.autograd.grad(terms.total, list(leaves.values()))
    for ours, name in zip((*terms, *gradients), ("total", *TERMS, "d image_features", "d text_features"), strict=True):
        torch.testing.assert_close(ours.detach(), expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
def test_order_of_the_pairs_does_not_matter(backend, groups):
    b = batch(11, groups=groups)
    whole = step(b, backend=backend)
    mixed = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    # any order, forget pairs first, forget pairs last, forget pairs in one piece between the others
    last = torch.argsort(b["forget_mask"], stable=True)
    for order in (mixed, last.flip(0), last, last.roll(-2)):
        ordered = {name: v[order] if isinstance(v, torch.Tensor) and v.ndim else v for name, v in b.items()}
        expected = {name: v[order] if v.ndim else v for name, v in whole.items()}
        torch.testing.assert_close(step(ordered, backend=backend), expected, rtol=1e-10, atol=1e-12)


def test_eager_has_second_derivatives_and_the_others_refuse_them():
    for backend in BACKENDS:
        b = batch()
        image = b["image_features"].requires_grad_()
        (gradient,) = torch.autograd.grad(calibrated_loss(**b, backend=backend).total, image, create_graph=True)
        if backend == "eager":
            assert torch.autograd.grad(gradient.square().sum(), image)[0].abs().max() > 0
        else:
            with pytest.raises(UnlearningError, match=r"second derivatives .* backend='eager'"):
                gradient.square().sum().backward()


def wrong(match: str, **changes: object):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        wrong("text_features .8, 6. differ in number of rows", text_features=torch.ones(8, 6)),
        wrong("teacher_image .8, 6. and image_features .9, 6. differ in number of rows",
              teacher_image=torch.ones(8, 6), teacher_text=torch.ones(8, 6)),
        wrong("teacher_image, teacher_text and teacher_logit_scale are needed", teacher_image=None),
        wrong("teacher_text requires grad", teacher_text=torch.ones(9, 4, requires_grad=True)),
        wrong("forget_mask must be a bool tensor, .* not list", forget_mask=[True] * 9),
        wrong("forget_mask must be a bool tensor, .* not torch.int64", forget_mask=torch.ones(9, dtype=torch.int64)),
        wrong("forget_mask has shape .8.; image_features .9, 6. needs .9.",
              forget_mask=torch.ones(8, dtype=torch.bool)),
        wrong("forget_mask is on meta", forget_mask=torch.ones(9, dtype=torch.bool, device="meta")),
        wrong("group_ids has shape .4.", group_ids=torch.ones(4, dtype=torch.int64)),
        wrong("background_image must be a floating-point tensor, .* not float", background_image=0.1),
        wrong("background_text must be .* not torch.int64", background_text=torch.ones(9, dtype=torch.int64)),
        wrong("background_text has shape .9, 1.", background_text=torch.ones(9, 1)),
        wrong("background_image requires grad", background_image=torch.ones(9, requires_grad=True)),
        wrong("background_image is on meta", background_image=torch.ones(9, device="meta")),
        wrong("logit_scale=nan must be", logit_scale=float("nan")),
        wrong("lambda_anchor=-1.0 must be a finite number, 0 or larger", lambda_anchor=-1.0),
        wrong("lambda_retain, lambda_forget, lambda_consistency, lambda_anchor are all 0", lambda_retain=0,
              lambda_forget=0, lambda_consistency=0, lambda_anchor=0),
        wrong("keep='x' is not known", keep="x"),
        wrong("gather='x' is not known", gather="x"),
        wrong("backend='x' is not a backend", backend="x"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_before_anything_is_computed(monkeypatch, changes, match):
    def computed(*_):
        raise AssertionError("computed something")

    monkeypatch.setattr(cf.functional, "background_levels", computed)
    with pytest.raises(InputError, match=match):
        calibrated_loss(**{**batch(), **changes})


def test_the_module_gives_what_the_function_gives():
    b = batch()
    student = [b.pop(name) for name in ("image_features", "text_features", "teacher_image", "teacher_text")]
    scales = b.pop("logit_scale"), b.pop("teacher_logit_scale")
    loss = CalibratedLoss(0.5, 2.0, 0.25, lambda_anchor=4.0, backend="eager")
    weights = {"lambda_retain": 0.5, "lambda_forget": 2.0, "lambda_consistency": 0.25, "lambda_anchor": 4.0}
    terms = pickle.loads(pickle.dumps(loss))(*student, *scales, **b)
    assert isinstance(terms, CalibratedTerms) and not loss.state_dict()
    assert terms == calibrated_loss(*student, *scales, **b, **weights, backend="eager")
    assert repr(loss) == (
        "CalibratedLoss(lambda_retain=0.5, lambda_forget=2.0, lambda_consistency=0.25, lambda_anchor=4.0, "
        "backend='eager', keep='auto')"
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lambda_anchor": -1.0}, "lambda_anchor=-1.0 must be"),
        ({"backend": "nativ"}, "backend='nativ' is not a backend"),
        ({"keep": "some"}, "keep='some' is not known"),
        ({"gather": "some"}, "gather='some' is not known"),
        ({"process_group": "some"}, "process_group='some' is not known"),
    ],
)
def test_wrong_options_of_the_module_are_refused_at_construction(options, match):
    with pytest.raises(InputError, match=match):
        cf.CalibratedLoss(**options)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])  # "native" takes no float64
def test_ids_that_differ_in_their_upper_bits_are_different_concepts(backend):
    b = {**batch(dtype=torch.float32), "group_ids": torch.arange(9) % 4}
    wide = {**b, "group_ids": b["group_ids"] * 2**32}  # hashes, for example
    torch.testing.assert_close(step(wide, backend=backend), step(b, backend=backend))
