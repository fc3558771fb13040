"""What every backend's sigmoid loss must keep, against float64: imported, whole, by the tests of each.

A test file brings the fixture `subject`, a `Subject`. The unit of the allowed errors is what one rounding of the logits
s <I_i, T_j> + b, eps (1 + s + |b|) each, does to sums over them, as in `accuracy_cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.errors import UnlearningError
from cliperase_fast.ops import eager
from cliperase_fast.ops.spec import SimilarityInputs

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """A loss under test, of CPU tensors."""

    loss: Callable[[SimilarityInputs], Tensor]
    name: str  # of its operator
    rounds_ds: bool = False  # to the features' dtype
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


class Case(SimilarityInputs):
    """Inputs of a sigmoid loss."""

    def to(self, dtype: torch.dtype) -> Case:
        wide = torch.promote_types(dtype, torch.float32)
        return self.inputs(self.image.to(dtype), self.text.to(dtype), self.scale.to(wide), self.bias.to(wide))

    def inputs(self, *tensors: Tensor, **changes: Any) -> Case:
        """The same with other image, text, scale and bias, as many as are given, and other options."""
        return replace(self, **dict(zip(("image", "text", "scale", "bias"), tensors, strict=False)), **changes)

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in (self.image, self.text, self.scale, self.bias)]


def random_case(
    n: int, m: int | None = None, pair_offset: int = 0, width: int = 24, scale: float = 10.0, bias: float = -4.0
):
    """m None: as many texts as images. All numbers are float32's, in float64."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)
        for rows in (n, n if m is None else m)
    )
    scalars = {"scale": torch.tensor(scale).double(), "bias": torch.tensor(bias).double()}
    found = Case(image, text, **scalars, pair_offset=pair_offset)
    return found.to(torch.float32).to(torch.float64)


def outcome(
    loss: Callable[[SimilarityInputs], Tensor], case: Case, weight: float = 1.7, **options: int
) -> list[Tensor]:
    """The loss and the gradients of `weight` times it."""
    leaves = case.leaves()
    value = loss(case.inputs(*leaves, **options))
    return [value.detach(), *torch.autograd.grad(weight * value, leaves)]


def check(
    subject: Subject, case: Case, dtype: torch.dtype = torch.float32, weight: float = 1.7, **options: int
) -> None:
    case = case.to(dtype).to(torch.float64)
    found, truth = outcome(subject.loss, case.to(dtype), weight, **options), outcome(eager.sigmoid, case, weight)
    assert [tensor.dtype for tensor in found] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
    logits = (case.scale * case.image @ case.text.T + case.bias).clone()
    logits.diagonal(case.pair_offset).neg_()
    mass = weight * logits.sigmoid() / len(case.image)  # |dS|
    size, s = 1 + case.scale.abs() + case.bias.abs(), case.scale.abs()
    of_rows = s * mass.sum(1).max() * case.image.abs().max().clamp(min=1)
    of_columns = s * mass.sum(0).max() * case.text.abs().max().clamp(min=1)
    masses = [mass.sum() / weight, of_rows, of_columns, mass.sum(), mass.sum()]
    for what, ours, exact, unit in zip(("loss", "image", "text", "scale", "bias"), found, truth, masses, strict=True):
        allowed = 3 * torch.finfo(torch.float32).eps * (size * unit + exact.abs().max()) + 1e-36
        if dtype in HALF and what in ("image", "text"):
            allowed += torch.finfo(dtype).eps * exact.abs().max() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        if dtype in HALF and subject.rounds_ds and what in ("image", "text", "scale"):
            allowed += torch.finfo(dtype).eps / 2 * unit
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, (what, error.item(), allowed.item())


# 1: a pair alone; 33: a block of one row; 65 columns from 32 on are the rows' own; 64: none is
@pytest.mark.parametrize(
    ("n", "m", "pair_offset"), [(1, 1, 0), (7, 7, 0), (33, 33, 0), (33, 97, 32), (5, 64, 64), (40, 3, 3)]
)
@pytest.mark.parametrize("strip_rows", [0, 1])
def test_sizes_and_rectangles(subject, n, m, pair_offset, strip_rows):
    check(subject, random_case(n, m, pair_offset), strip_rows=strip_rows)


