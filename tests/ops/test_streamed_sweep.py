"""The streamed sweep gives what the eager one does, whatever the sizes, strips, strides and calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import assert_no_divergence
from sweep_cases import outcome, random_batch
from torch import Tensor

from cliperase_fast.functional import clip_loss
from cliperase_fast.ops import eager, streaming
from cliperase_fast.ops.autograd import flat_tensors, flatten


def assert_same(batch, strip_rows: int = 0, weights: tuple[float, float] = (0.7, 1.3)) -> None:
    streamed = outcome(streaming.sweep, batch, weights, strip_rows=strip_rows)
    exact = outcome(eager.sweep, batch, weights)
    for ours, theirs in zip(streamed.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# 1 and 2: nothing or one thing off the diagonal; 17: a short last strip of 7; 513: many strips, odd
@pytest.mark.parametrize("n", [1, 2, 17, 513])
@pytest.mark.parametrize("strip_rows", [0, 1, 7, 1000])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "rm", "kl"])
def test_streamed_equals_eager(n, strip_rows, wanted):
    batch = random_batch(n)
    if not wanted[1]:
        batch = batch.without_teacher()
    assert_same(replace(batch, want_retention=wanted[0]), strip_rows)


@pytest.mark.parametrize("wanted", [(True, True), (True, False)], ids=["both", "rm"])
@pytest.mark.parametrize("groups", ["some", "one", "all different"])
@pytest.mark.parametrize("n", [1, 17, 130])
def test_streamed_equals_eager_with_groups(n, groups, wanted):
    generator = torch.Generator().manual_seed(1)
    ids = {
        "some": torch.randint(-3, max(1, n // 3), (n,), generator=generator),
        "one": torch.full((n,), 7),
        "all different": torch.arange(n),
    }[groups]
    batch = random_batch(n) if wanted[1] else random_batch(n).without_teacher()
    assert_same(replace(batch, group_ids=ids), strip_rows=7)


def test_streamed_equals_eager_when_columns_grow_from_strip_to_strip():
    # the column maxima change in every strip: rows of growing length
    batch = random_batch(40, scale=60.0, teacher_scale=80.0)
    growing = torch.linspace(0.1, 1.0, 40, dtype=torch.float64)[:, None]
    batch = replace(batch, image=batch.image * growing, teacher_image=batch.teacher_image * growing)
    assert_same(batch, strip_rows=7)


def strided(tensor: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return tensor.T.contiguous().T
    if kind == "every other column":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 2).flatten(1)[:, ::2]
    return tensor.flip(0).contiguous()[:1].expand_as(tensor)  # "expanded": all rows are one


@pytest.mark.parametrize("kind", ["transposed", "every other column", "expanded"])
def test_strides_do_not_matter(kind):
    batch = random_batch(17)
    odd = {name: strided(getattr(batch, name), kind) for name in ("image", "text", "teacher_image", "teacher_text")}
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    plain = replace(batch, **{name: tensor.contiguous() for name, tensor in odd.items()})
    expected = outcome(eager.sweep, plain)
    leaves = [odd["image"].requires_grad_(), odd["text"].requires_grad_()]
    losses = streaming.sweep(replace(batch, **odd).inputs(*leaves, strip_rows=7))
    gradients = torch.autograd.grad(sum(losses), leaves)
    for ours, theirs in zip((*losses, *gradients), expected.tensors()[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needed", ["image", "text", "scale"])
def test_a_single_input_may_need_the_gradient(needed):
    batch = random_batch(17)
    expected = outcome(eager.sweep, batch)
    inputs = {name: getattr(batch, name).clone() for name in ("image", "text", "scale")}
    inputs[needed].requires_grad_()
    losses = streaming.sweep(batch.inputs(*inputs.values(), strip_rows=7))
    sum(losses).backward()
    torch.testing.assert_close(inputs[needed].grad, getattr(expected, needed), rtol=1e-10, atol=1e-10)
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (-2.5, 1e4)])
def test_incoming_gradients_other_than_one(weights):
    assert_same(random_batch(17), strip_rows=7, weights=weights)


def test_only_one_of_the_two_losses_is_used():
    batch = random_batch(17)
    for used in (0, 1):
        gradients = []
        for sweep in (streaming.sweep, eager.sweep):
            image = batch.image.clone().requires_grad_()
            sweep(batch.inputs(image))[used].backward()
            gradients.append(image.grad)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_backward_twice_over_a_retained_graph_doubles_the_gradient():
    batch = random_batch(17)
    image = batch.image.clone().requires_grad_()
    total = sum(streaming.sweep(batch.inputs(image)))
    total.backward(retain_graph=True)
    once = image.grad.clone()
    total.backward()
    torch.testing.assert_close(image.grad, 2 * once, rtol=0, atol=0)


def test_the_gradient_of_a_gradient_is_refused_not_wrong():
    batch = random_batch(5)
    image = batch.image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sum(streaming.sweep(batch.inputs(image))), image, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of this loss are not"):
        gradient.square().sum().backward()


def test_one_tensor_as_image_and_text_and_used_elsewhere_too():
    batch = random_batch(17, teacher_width=40)
    gradients = []
    for sweep in (streaming.sweep, eager.sweep):
        both = batch.image.clone().requires_grad_()
        first = sweep(batch.inputs(both, both, teacher_text=batch.teacher_image))
        second = sweep(batch.inputs(batch.text, both))
        (sum(first) + 2 * sum(second) + both.square().sum()).backward()
        gradients.append(both.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_scale_zero_has_the_gradient_of_the_scale():
    batch = replace(random_batch(17), scale=torch.zeros((), dtype=torch.float64))
    assert_same(batch)
    assert outcome(streaming.sweep, batch).scale.abs() > 1e-3


def test_inputs_are_left_as_they_were():
    batch = replace(random_batch(17), group_ids=torch.arange(17) // 2)
    before = [tensor.clone() for tensor in flat_tensors(batch)]
    outcome(streaming.sweep, batch, strip_rows=7)
    for tensor, copy in zip(flat_tensors(batch), before, strict=True):
        assert torch.equal(tensor, copy)


def test_two_runs_are_bitwise_equal():
    batch = replace(random_batch(300), group_ids=torch.arange(300) // 3).to(torch.float32)
    first, second = (outcome(streaming.sweep, batch, strip_rows=64) for _ in range(2))
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)


def test_student_equal_to_its_teacher_has_no_divergence():
    batch = random_batch(17, teacher_width=40).to(torch.float32)
    batch = replace(batch, teacher_image=batch.image, teacher_text=batch.text, teacher_scale=batch.scale)
    assert_no_divergence(streaming.sweep, batch, strip_rows=7)


def test_nan_and_infinity_come_out_as_nan_not_as_a_plausible_number():
    for bad in (torch.nan, torch.inf):
        for row in (0, 16):
            batch = random_batch(17).to(torch.float32)
            batch.image[row, 3] = bad
            result = outcome(streaming.sweep, batch, strip_rows=7)
            assert not result.retention.isfinite() and not result.consistency.isfinite()
            assert not result.image.isfinite().all()


def test_uninitialised_memory_is_never_read():
    batch = replace(random_batch(17), group_ids=torch.arange(17) // 2)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_same(batch, strip_rows=7)
        assert_same(replace(batch.without_teacher(), group_ids=None), strip_rows=7)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("active", ["forward", "backward"])
def test_autocast_around_either_direction_changes_nothing(active):
    batch = random_batch(33).to(torch.float32)
    expected = outcome(streaming.sweep, batch)
    image = batch.image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=active == "forward"):
        total = sum(streaming.sweep(batch.inputs(image)))
    with torch.autocast("cpu", torch.bfloat16, enabled=active == "backward"):
        total.backward()
    assert total.dtype == torch.float32
    torch.testing.assert_close(image.grad, expected.image)  # bfloat16 would be off by 1e-3


VARIANTS = {
    "both": {},
    "groups": {"group_ids": torch.tensor([0, 0, 1, 2, 2])},
    "consistency": {"want_retention": False},
}


@pytest.mark.parametrize("variant", [*VARIANTS, "retention", "half"])
def test_the_operator_keeps_the_rules_of_torch_library(variant):
    batch = random_batch(5, width=4, teacher_width=3)
    if variant == "retention":
        batch = batch.without_teacher()
    elif variant == "half":
        batch = batch.to(torch.bfloat16)
    else:
        batch = replace(batch, **VARIANTS[variant])
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
    inputs = batch.inputs(*leaves, strip_rows=2)
    ops = torch.ops.cliperase_fast
    torch.library.opcheck(ops.torch_sweep.default, (*flatten(inputs), 0))
    _, _, *saved = (output.detach() for output in ops.torch_sweep(*flatten(inputs), 0))
    ones = [torch.ones((), dtype=saved[0].dtype)] * 2
    frozen = inputs.inputs(*(leaf.detach() for leaf in leaves))
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(ops.torch_sweep_backward.default, (*ones, *saved, *flatten(frozen), *need))


def test_float16_gradients_are_rounded_after_the_scale():
    """Those of sure matches lie among float16's smallest numbers, where rounding them first loses a seventh."""
    scale = 14.0
    image, text = (torch.eye(4, 8, dtype=torch.float16).requires_grad_() for _ in range(2))
    exact = [leaf.detach().double().requires_grad_() for leaf in (image, text)]
    found = torch.autograd.grad(clip_loss(image, text, scale, backend="torch"), (image, text))
    expected = torch.autograd.grad(clip_loss(*exact, scale, backend="eager"), exact)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0.03, atol=0.0)
