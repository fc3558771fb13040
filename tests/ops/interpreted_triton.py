"""The Triton sweep in Triton's interpreter against float64; run by `test_triton_interpreter.py`.

Blocks are 32 x 32 here, so 65 pairs are three blocks, the last of one row, and strip_rows=1 makes each a strip.

Half precision: dS is rounded to the features' dtype, so a gradient may be off by half an eps of its mass on top of what
`accuracy_cases.py` allows float32; in float16, entries of dS under 2^-37 of the largest vanish.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import REGIMES, UNDERFLOW, errors, regime, rounding_unit
from rectangles import in_pieces
from sweep_cases import Batch, Outcome, naive_sweep, outcome, random_batch
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.errors import InputError
from cliperase_fast.ops import backends, choose, reference
from cliperase_fast.ops.triton import features
from cliperase_fast.ops.triton import sweep as triton_sweep
from cliperase_fast.ops.triton.sweep import sweep

FORMS = {"both": (True, True), "rm": (True, False), "kl": (False, True)}
HALF = (torch.bfloat16, torch.float16)


def margins(batch: Batch, truth: Outcome, dtype: torch.dtype) -> dict[str, float]:
    """Allowed errors of losses and gradients for features of `dtype`."""
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    allowed = {key: 2 * value + UNDERFLOW for key, value in unit.items()}
    if dtype in HALF:
        half_eps = torch.finfo(dtype).eps / 2
        of_similarities = 1 + batch.scale.item() + (batch.teacher_scale.item() if batch.want_consistency else 0)
        mass = rounding_unit(batch, truth, 1 / of_similarities)
        vanished = 2.0**-38 * rounding_unit(batch, truth, 1.0)["loss"] if dtype == torch.float16 else 0.0
        for key in ("image", "text", "scale"):
            allowed[key] += half_eps * mass[key] + vanished * (1.0 if key == "scale" else batch.scale.item())
            if key != "scale":  # is float32
                allowed[key] += half_eps * getattr(truth, key).abs().max().item() + torch.finfo(dtype).tiny
    return allowed


def check(batch: Batch, dtype: torch.dtype = torch.float32, **options: int | str) -> None:
    """`batch` in `dtype` against float64."""
    batch = batch.to(dtype).to(torch.float64)
    truth = outcome(reference.sweep, batch)
    result = outcome(sweep, batch.to(dtype), **options)
    assert result.image.dtype == result.text.dtype == dtype
    assert result.retention.dtype == result.consistency.dtype == result.scale.dtype == torch.float32
    naive = errors(outcome(naive_sweep, batch.to(dtype)), truth)
    for key, allowed in margins(batch, truth, dtype).items():
        error = errors(result, truth)[key]
        assert error <= allowed, (key, error, allowed)
        assert not error > naive[key] + allowed  # naive may be NaN: it overflows in float16


def formed(batch: Batch, form: str) -> Batch:
    batch = replace(batch, want_retention=FORMS[form][0])
    return batch if FORMS[form][1] else batch.without_teacher()


def some_groups(n: int) -> Tensor:
    return torch.randint(-3, max(1, n // 3), (n,), generator=torch.Generator().manual_seed(1))


# 1 and 2: nothing or one thing off the diagonal; 17: part of a block; 65: three blocks, the last of one row
@pytest.mark.parametrize("n", [1, 2, 17, 65])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_size(form, groups, n):
    # widths: 40 and 24 are no multiples of a block's depth
    batch = random_batch(n, width=40, teacher_width=24)
    check(formed(replace(batch, group_ids=some_groups(n) if groups else None), form), strip_rows=1)


@pytest.mark.parametrize(("width", "teacher_width"), [(16, 64), (64, 40), (1, 3), (96, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width(width, teacher_width, dtype):
    check(random_batch(40, width=width, teacher_width=teacher_width), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_strips_of_several_blocks_and_chunks_of_several_tiles(monkeypatch, dtype):
    # 130 pairs are five blocks: strips of two blocks forward and backward, chunks of two tiles
    monkeypatch.setattr(triton_sweep, "_PROGRAMS", 6)
    batch = replace(random_batch(130), group_ids=some_groups(130))
    check(batch, dtype, strip_rows=64)


# 96 kept rows are three blocks of 130 pairs' five; a kept strip of two blocks is followed by one of one
@pytest.mark.parametrize("kept_rows", [96, 130])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_similarities_give_what_forming_them_again_gives(monkeypatch, dtype, form, kept_rows):
    batch = formed(replace(random_batch(130), group_ids=some_groups(130)), form)
    row_bytes = 4 * 130 * (1 + batch.want_consistency)
    monkeypatch.setattr(triton_sweep, "keep_bytes", lambda device: row_bytes * (kept_rows + 31))
    monkeypatch.setattr(triton_sweep, "_KEPT_ROWS", 32)
    kept = watch_kept(monkeypatch)
    check(batch, dtype, strip_rows=64, keep="similarities")
    assert kept == [row_bytes * kept_rows]
    again, stored = (outcome(sweep, batch.to(dtype), keep=keep, strip_rows=64) for keep in ("auto", "similarities"))
    assert kept == [row_bytes * kept_rows, 0, row_bytes * kept_rows]
    for ours, theirs in zip(again.tensors(), stored.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-6)


def watch_kept(monkeypatch) -> list[int]:
    """The sizes of what the sweeps from here on keep."""
    sizes = []
    forward = triton_sweep._TritonEngine.forward

    def watched(self, *arguments):
        sums, kept = forward(self, *arguments)
        sizes.append(kept.numel())
        return sums, kept

    monkeypatch.setattr(triton_sweep._TritonEngine, "forward", watched)
    return sizes


def test_nothing_is_kept_without_a_backward_pass(monkeypatch):
    kept = watch_kept(monkeypatch)
    batch = random_batch(17).to(torch.float32)
    with torch.no_grad():
        sweep(*batch.arguments(), keep="similarities")
    sweep(*batch.arguments(), keep="similarities")
    assert kept == [0, 0]


@pytest.mark.parametrize("groups", ["one", "all different"])
def test_extreme_groups(groups):
    batch = random_batch(40)
    check(replace(batch, group_ids=torch.full((40,), 7) if groups == "one" else torch.arange(40)))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
def test_float32_is_as_good_as_the_rounding_of_the_similarities_allows(name, scale):
    check(regime(name, scale, 65))


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", REGIMES)
def test_half_precision_costs_one_rounding_of_ds(name, dtype, scale):
    check(regime(name, scale, 40), dtype)


def test_columns_that_grow_from_strip_to_strip():
    batch = random_batch(65, scale=60.0, teacher_scale=80.0)
    growing = torch.linspace(0.1, 1.0, 65, dtype=torch.float64)[:, None]
    check(replace(batch, image=batch.image * growing, teacher_image=batch.teacher_image * growing), strip_rows=1)


@pytest.mark.parametrize("kind", ["transposed", "every other column", "rows of a wider tensor", "expanded"])
def test_strides_do_not_matter(kind):
    def strided(tensor):
        if kind == "transposed":
            return tensor.T.contiguous().T
        if kind == "every other column":
            return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 2).flatten(1)[:, ::2]
        if kind == "rows of a wider tensor":
            return torch.cat((tensor, torch.full_like(tensor, torch.nan)), 1)[:, : tensor.shape[1]]
        return tensor[:1].expand_as(tensor)

    batch = random_batch(17).to(torch.float32)
    odd = {name: strided(getattr(batch, name)) for name in ("image", "text", "teacher_image", "teacher_text")}
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    expected = outcome(sweep, replace(batch, **{name: tensor.contiguous() for name, tensor in odd.items()}))
    leaves = [odd["image"].requires_grad_(), odd["text"].requires_grad_()]
    losses = sweep(*leaves, *replace(batch, **odd).arguments()[2:])
    gradients = torch.autograd.grad(sum(losses), leaves)
    for ours, theirs in zip((*losses, *gradients), expected.tensors()[:4], strict=True):
        assert torch.equal(ours, theirs)


# half precision keeps its digits whatever the incoming gradients: loss scaling, tiny weights, one of them 0
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (-2.5, 1e4), (65536.0, 3 * 65536.0), (1e-9, 3e-9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_incoming_gradients_other_than_one(weights, dtype):
    batch = random_batch(33).to(dtype)
    exact = outcome(reference.sweep, batch.to(torch.float64), weights)
    leaves = [tensor.float().to(dtype).requires_grad_() for tensor in (batch.image, batch.text)]
    scale = batch.scale.clone().requires_grad_()
    losses = sweep(*leaves, scale, *batch.arguments()[3:])
    if dtype == torch.float16 and max(map(abs, weights)) > 1e4:  # their gradients do not fit float16 themselves
        weights, exact = (1.0, 3.0), outcome(reference.sweep, batch.to(torch.float64), (1.0, 3.0))
    (weights[0] * losses[0] + weights[1] * losses[1]).backward()
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    for ours, theirs in ((leaves[0].grad, exact.image), (leaves[1].grad, exact.text), (scale.grad, exact.scale)):
        limit = tolerance * theirs.abs().max().item()
        if ours.dtype == torch.float16:
            limit += 2**-24  # the least number of float16
        assert (ours.double() - theirs).abs().max().item() <= limit


def test_no_incoming_gradient_at_all():
    result = outcome(sweep, random_batch(17).to(torch.float16), (0.0, 0.0))
    assert not any(gradient.any() for gradient in (result.image, result.text, result.scale))


@pytest.mark.parametrize("needed", ["image", "text", "scale"])
def test_a_single_input_may_need_the_gradient(needed):
    batch = random_batch(17).to(torch.float32)
    expected = outcome(sweep, batch)
    inputs = {name: getattr(batch, name).clone() for name in ("image", "text", "scale")}
    inputs[needed].requires_grad_()
    sum(sweep(*inputs.values(), *batch.arguments()[3:])).backward()
    assert torch.equal(inputs[needed].grad, getattr(expected, needed))
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


def test_scale_zero_has_the_gradient_of_the_scale():
    batch = replace(random_batch(17), scale=torch.zeros((), dtype=torch.float64))
    check(batch)
    assert outcome(sweep, batch.to(torch.float32)).scale.abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(dtype):
    batch = replace(random_batch(65), group_ids=some_groups(65)).to(dtype)
    first, second = (outcome(sweep, batch, strip_rows=1) for _ in range(2))
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)


def test_student_equal_to_its_teacher_has_no_divergence():
    batch = random_batch(40, teacher_width=40).to(torch.float32)
    batch = replace(batch, teacher_image=batch.image, teacher_text=batch.text, teacher_scale=batch.scale)
    result = outcome(sweep, replace(batch, want_retention=False))
    assert result.consistency == 0
    assert max(gradient.abs().max() for gradient in (result.image, result.text, result.scale)) < 1e-7


def test_nan_and_infinity_come_out_as_nan_not_as_a_plausible_number():
    for bad in (torch.nan, torch.inf):
        for row in (0, 39):
            batch = random_batch(40).to(torch.float32)
            batch.image[row, 3] = bad
            result = outcome(sweep, batch)
            assert not result.retention.isfinite() and not result.consistency.isfinite()
            assert not result.image.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_uninitialised_memory_is_never_read(form):
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for groups in (None, some_groups(40)):
            check(formed(replace(random_batch(40), group_ids=groups), form), strip_rows=1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_mixed_dtypes_are_promoted_and_each_gradient_keeps_its_own():
    batch = random_batch(20, teacher_width=8)
    mixed = replace(
        batch.to(torch.float32),
        image=batch.image.to(torch.bfloat16),
        teacher_image=batch.teacher_image.to(torch.float16),
        teacher_text=batch.teacher_text.to(torch.float16),
        scale=batch.scale,
    )
    exact, result = outcome(reference.sweep, mixed.to(torch.float64)), outcome(sweep, mixed)
    assert (result.image.dtype, result.text.dtype, result.scale.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    torch.testing.assert_close(result.retention.double(), exact.retention, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.consistency.double(), exact.consistency, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.text.double(), exact.text, rtol=1e-5, atol=1e-6)


def test_one_tensor_as_image_and_text():
    batch = random_batch(17, teacher_width=40).to(torch.float32)
    gradients = []
    for run in (sweep, reference.sweep):
        both = batch.image.clone().requires_grad_()
        sum(run(both, both, batch.scale, batch.teacher_image, batch.teacher_image, *batch.arguments()[5:])).backward()
        gradients.append(both.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forget", ["cosine", "contrastive", "hinge"])
@pytest.mark.parametrize("consistency", ["logits", "intra", "features"])
def test_the_public_loss_in_all_its_options(forget, consistency):
    batch = random_batch(20, teacher_width=40).to(torch.float32)
    terms, gradients = [], []
    for backend in ("triton", "eager"):
        leaves = [t.clone().requires_grad_() for t in (batch.image[:7], batch.text[:7], batch.image, batch.text)]
        scale = batch.scale.clone().requires_grad_()
        result = functional.cliperase_loss(
            *leaves, batch.teacher_image, batch.teacher_text, scale, 9.0, forget=forget, consistency=consistency,
            group_ids=some_groups(20), backend=backend,
        )  # fmt: skip
        result.total.backward()
        terms.append(torch.stack(result).detach())
        gradients.append([tensor.grad for tensor in (*leaves, scale)])
    torch.testing.assert_close(*terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


# 1: one entry; 40: less than a block; 2048 fills a block of one row; 3000 is more than one row's share of the registers
@pytest.mark.parametrize(("n", "width"), [(1, 1), (33, 40), (5, 2048), (3, 3000)])
@pytest.mark.parametrize("size", ["normalised", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_divergence_of_features_is_exact_where_it_is_tiny_too(dtype, size, n, width):
    batch = random_batch(n, width=width, teacher_width=width)
    factor = 30.0 if size == "large" else 1.0
    student, teacher = ((tensor * factor).to(dtype) for tensor in (batch.image, batch.teacher_image))
    losses, gradients = [], []
    for function, tensor in ((features.features_kl, student), (reference.features_kl, student.double())):
        leaf = tensor.clone().requires_grad_()
        loss = function(leaf, teacher.to(leaf.dtype))
        (2.5 * loss).backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    assert losses[0].dtype == torch.float32 and gradients[0].dtype == dtype
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=3e-6, atol=1e-12)
    eps = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny * eps  # float16 has no smaller numbers
    largest = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=eps, atol=4e-6 * largest + smallest)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced"])
def test_the_divergence_of_features_takes_any_strides(kind):
    full = random_batch(24, width=24, teacher_width=24).to(torch.float32)
    student = {"transposed": full.image.T, "expanded": full.image[:1].expand(24, 24), "sliced": full.image[::2, 1::2]}
    teacher = full.teacher_image[: len(student[kind]), : student[kind].shape[1]]
    expected = reference.features_kl(student[kind].double(), teacher.double())
    torch.testing.assert_close(features.features_kl(student[kind], teacher).double(), expected, rtol=1e-5, atol=1e-12)


def test_the_divergence_of_equal_features_is_zero_and_of_wide_ones_is_left_to_torch():
    student = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = features.features_kl(student, student.detach())
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-8
    wide = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features.features_kl(wide, wide.flip(0)), reference.features_kl(wide, wide.flip(0)))


def test_the_divergence_of_features_keeps_the_rules_of_torch_library_and_compiles_into_one_graph():
    student, teacher = (t.to(torch.float32).detach() for t in (random_batch(5).image, random_batch(5, seed=1).image))
    ops = torch.ops.cliperase_fast
    torch.library.opcheck(ops.triton_features_kl.default, (student.clone().requires_grad_(), teacher))
    torch.library.opcheck(ops.triton_features_kl_backward.default, (torch.tensor(2.0), student, teacher))
    compiled = torch.compile(features.features_kl, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(student, teacher), features.features_kl(student, teacher))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_show_in_the_divergence_of_features(bad):
    student, teacher = (t.to(torch.float32) for t in (random_batch(5).image, random_batch(5, seed=1).image))
    student[3, 2] = bad
    assert not features.features_kl(student, teacher).isfinite()


def test_autocast_around_the_losses_changes_nothing():
    batch = random_batch(17, teacher_width=40).to(torch.float32)
    for consistency in ("logits", "intra", "features"):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                leaf = batch.image.clone().requires_grad_()
                terms = functional.cliperase_loss(
                    leaf[:3], batch.text[:3], leaf, batch.text, batch.teacher_image, batch.teacher_text,
                    batch.scale, 9.0, consistency=consistency, backend="triton",
                )  # fmt: skip
                terms.total.backward()
            results.append((*terms, leaf.grad))
        for plain, under_autocast in zip(*results, strict=True):
            assert torch.equal(plain, under_autocast)


def test_an_empty_batch_has_no_divergence_and_zero_gradients():
    empty = torch.zeros(0, 8, requires_grad=True)
    for consistency in ("logits", "intra", "features"):
        terms = functional.cliperase_loss(
            empty, empty, empty, empty, empty.detach(), empty.detach(), 1.0, 1.0, consistency=consistency,
            backend="triton",
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(terms.total, empty)
        assert terms.total == 0 and gradient.shape == (0, 8)


def test_float64_is_refused_in_words():
    assert backends()["triton"].available
    batch = random_batch(4)
    with pytest.raises(InputError, match=r"'triton' does not take torch\.float64"):
        functional.clip_loss(batch.image, batch.text, 1.0, backend="triton")
    halves = random_batch(4).to(torch.float32)
    with pytest.raises(InputError, match=r"'triton' does not take torch\.float64"):
        choose("triton", halves.image, halves.text, batch.teacher_image, batch.teacher_text)
    with pytest.raises(InputError, match=r"does not take torch\.float64; use backend='torch'"):
        sweep(*batch.arguments())


@pytest.mark.parametrize("variant", ["both", "groups", "retention", "consistency", "half"])
def test_the_operator_keeps_the_rules_of_torch_library(variant):
    batch = random_batch(5, width=4, teacher_width=3).to(torch.bfloat16 if variant == "half" else torch.float32)
    if variant == "groups":
        batch = replace(batch, group_ids=torch.tensor([0, 0, 1, 2, 2]))
    elif variant == "retention":
        batch = batch.without_teacher()
    elif variant == "consistency":
        batch = replace(batch, want_retention=False)
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
    problem = (*leaves, *batch.arguments()[3:])
    kept_bytes = 4 * 5 * 5 * (1 + batch.want_consistency)
    ops = torch.ops.cliperase_fast
    torch.library.opcheck(ops.triton_sweep.default, (*problem, 1, kept_bytes))
    _, _, state, kept = (output.detach() for output in ops.triton_sweep(*problem, 1, kept_bytes))
    ones = [torch.ones(())] * 2
    frozen = [leaf.detach() for leaf in leaves]
    for need in ((True, True, True), (False, True, False)):
        arguments = (*ones, state, kept, *frozen, *problem[3:], 1, *need)
        torch.library.opcheck(ops.triton_sweep_backward.default, arguments)


def test_it_compiles_into_one_graph():
    batch = random_batch(17).to(torch.float32)

    def step(image, text, scale):
        return sum(sweep(image, text, scale, *batch.arguments()[3:]))

    gradients = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
        run(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


# one process's rows against all columns, and blocks without own pairs; 65 pairs are three blocks of columns
@pytest.mark.parametrize("cuts", [([0, 20, 65], [0, 65]), ([0, 20, 65], [0, 20, 65]), ([0, 1, 65], [0, 1, 65])])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_rectangles_add_up_to_the_whole(keep, groups, cuts):
    batch = replace(random_batch(65), group_ids=some_groups(65) if groups else None)
    exact = outcome(reference.sweep, batch, (0.7, 1.3))
    found = in_pieces(triton_sweep.engine, batch.to(torch.float32), *cuts, strip_rows=1, keep=keep)
    for ours, theirs in zip(found, exact.tensors(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_rectangles_of_half_precision_give_summands_in_float32(form):
    batch = formed(random_batch(40), form).to(torch.bfloat16)
    exact = outcome(reference.sweep, batch.to(torch.float64), (0.7, 1.3))
    found = in_pieces(triton_sweep.engine, batch, [0, 7, 40], [0, 7, 40])
    for ours, theirs in zip(found[2:4], (exact.image, exact.text), strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() <= 4e-3 * theirs.norm()