@pytest.mark.parametrize("width", [1, 3, 17, 40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_widths_and_dtypes(subject, dtype, width):
    check(subject, random_case(37, width=width), dtype)


# SigLIP starts at scale 10, bias -10; 1000 and -500 saturate both ways; at scale 0 its own gradient is not 0
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (200.0, 3.0), (1000.0, -500.0), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scales_and_biases(subject, dtype, scale, bias):
    check(subject, random_case(40, scale=scale, bias=bias), dtype)


def test_nearly_perfect_pairs_keep_their_digits(subject):
    """The losses of all entries are near exp(-40) then, far below the rounding of 1."""
    image = torch.eye(20, 24, dtype=torch.float64)
    case = Case(image, image.clone(), torch.tensor(80.0).double(), bias=torch.tensor(-40.0).double())
    (loss, *_), (exact, *_) = outcome(subject.loss, case.to(torch.float32)), outcome(eager.sigmoid, case)
    assert 0 < exact < 1e-15
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    check(subject, case)


@pytest.mark.parametrize("kind", ["transposed", "every other column", "expanded"])
def test_strides_do_not_matter(subject, kind):
    case = random_case(37).to(torch.float32)

    def strided(tensor):
        if kind == "transposed":
            return tensor.T.contiguous().T
        if kind == "every other column":
            return torch.stack((tensor, torch.full_like(tensor, torch.nan)), 2).flatten(1)[:, ::2]
        return tensor[:1].expand_as(tensor)

    odd = replace(case, image=strided(case.image), text=strided(case.text))
    plain = replace(odd, image=odd.image.contiguous(), text=odd.text.contiguous())
    leaves = [odd.image.requires_grad_(), odd.text.requires_grad_()]
    loss = subject.loss(odd.inputs(*leaves))
    torch.testing.assert_close([loss, *torch.autograd.grad(1.7 * loss, leaves)], outcome(subject.loss, plain)[:3])


@pytest.mark.parametrize("needed", range(4), ids=["image", "text", "scale", "bias"])
def test_a_single_input_may_need_the_gradient(subject, needed):
    case = random_case(37).to(torch.float32)
    inputs = [leaf.requires_grad_(place == needed) for place, leaf in enumerate(case.leaves())]
    (gradient,) = torch.autograd.grad(1.7 * subject.loss(case.inputs(*inputs)), inputs[needed])
    torch.testing.assert_close(gradient, outcome(subject.loss, case)[1 + needed])


def test_without_gradients_the_loss_is_the_same(subject):
    case = random_case(37).to(torch.float32)
    value = outcome(subject.loss, case)[0]
    torch.testing.assert_close(subject.loss(case.inputs(*(leaf.detach() for leaf in case.leaves()))), value)
    with torch.no_grad():
        torch.testing.assert_close(subject.loss(case.inputs(*case.leaves())), value)


def test_two_runs_give_the_same_bits_and_backward_twice_adds(subject):
    case = random_case(70).to(torch.float32)
    first, second = outcome(subject.loss, case), outcome(subject.loss, case)
    assert all(map(torch.equal, first, second))
    leaves = case.leaves()
    loss = 1.7 * subject.loss(case.inputs(*leaves))
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, once in zip(leaves, first[1:], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once, rtol=1e-6, atol=0)


def test_one_tensor_as_image_and_text(subject):
    case = random_case(37).to(torch.float32)
    gradients = []
    for loss in (subject.loss, eager.sigmoid):
        both = case.image.clone().requires_grad_()
        loss(case.inputs(both, both)).backward()
        gradients.append(both.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_mixed_dtypes_are_promoted_and_each_gradient_keeps_its_own(subject):
    case = random_case(37)
    mixed = replace(case.to(torch.float32), image=case.image.to(torch.bfloat16), scale=case.scale)
    found, truth = outcome(subject.loss, mixed), outcome(eager.sigmoid, mixed.to(torch.float64))
    assert [tensor.dtype for tensor in found[1:4]] == [torch.bfloat16, torch.float32, torch.float64]
    for place in (0, 2, 3, 4):
        torch.testing.assert_close(found[place].double(), truth[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_features_yield_nonfinite_losses(subject, bad):
    case = random_case(40).to(torch.float32)
    case.image[33, 3] = bad
    loss, _, text, *_ = outcome(subject.loss, case)  # dS of an infinite logit is finite, 0 or 1
    assert not loss.isfinite() and not text.isfinite().all()


def test_uninitialised_memory_is_never_read(subject):
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for (n, m, pair_offset), strip_rows in product(((40, 40, 0), (33, 70, 70)), (0, 1)):
            check(subject, random_case(n, m, pair_offset), strip_rows=strip_rows)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_second_derivative_is_refused_not_taken_for_zero(subject):
    case = random_case(7).to(torch.float32)
    image, *others = case.leaves()
    (gradient,) = torch.autograd.grad(subject.loss(case.inputs(image, *others)), image, create_graph=True)
    with pytest.raises(UnlearningError, match="second derivatives of this loss are not"):
        gradient.sum().backward()
    # as a penalty beside the loss, where what cannot be reached would be left out without a word
    image, *others = case.leaves()
    loss = subject.loss(case.inputs(image, *others))
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(UnlearningError, match="second derivatives of this loss are not"):
        torch.autograd.grad(loss + gradient.square().sum(), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_torch_library(subject, dtype):
    case = random_case(5, 9, 3, width=4).to(dtype)
    operator = getattr(torch.ops.cliperase_fast, f"{subject.name}_sigmoid").default
    for need in ((True, True, True), (False, True, False), (False, False, False)):
        leaves = case.leaves() if all(need) else [leaf.detach() for leaf in case.leaves()]
        torch.library.opcheck(operator, (*leaves, case.pair_offset, *need, 1))


def test_it_compiles_into_one_graph_and_autocast_does_not_reach_inside(subject):
    case = random_case(37).to(torch.float32)

    def loss(*leaves):
        return subject.loss(case.inputs(*leaves))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(run(*leaves), leaves) for run in (loss, compiled) if (leaves := case.leaves())]
    torch.testing.assert_close(*gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*case.leaves())
    torch.testing.assert_close(inside, loss(*case.leaves()))  # bfloat16 would be off by 1e-3
