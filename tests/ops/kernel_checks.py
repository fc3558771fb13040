"""What every sweep of GPU kernels must keep, against float64: imported, whole, by the tests of each.

A test file brings the fixture `subject`. Its strips of strip_rows=1 are as low as its kernels allow: 32 or 64 rows.

Half precision: dS is rounded to the features' dtype, so a gradient may be off by half an eps of its mass on top of what
`accuracy_cases.py` allows float32; in float16, entries of dS under 2^-37 of the largest vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accuracy_cases import (
    REGIMES,
    UNDERFLOW,
    assert_no_divergence,
    errors,
    regime,
    rounding_of_ds,
    rounding_unit,
)
from sweep_cases import Batch, Outcome, moved, naive_sweep, outcome, random_batch
from torch import Tensor

from cliperase_fast.ops import blocks, eager
from cliperase_fast.ops.autograd import flatten
from cliperase_fast.ops.spec import Sweep


@dataclass(frozen=True)
class Subject:
    """A sweep under test."""

    sweep: Sweep  # takes CPU tensors
    name: str  # of its operators
    kernels: type
    row_unit: int = 1  # entries that a kept row is a multiple of
    few_programs: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None  # several tiles for each of them
    device: str = "cpu"  # its operators' tensors are there

    def kept_row_bytes(self, batch: Batch) -> int:
        return 4 * -(-len(batch.image) // self.row_unit) * self.row_unit * (1 + batch.want_consistency)

    def operators(self) -> tuple[Any, Any]:
        ops = torch.ops.cliperase_fast
        return getattr(ops, f"{self.name}_sweep").default, getattr(ops, f"{self.name}_sweep_backward").default


FORMS = {"both": (True, True), "rm": (True, False), "kl": (False, True)}
HALF = (torch.bfloat16, torch.float16)


def margins(batch: Batch, truth: Outcome, dtype: torch.dtype) -> dict[str, float]:
    """Allowed errors of losses and gradients for features of `dtype`."""
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    allowed = {key: 2 * value + UNDERFLOW for key, value in unit.items()}
    if dtype in HALF:
        half_eps = torch.finfo(dtype).eps / 2
        vanished = 2.0**-38 * rounding_unit(batch, truth, 1.0)["loss"] if dtype == torch.float16 else 0.0
        for key, rounding in rounding_of_ds(batch, truth, dtype).items():
            allowed[key] += rounding + vanished * (1.0 if key == "scale" else batch.scale.item())
            if key != "scale":  # is float32
                allowed[key] += half_eps * getattr(truth, key).abs().max().item() + torch.finfo(dtype).tiny
    return allowed


def check(subject: Subject, batch: Batch, dtype: torch.dtype = torch.float32, **options: int | str) -> Outcome:
    """`batch` in `dtype` against float64; what was found."""
    batch = batch.to(dtype).to(torch.float64)
    truth = outcome(eager.sweep, batch)
    result = outcome(subject.sweep, batch.to(dtype), **{"keep": "nothing", **options})
    assert result.image.dtype == result.text.dtype == dtype
    assert result.retention.dtype == result.consistency.dtype == result.scale.dtype == torch.float32
    naive = errors(outcome(naive_sweep, batch.to(dtype)), truth)
    for key, allowed in margins(batch, truth, dtype).items():
        error = errors(result, truth)[key]
        assert error <= allowed, (key, error, allowed)
        assert not error > naive[key] + allowed  # naive may be NaN: it overflows in float16
    return result


def formed(batch: Batch, form: str) -> Batch:
    batch = replace(batch, want_retention=FORMS[form][0])
    return batch if FORMS[form][1] else batch.without_teacher()


def some_groups(n: int) -> Tensor:
    return torch.randint(-3, max(1, n // 3), (n,), generator=torch.Generator().manual_seed(1))


# 1 and 2: nothing or one thing off the diagonal; 17: part of a block; 65: three blocks, the last of one row
@pytest.mark.parametrize("n", [1, 2, 17, 65])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_size(subject, form, groups, n):
    # widths: 40 and 24 are not multiples of a block's depth
    batch = random_batch(n, width=40, teacher_width=24)
    check(subject, formed(replace(batch, group_ids=some_groups(n) if groups else None), form), strip_rows=1)


@pytest.mark.parametrize(("width", "teacher_width"), [(16, 64), (64, 40), (1, 3), (96, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width(subject, width, teacher_width, dtype):
    check(subject, random_batch(40, width=width, teacher_width=teacher_width), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_strips_of_several_blocks_and_chunks_of_several_tiles(subject, monkeypatch, dtype):
    # 130 pairs are five blocks: strips of two blocks forward and backward, chunks of two tiles
    subject.few_programs(monkeypatch)
    batch = replace(random_batch(130), group_ids=some_groups(130))
    check(subject, batch, dtype, strip_rows=64)


# 96 kept rows are three blocks of 130 pairs' five; a kept strip of two blocks is followed by one of one. Each form is a
# kernel of its own, and so is half precision; how many rows are kept is none of theirs.
@pytest.mark.parametrize(
    ("dtype", "form", "kept_rows"),
    [*((torch.float32, form, 96) for form in FORMS), (torch.float32, "both", 130), (torch.bfloat16, "both", 96)],
)
def test_kept_similarities_give_what_forming_them_again_gives(subject, monkeypatch, dtype, form, kept_rows):
    batch = formed(replace(random_batch(130), group_ids=some_groups(130)), form)
    row_bytes = subject.kept_row_bytes(batch)
    monkeypatch.setattr(blocks, "cache_budget", lambda device: row_bytes * (kept_rows + 31))
    monkeypatch.setattr(blocks, "_CACHED_ROWS", 32)
    kept = watch_kept(subject, monkeypatch)
    stored = check(subject, batch, dtype, strip_rows=64, keep="similarities")
    again = outcome(subject.sweep, batch.to(dtype), strip_rows=64, keep="nothing")
    assert kept == [row_bytes * kept_rows, 0]
    for ours, theirs in zip(again.tensors(), stored.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-6)


def watch_kept(subject: Subject, monkeypatch) -> list[int]:
    """The sizes of what the sweeps from here on keep."""
    sizes = []
    losses = subject.kernels.losses

    def watched(self, *arguments):
        *found, kept = losses(self, *arguments)
        sizes.append(kept.numel())
        return *found, kept

    monkeypatch.setattr(subject.kernels, "losses", watched)
    return sizes


def test_nothing_is_kept_without_a_backward_pass(subject, monkeypatch):
    kept = watch_kept(subject, monkeypatch)
    batch = random_batch(17).to(torch.float32)
    with torch.no_grad():
        subject.sweep(batch.inputs(keep="similarities"))
    subject.sweep(batch.inputs(keep="similarities"))
    assert kept == [0, 0]


@pytest.mark.parametrize("groups", ["one", "all different"])
def test_extreme_groups(subject, groups):
    batch = random_batch(40)
    check(subject, replace(batch, group_ids=torch.full((40,), 7) if groups == "one" else torch.arange(40)))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
def test_float32_is_as_good_as_the_rounding_of_the_similarities_allows(subject, name, scale):
    check(subject, regime(name, scale, 65))


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", REGIMES)
def test_half_precision_costs_one_rounding_of_ds(subject, name, dtype, scale):
    check(subject, regime(name, scale, 40), dtype)


def test_columns_that_grow_from_strip_to_strip(subject):
    batch = random_batch(65, scale=60.0, teacher_scale=80.0)
    growing = torch.linspace(0.1, 1.0, 65, dtype=torch.float64)[:, None]
    check(
        subject, replace(batch, image=batch.image * growing, teacher_image=batch.teacher_image * growing), strip_rows=1
    )


@pytest.mark.parametrize("kind", ["transposed", "every other column", "rows of a wider tensor", "expanded"])
def test_strides_do_not_matter(subject, kind):
    def strided(tensor):
        if kind == "transposed":
            return tensor.T.contiguous().T
        if kind == "every other column":
            return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 2).flatten(1)[:, ::2]
        if kind == "rows of a wider tensor":  # by one number: steps of an odd length
            return torch.cat((tensor, torch.full_like(tensor[:, :1], torch.nan)), 1)[:, : tensor.shape[1]]
        return tensor[:1].expand_as(tensor)

    batch = random_batch(17).to(torch.float32)
    odd = {name: strided(getattr(batch, name)) for name in ("image", "text", "teacher_image", "teacher_text")}
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    expected = outcome(subject.sweep, replace(batch, **{name: tensor.contiguous() for name, tensor in odd.items()}))
    leaves = [odd["image"].requires_grad_(), odd["text"].requires_grad_()]
    losses = subject.sweep(replace(batch, **odd).inputs(*leaves))
    gradients = torch.autograd.grad(sum(losses), leaves)
    for ours, theirs in zip((*losses, *gradients), expected.tensors()[:4], strict=True):
        torch.testing.assert_close(ours, theirs)


# half precision keeps its digits whatever the incoming gradients: loss scaling, tiny weights, one of them 0
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (-2.5, 1e4), (65536.0, 3 * 65536.0), (1e-9, 3e-9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_incoming_gradients_other_than_one(subject, weights, dtype):
    batch = random_batch(33).to(dtype)
    exact = outcome(eager.sweep, batch.to(torch.float64), weights)
    leaves = [tensor.float().to(dtype).requires_grad_() for tensor in (batch.image, batch.text)]
    scale = batch.scale.clone().requires_grad_()
    losses = subject.sweep(batch.inputs(*leaves, scale))
    if dtype == torch.float16 and max(map(abs, weights)) > 1e4:  # their gradients do not fit float16 themselves
        weights, exact = (1.0, 3.0), outcome(eager.sweep, batch.to(torch.float64), (1.0, 3.0))
    (weights[0] * losses[0] + weights[1] * losses[1]).backward()
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    for ours, theirs in ((leaves[0].grad, exact.image), (leaves[1].grad, exact.text), (scale.grad, exact.scale)):
        limit = tolerance * theirs.abs().max().item()
        if ours.dtype == torch.float16:
            limit += 2**-24  # the least number of float16
        assert (ours.double() - theirs).abs().max().item() <= limit


def test_zero_incoming_gradients_yield_zero_gradients(subject):
    result = outcome(subject.sweep, random_batch(17).to(torch.float16), (0.0, 0.0))
    assert not any(gradient.any() for gradient in (result.image, result.text, result.scale))


@pytest.mark.parametrize("needed", ["image", "text", "scale"])
def test_a_single_input_may_need_the_gradient(subject, needed):
    batch = random_batch(17).to(torch.float32)
    expected = outcome(subject.sweep, batch)
    inputs = {name: getattr(batch, name).clone() for name in ("image", "text", "scale")}
    inputs[needed].requires_grad_()
    sum(subject.sweep(batch.inputs(*inputs.values()))).backward()
    torch.testing.assert_close(inputs[needed].grad, getattr(expected, needed))
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


def test_scale_zero_has_the_gradient_of_the_scale(subject):
    batch = replace(random_batch(17), scale=torch.zeros((), dtype=torch.float64))
    check(subject, batch)
    assert outcome(subject.sweep, batch.to(torch.float32)).scale.abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(subject, dtype):
    batch = replace(random_batch(65), group_ids=some_groups(65)).to(dtype)
    first, second = (outcome(subject.sweep, batch, strip_rows=1) for _ in range(2))
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)


def test_student_equal_to_its_teacher_has_no_divergence(subject):
    batch = random_batch(40, teacher_width=40).to(torch.float32)
    batch = replace(batch, teacher_image=batch.image, teacher_text=batch.text, teacher_scale=batch.scale)
    assert_no_divergence(subject.sweep, batch)


def test_nonfinite_features_yield_nonfinite_results(subject):
    for bad in (torch.nan, torch.inf):
        for row in (0, 39):
            batch = random_batch(40).to(torch.float32)
            batch.image[row, 3] = bad
            result = outcome(subject.sweep, batch)
            assert not result.retention.isfinite() and not result.consistency.isfinite()
            assert not result.image.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_uninitialised_memory_is_never_read(subject, form):
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for groups in (None, some_groups(40)):
            check(subject, formed(replace(random_batch(40), group_ids=groups), form), strip_rows=1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_mixed_dtypes_are_promoted_and_each_gradient_keeps_its_own(subject):
    batch = random_batch(20, teacher_width=8)
    mixed = replace(
        batch.to(torch.float32),
        image=batch.image.to(torch.bfloat16),
        teacher_image=batch.teacher_image.to(torch.float16),
        teacher_text=batch.teacher_text.to(torch.float16),
        scale=batch.scale,
    )
    exact, result = outcome(eager.sweep, mixed.to(torch.float64)), outcome(subject.sweep, mixed)
    assert (result.image.dtype, result.text.dtype, result.scale.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    torch.testing.assert_close(result.retention.double(), exact.retention, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.consistency.double(), exact.consistency, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.text.double(), exact.text, rtol=1e-5, atol=1e-6)


def test_one_tensor_as_image_and_text(subject):
    batch = random_batch(17, teacher_width=40).to(torch.float32)
    gradients = []
    for run in (subject.sweep, eager.sweep):
        both = batch.image.clone().requires_grad_()
        sum(run(batch.inputs(both, both, teacher_text=batch.teacher_image))).backward()
        gradients.append(both.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["both", "groups", "retention", "consistency", "half"])
def test_the_operator_keeps_the_rules_of_torch_library(subject, variant):
    batch = random_batch(5, width=4, teacher_width=3).to(torch.bfloat16 if variant == "half" else torch.float32)
    if variant == "groups":
        batch = replace(batch, group_ids=torch.tensor([0, 0, 1, 2, 2]))
    elif variant == "retention":
        batch = batch.without_teacher()
    elif variant == "consistency":
        batch = replace(batch, want_retention=False)
    batch = moved(batch, subject.device)
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
    inputs = batch.inputs(*leaves, strip_rows=1)
    cache_size = 5 * subject.kept_row_bytes(batch)
    forward, backward = subject.operators()
    torch.library.opcheck(forward, (*flatten(inputs), cache_size))
    _, _, *saved = (output.detach() for output in forward(*flatten(inputs), cache_size))
    ones = [torch.ones((), device=subject.device)] * 2
    frozen = inputs.inputs(*(leaf.detach() for leaf in leaves))
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (*ones, *saved, *flatten(frozen), *need))


def test_it_compiles_into_one_graph(subject):
    batch = random_batch(17).to(torch.float32)

    def step(image, text, scale):
        return sum(subject.sweep(batch.inputs(image, text, scale)))

    gradients = []
    for run in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
        run(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
