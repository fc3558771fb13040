"""Test the public loss functions: values and gradients of every option, empty batches, compiling, wrong input."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.errors import InputError
from cliperase_fast.functional import clip_loss, cliperase_loss, similarity_kl

BACKENDS = ("eager", "torch")
OPTIONS = list(itertools.product(("cosine", "hinge", "contrastive"), ("logits", "features", "intra")))
GROUPS = torch.tensor([0, 0, 1, 2, 1])


def features(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def batch(m: int = 4, n: int = 5, width: int = 6, teacher_width: int = 6, dtype: torch.dtype = torch.float64) -> dict:
    return {
        "forget_image": features(m, width, 1, dtype),
        "forget_text": features(m, width, 2, dtype),
        "retain_image": features(n, width, 3, dtype),
        "retain_text": features(n, width, 4, dtype),
        "teacher_image": features(n, teacher_width, 5, dtype),
        "teacher_text": features(n, teacher_width, 6, dtype),
        "logit_scale": torch.tensor(7.0, dtype=dtype),
        "teacher_logit_scale": torch.tensor(5.0, dtype=dtype),
    }


STUDENT = ("forget_image", "forget_text", "retain_image", "retain_text", "logit_scale")


def expected_terms(
    b: dict, forget: str, margin: float, consistency: str, group_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (retain, forget, consistency) a second time, with log_softmax."""

    def contrast(image, text, ids):
        similarity = b["logit_scale"] * image @ text.T
        if ids is not None:
            same = (ids[:, None] == ids[None, :]) & ~torch.eye(len(ids), dtype=torch.bool)
            similarity = similarity.masked_fill(same, -torch.inf)
        return -0.5 * sum(F.log_softmax(similarity, dim).diagonal().mean() for dim in (0, 1))

    def kl(student, teacher, dim):
        p, q = F.log_softmax(teacher, dim), F.log_softmax(student, dim)
        return (p.exp() * (p - q)).sum(dim).mean()

    s, t = b["logit_scale"], b["teacher_logit_scale"]
    image, text, frozen_image, frozen_text = (
        b[name] for name in ("retain_image", "retain_text", "teacher_image", "teacher_text")
    )
    cosines = torch.stack([i @ j for i, j in zip(b["forget_image"], b["forget_text"], strict=True)])
    forget_term = {
        "cosine": lambda: cosines.mean(),
        "hinge": lambda: torch.stack([c - margin if c > margin else 0 * c for c in cosines]).mean(),
        "contrastive": lambda: -contrast(b["forget_image"], b["forget_text"], None),
    }[forget]()
    consistency_term = {
        "logits": lambda: sum(kl(s * image @ text.T, t * frozen_image @ frozen_text.T, dim) for dim in (0, 1)),
        "features": lambda: kl(image, frozen_image, 1) + kl(text, frozen_text, 1),
        "intra": lambda: (
            kl(s * image @ image.T, t * frozen_image @ frozen_image.T, 1)
            + kl(s * text @ text.T, t * frozen_text @ frozen_text.T, 1)
        ),
    }[consistency]()
    return contrast(image, text, group_ids), forget_term, consistency_term


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_ids", [None, GROUPS], ids=["no groups", "groups"])
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
def test_every_option_has_the_value_and_gradients_of_its_formula(backend, group_ids, forget, consistency):
    margin = 0.05
    results = []
    for ours in (True, False):
        b = batch()
        for name in STUDENT:
            b[name].requires_grad_()
        if ours:
            terms = cliperase_loss(
                **b,
                forget=forget,
                margin=margin,
                consistency=consistency,
                group_ids=group_ids,
                backend=backend,
            )
        else:
            retain, forgotten, kept = expected_terms(b, forget, margin, consistency, group_ids)
            terms = (1.0 * retain + 3.0 * forgotten + 3.0 * kept, retain, forgotten, kept)
        terms[0].backward()
        results.append((*terms, *(b[name].grad for name in STUDENT)))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
def test_every_option_agrees_with_finite_differences(backend, forget, consistency):
    b = batch(m=3, n=4, width=3, teacher_width=3 if consistency == "features" else 2)

    def total(*student):
        return cliperase_loss(
            **{**b, **dict(zip(STUDENT, student, strict=True))},
            lambda_retain=0.5, forget=forget, margin=-0.1, consistency=consistency, group_ids=GROUPS[:4],
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(total, [b[name].requires_grad_() for name in STUDENT])


def test_the_default_weights_are_those_of_the_paper():
    terms = cliperase_loss(**batch())
    torch.testing.assert_close(terms.total, terms.retain + 3 * terms.forget + 3 * terms.consistency)
    assert terms == (terms.total, terms.retain, terms.forget, terms.consistency)


def test_weights_scale_the_total_and_not_the_terms():
    plain = cliperase_loss(**batch())
    weighted = cliperase_loss(**batch(), lambda_retain=0.25, lambda_forget=2.0, lambda_consistency=7.0)
    torch.testing.assert_close(plain[1:], weighted[1:])
    torch.testing.assert_close(weighted.total, 0.25 * plain.retain + 2 * plain.forget + 7 * plain.consistency)


@pytest.mark.parametrize("consistency", ["logits", "features", "intra"])
@pytest.mark.parametrize("off", ["retain", "forget", "consistency"])
def test_a_term_of_weight_zero_is_zero_and_leaves_the_others(off, consistency):
    full = cliperase_loss(**batch(), consistency=consistency)
    part = cliperase_loss(**batch(), consistency=consistency, **{f"lambda_{off}": 0.0})
    assert getattr(part, off) == 0
    for name in {"retain", "forget", "consistency"} - {off}:
        torch.testing.assert_close(getattr(part, name), getattr(full, name))


@pytest.mark.parametrize("consistency", ["logits", "features"])
def test_no_sweep_runs_where_no_term_needs_it(monkeypatch, consistency):
    def sweep(*_):
        raise AssertionError("a sweep ran")

    monkeypatch.setattr(functional, "_sweep", sweep)
    weight = 0.0 if consistency == "logits" else 3.0
    terms = cliperase_loss(**batch(), lambda_retain=0, lambda_consistency=weight, consistency=consistency)
    assert terms.forget != 0 and (terms.consistency > 0) == (weight > 0)


def test_without_consistency_no_teacher_is_needed():
    b = {**batch(), "teacher_image": None, "teacher_text": None, "teacher_logit_scale": None}
    terms = cliperase_loss(**b, lambda_consistency=0)
    assert terms.consistency == 0 and terms.retain > 0


def test_consistency_of_features_needs_no_teacher_scale():
    b = batch()
    expected = cliperase_loss(**b, consistency="features")
    torch.testing.assert_close(cliperase_loss(**{**b, "teacher_logit_scale": None}, consistency="features"), expected)


def test_hinge_stops_at_the_margin():
    image = torch.eye(2, dtype=torch.float64).requires_grad_()
    text = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double(), dim=1)  # cosines 0.707 and 0
    b = {**batch(width=2, teacher_width=2), "forget_image": image, "forget_text": text}
    terms = cliperase_loss(**b, forget="hinge", margin=0.2)
    torch.testing.assert_close(terms.forget.item(), (0.5**0.5 - 0.2) / 2)
    terms.forget.backward()
    assert image.grad[1].abs().max() == 0 and image.grad[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
@pytest.mark.parametrize(("m", "n"), [(0, 5), (4, 0), (0, 0)])
def test_empty_batches_give_zero_terms_and_zero_gradients(backend, forget, consistency, m, n):
    b = batch(m=m, n=n)
    for name in STUDENT:
        b[name].requires_grad_()
    terms = cliperase_loss(**b, forget=forget, consistency=consistency, backend=backend)
    if m == 0:
        assert terms.forget == 0
    if n == 0:
        assert terms.retain == 0 and terms.consistency == 0
    terms.total.backward()
    for name in STUDENT:
        assert b[name].grad.isfinite().all()
    for name, rows in (("forget_image", m), ("forget_text", m), ("retain_image", n), ("retain_text", n)):
        assert b[name].grad.any() == (rows > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pair_has_nothing_to_retain(backend):
    b = batch(n=1)
    b["retain_image"].requires_grad_()
    terms = cliperase_loss(**b, backend=backend)
    terms.total.backward()
    assert terms.retain == 0 and terms.consistency == 0
    assert b["retain_image"].grad.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_between_20_and_40_keep_the_digits_of_float64(backend):
    image = torch.eye(2, dtype=torch.float64)
    loss = clip_loss(image, image.flip(0), 21.0, backend=backend)  # each pair is 21 below the other entry
    assert loss.item() == pytest.approx(math.log1p(math.exp(-21)) + 21, rel=1e-14)


def test_clip_loss_and_similarity_kl_are_the_terms_of_the_whole():
    b = batch(teacher_width=3)
    student = b["retain_image"], b["retain_text"], b["logit_scale"]
    terms = cliperase_loss(**b, group_ids=GROUPS)
    divergence = similarity_kl(*student, b["teacher_image"], b["teacher_text"], b["teacher_logit_scale"])
    torch.testing.assert_close((clip_loss(*student, group_ids=GROUPS), divergence), (terms.retain, terms.consistency))
    assert clip_loss(*student) > terms.retain  # more negatives


def test_equal_captions_are_not_negatives_of_each_other():
    image = features(4, 8, 1)
    text = image[[0, 0, 2, 3]]  # the first two share a caption
    loss = clip_loss(image, text, 20.0, group_ids=torch.tensor([0, 0, 2, 3]))
    kept = [0, 2, 3]
    by_hand = 0
    similarity = 20.0 * image @ text.T
    for i, others in ((0, [2, 3]), (1, [2, 3]), (2, [0, 1, 3]), (3, [0, 1, 2])):
        row = similarity[i, [i, *others]].logsumexp(0) - similarity[i, i]
        column = similarity[[i, *others], i].logsumexp(0) - similarity[i, i]
        by_hand += (row + column) / 8
    torch.testing.assert_close(loss, by_hand)
    assert len(kept) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "scale", [20, 20.0, numpy.float16(20), torch.tensor(20.0), torch.tensor([20.0]), torch.tensor([[20.0]])]
)
def test_a_scale_may_be_a_number_or_any_tensor_of_one_element(scale):
    b = batch(dtype=torch.float32)
    expected = clip_loss(b["retain_image"], b["retain_text"], torch.tensor(20.0))
    torch.testing.assert_close(clip_loss(b["retain_image"], b["retain_text"], scale), expected)


def test_the_gradient_of_a_scale_has_its_shape():
    b = batch()
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    cliperase_loss(**{**b, "logit_scale": scale}).total.backward()
    assert scale.grad.shape == (1,) and scale.grad.abs() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
def test_autocast_changes_nothing(backend, forget, consistency):
    b = batch(dtype=torch.float32)
    b["retain_image"].requires_grad_()
    options = {"forget": forget, "consistency": consistency, "backend": backend}
    plain = cliperase_loss(**b, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = cliperase_loss(**b, **options)
    assert [term.dtype for term in cast] == [torch.float32] * 4
    torch.testing.assert_close(cast, plain)  # bfloat16 would be off by 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
def test_half_precision_is_computed_in_float32(dtype, forget, consistency):
    halves = batch(dtype=dtype)
    floats = {name: tensor.float() for name, tensor in halves.items()}
    for name in STUDENT:
        halves[name].requires_grad_()
        floats[name].requires_grad_()
    options = {"forget": forget, "consistency": consistency}
    ours, expected = cliperase_loss(**halves, **options), cliperase_loss(**floats, **options)
    torch.testing.assert_close(ours, expected)
    assert ours.total.dtype == torch.float32
    ours.total.backward()
    expected.total.backward()
    for name in STUDENT:
        assert halves[name].grad.dtype == dtype
        # a tensor that several terms use adds up that many rounded gradients
        margin = 1.5 * torch.finfo(dtype).eps * floats[name].grad.abs().max().item()
        torch.testing.assert_close(halves[name].grad.float(), floats[name].grad, rtol=0, atol=margin)


def test_encoders_under_autocast_are_trained_through_the_loss():
    # what a training loop does: features of mixed dtypes, a scale in float32, one backward
    torch.manual_seed(0)
    image_tower, text_tower = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    log_scale = torch.nn.Parameter(torch.tensor(2.0))
    x = features(9, 6, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        image = F.normalize(image_tower(x), dim=1)
        text = F.normalize(text_tower(x), dim=1)
        terms = cliperase_loss(
            image[:4], text[:4], image[4:], text[4:], x[4:], x[4:], log_scale.exp(), 10.0, backend="torch"
        )
    terms.total.backward()
    for parameter in (*image_tower.parameters(), *text_tower.parameters(), log_scale):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


# what surrounds the sweep is the same for all backends
@pytest.mark.parametrize(
    ("backend", "forget", "consistency"),
    [
        ("eager", "cosine", "logits"),
        ("torch", "cosine", "logits"),
        ("torch", "hinge", "features"),
        ("torch", "contrastive", "intra"),
    ],
)
def test_torch_compile_takes_the_whole_graph(backend, forget, consistency):
    def step(image, text, b):
        return cliperase_loss(
            **{**b, "retain_image": image, "retain_text": text},
            forget=forget, consistency=consistency, group_ids=GROUPS, backend=backend,
        ).total  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    b = batch()
    results = []
    for function in (step, compiled):
        image, text = b["retain_image"].clone().requires_grad_(), b["retain_text"].clone().requires_grad_()
        loss = function(image, text, b)
        loss.backward()
        results.append((loss, image.grad, text.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_torch_compile_with_changing_batch_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, t: clip_loss(i, t, 10.0, backend="torch"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (5, 9, 2):
        image, text = features(n, 4, 1), features(n, 4, 2)
        torch.testing.assert_close(compiled(image, text), clip_loss(image, text, 10.0, backend="eager"))


def wrong(match: str, **changes: object):
    return pytest.param(changes, match, id=match)


I64 = torch.int64


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        wrong("forget_image must be a tensor", forget_image=[[1.0]]),
        wrong("retain_image has shape .5.; it must be two-dimensional", retain_image=torch.ones(5)),
        wrong("retain_text has shape .5, 6, 1.; it must be two-dim", retain_text=torch.ones(5, 6, 1)),
        wrong("retain_image has dtype torch.int64; convert it to", retain_image=torch.ones(5, 6, dtype=I64)),
        wrong("forget_text has dtype torch.complex64", forget_text=torch.ones(4, 6, dtype=torch.complex64)),
        wrong("teacher_text has dtype torch.bool", teacher_text=torch.ones(5, 6, dtype=torch.bool)),
        wrong("features of width 0", forget_image=torch.ones(4, 0), forget_text=torch.ones(4, 0)),
        wrong("forget_image .4, 6. and forget_text .3, 6. differ in number", forget_text=torch.ones(3, 6)),
        wrong("retain_image .5, 6. and retain_text .5, 7. differ in width", retain_text=torch.ones(5, 7)),
        wrong("forget_image .4, 3. and retain_image .5, 6. differ in width",
              forget_image=torch.ones(4, 3), forget_text=torch.ones(4, 3)),
        wrong("teacher_image .5, 6. and teacher_text .4, 6. differ in number", teacher_text=torch.ones(4, 6)),
        wrong("teacher_image .4, 6. and retain_image .5, 6. differ in number of rows",
              teacher_image=torch.ones(4, 6), teacher_text=torch.ones(4, 6)),
        wrong("teacher_image, teacher_text and teacher_logit_scale are needed", teacher_image=None),
        wrong("teacher_logit_scale are needed", teacher_logit_scale=None),
        wrong("teacher_image must be as wide as retain_image, 6", consistency="features",
              teacher_image=torch.ones(5, 3), teacher_text=torch.ones(5, 3)),
        wrong("teacher_image requires grad.*torch.no_grad..*teacher_image.detach",
              teacher_image=torch.ones(5, 6, requires_grad=True)),
        wrong("teacher_text requires grad", teacher_text=torch.ones(5, 6, requires_grad=True)),
        wrong("teacher_logit_scale requires grad", teacher_logit_scale=torch.ones((), requires_grad=True)),
        wrong("group_ids must be an int64 tensor, an id a pair, not torch.int32",
              group_ids=torch.ones(5, dtype=torch.int32)),
        wrong("group_ids must be an int64 tensor, an id a pair, not list", group_ids=[0, 0, 1, 2, 3]),
        wrong("group_ids has shape .4.; retain_image .5, 6. needs .5.", group_ids=torch.ones(4, dtype=I64)),
        wrong("group_ids has shape .5, 1.", group_ids=torch.ones(5, 1, dtype=I64)),
        wrong("logit_scale must be a number or one floating-point element, not torch.float32 of shape .2.",
              logit_scale=torch.ones(2)),
        wrong("logit_scale must be a number or one floating", logit_scale=torch.ones((), dtype=I64)),
        wrong("logit_scale=nan must be a finite number", logit_scale=float("nan")),
        wrong("logit_scale=inf must be a finite", logit_scale=float("inf")),
        wrong("logit_scale='14' must be", logit_scale="14"),
        wrong("logit_scale=1e.39 is too large for torch.float32; pass exp of", logit_scale=1e39),
        wrong("logit_scale=1000.* .401 characters. is too large", logit_scale=10**400),
        wrong("backend=.'torch'. is not a backend", backend=["torch"]),
        wrong("logit_scale=None must be", logit_scale=None),
        wrong("teacher_logit_scale=-inf must be", teacher_logit_scale=float("-inf")),
        wrong("retain_text is on meta and retain_image on cpu; move them",
              retain_text=torch.ones(5, 6, device="meta")),
        wrong("forget_image is on meta and retain_image on cpu",
              forget_image=torch.ones(4, 6, device="meta"), forget_text=torch.ones(4, 6, device="meta")),
        wrong("teacher_image is on meta and retain_image on cpu",
              teacher_image=torch.ones(5, 6, device="meta"), teacher_text=torch.ones(5, 6, device="meta")),
        wrong("group_ids is on meta", group_ids=torch.ones(5, dtype=I64, device="meta")),
        wrong("logit_scale is on meta and the features on cpu", logit_scale=torch.ones((), device="meta")),
        wrong("forget='cosin' is not known; did you mean 'cosine'", forget="cosin"),
        wrong(r"forget=\['cosine'\] is not known", forget=["cosine"]),
        wrong("consistency='xyz' is not known; use one of logits, features, intra", consistency="xyz"),
        wrong("margin=1.5 is a cosine", margin=1.5),
        wrong("lambda_forget=-1.0 must be a finite number, 0 or larger", lambda_forget=-1.0),
        wrong("lambda_retain=nan must be", lambda_retain=float("nan")),
        wrong("lambda_forget=True must be a finite number", lambda_forget=True),
        wrong("lambda_consistency=tensor..3... must be a finite number", lambda_consistency=torch.tensor([3.0])),
        wrong("lambda_retain=.*without a gradient; pass lambda_retain.item()",
              lambda_retain=torch.tensor(1.0, requires_grad=True)),
        wrong("lambda_forget=1e.40 is too large for float32", lambda_forget=1e40),
        wrong("lambda_consistency=1000.* .401 characters. is too large", lambda_consistency=10**400),
        wrong("margin=True is a cosine; it must be a number", margin=True),
        wrong("are all 0, so nothing would be trained", lambda_retain=0, lambda_forget=0, lambda_consistency=0),
        wrong("backend='gpu' is not a backend", backend="gpu", lambda_retain=0, lambda_consistency=0),
        wrong("keep='all' is not known; use one of auto, nothing, similarities", keep="all"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_before_anything_is_computed(monkeypatch, changes, match):
    def computed(*_):
        raise AssertionError("computed something")

    for name in ("_sweep", "forget_term_of", "_features_kl"):
        monkeypatch.setattr(functional, name, computed)
    with pytest.raises(InputError, match=match):
        cliperase_loss(**{**batch(dtype=torch.float32), **changes})


def test_wrong_input_of_the_smaller_functions_is_named_with_their_own_names():
    image, text = features(5, 6, 1), features(5, 6, 2)
    with pytest.raises(
        InputError, match=r"image_features \[5, 6\] and text_features \[4, 6\] differ in number of rows"
    ):
        clip_loss(image, text[:4], 1.0)
    with pytest.raises(InputError, match=r"group_ids has shape \[3\]; image_features \[5, 6\] needs \[5\]"):
        clip_loss(image, text, 1.0, group_ids=torch.arange(3))
    with pytest.raises(
        InputError, match=r"teacher_image \[4, 6\] and image_features \[5, 6\] differ in number of rows"
    ):
        similarity_kl(image, text, 1.0, image[:4], text[:4], 1.0)
    with pytest.raises(InputError, match="teacher_text requires grad"):
        similarity_kl(image, text, 1.0, image, text.clone().requires_grad_(), 1.0)
    with pytest.raises(InputError, match="not a backend"):
        clip_loss(image, text, 1.0, backend="none")
    for call in (
        lambda: clip_loss(image, text, 1.0, keep="x"),
        lambda: similarity_kl(image, text, 1.0, image, text, 1.0, keep="x"),
    ):
        with pytest.raises(InputError, match="keep='x' is not known"):
            call()


@pytest.mark.parametrize("n", [5, 300])
def test_features_on_device_meta_give_a_loss_of_the_right_form(n):
    image, text = (torch.empty(n, 6, device="meta", requires_grad=True) for _ in range(2))
    loss = clip_loss(image, text, 10.0)
    loss.backward()
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    assert image.grad is not None and image.grad.shape == image.shape


def test_weights_may_be_numbers_of_numpy_or_scalar_tensors():
    weights = {"lambda_retain": 1.0, "lambda_forget": 2.0, "lambda_consistency": 3.0, "margin": 0.25}
    expected = cliperase_loss(**batch(), **weights, forget="hinge")
    for kind in (numpy.float32, numpy.float64, torch.tensor):
        terms = cliperase_loss(**batch(), **{name: kind(value) for name, value in weights.items()}, forget="hinge")
        torch.testing.assert_close(terms, expected)


def test_the_scale_may_be_a_number_of_numpy():
    image, text = F.normalize(torch.randn(2, 5, 6), dim=-1)
    assert torch.equal(clip_loss(image, text, numpy.float32(14)), clip_loss(image, text, 14.0))
