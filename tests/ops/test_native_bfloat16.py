"""Products of bfloat16 features, by each instruction set that has them and runs here, against float64.

`amx_emulated` runs everywhere: the code for AMX with its instructions in portable C++.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import MULTIPLY_BFLOAT16, REGIMES, errors, native_errors, regime, runs_here
from calibrated_cases import batch as joint_batch
from calibrated_cases import step
from rectangles import in_pieces
from sweep_cases import Batch, Outcome, outcome, random_batch
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.native import cpu, extension
from cliperase_fast.ops.native.cpu import kernels, sweep
from cliperase_fast.ops.spec import Need, SavedStats, Weights

HERE = [name for name in MULTIPLY_BFLOAT16 if runs_here(name)]
KEEP = ("nothing", "similarities")


@pytest.fixture(autouse=True, params=HERE)
def instructions(request, monkeypatch) -> str:
    monkeypatch.setenv("CLIPERASE_CPU", request.param)
    return request.param


def check(batch: Batch, **options: int | str) -> Outcome:
    """`batch` in bfloat16 against float64; returns what the sweep gave."""
    batch = batch.to(torch.bfloat16)
    exact = batch.to(torch.float64)
    truth, result = outcome(eager.sweep, exact), outcome(sweep, batch, **options)
    allowed = native_errors(exact, truth, torch.bfloat16)
    for key, error in errors(result, truth).items():
        assert error <= allowed[key], (key, error, allowed[key])
    return result


def same_bits(one: Outcome, other: Outcome) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def with_threads(run) -> list:
    """What run() gives with 1, 2 and 7 threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


# Tiles of registers have 16 and 32 rows and columns and 32 numbers of depth: sizes around those of one and of several
@pytest.mark.parametrize("n", [1, 17, 32, 129, 257])
@pytest.mark.parametrize("keep", KEEP)
def test_every_size_and_form(n, keep):
    batch = random_batch(n, width=40, teacher_width=24)
    groups = torch.arange(n) * 7 % max(1, n // 3) - 5
    check(batch, keep=keep)
    check(replace(batch, group_ids=groups), keep=keep)
    check(replace(batch, want_retention=False), keep=keep)
    check(replace(batch.without_teacher(), group_ids=groups), keep=keep)


# 1030 is more than one panel of depth (512); 16, 32 and 48 fill registers
@pytest.mark.parametrize(
    ("width", "teacher_width"), [(1, 3), (16, 32), (31, 33), (47, 49), (96, 48), (150, 17), (1030, 5)]
)
def test_any_width(width, teacher_width):
    check(random_batch(70, width=width, teacher_width=teacher_width))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime(name, scale):
    for keep in KEEP:
        check(regime(name, scale, 130), keep=keep)


@pytest.mark.parametrize("width", [13, 70])
@pytest.mark.parametrize("kind", ["transposed", "every other column", "between other rows"])
def test_strides_change_no_bit(kind, width):
    def laid_out(tensor: Tensor) -> Tensor:
        if kind == "transposed":
            return tensor.T.contiguous().T
        nan = torch.full_like(tensor, torch.nan)
        if kind == "every other column":
            return torch.stack((tensor, nan), 2).flatten(1)[:, ::2]
        return torch.stack((nan, tensor, nan), 1)[:, 1]

    plain = random_batch(77, width=width).to(torch.bfloat16)
    names = ("image", "text", "teacher_image", "teacher_text")
    odd = replace(plain, **{name: laid_out(getattr(plain, name)) for name in names})
    leaves = [odd.image.requires_grad_(), odd.text.requires_grad_()]
    losses = sweep(odd.inputs(*leaves))
    found = (*losses, *torch.autograd.grad(sum(losses), leaves))
    assert all(map(torch.equal, found, outcome(sweep, plain).tensors()[:4]))


@pytest.mark.parametrize("keep", KEEP)
def test_the_same_bits_for_any_number_of_threads(keep):
    batch = replace(random_batch(300, width=150), group_ids=torch.arange(300) % 90).to(torch.bfloat16)
    first, *others = with_threads(lambda: outcome(sweep, batch, keep=keep))
    assert all(same_bits(first, other) for other in others)
    first, *others = with_threads(lambda: step(joint_batch(140, 40, 24, torch.bfloat16), backend="native", keep=keep))
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


# rows of 32 and 160 floats fill vectors; 160 is more than one group of panels
@pytest.mark.parametrize("width", [32, 37, 160])
@pytest.mark.parametrize("keep", KEEP)
def test_gradients_are_those_of_float32_rounded_once(keep, width, monkeypatch):
    batch = replace(random_batch(300, width=width), group_ids=torch.arange(300) % 90).to(torch.bfloat16)
    weights = Weights(torch.tensor(0.7 / 300), torch.tensor(1e-4))

    def gradients(partial: bool) -> list[Tensor]:
        _, _, saved, cache = kernels.losses(batch, kernels.cache_size(replace(batch, keep=keep)))
        image, text, _ = kernels.backward(batch, SavedStats(saved, 300, cache), weights, Need(), partial)
        assert image.dtype == text.dtype == (torch.float32 if partial else torch.bfloat16)
        return [image.to(torch.bfloat16), text.to(torch.bfloat16)]

    exact = gradients(partial=True)
    for found in with_threads(lambda: gradients(partial=False)):
        assert all(map(torch.equal, found, exact))

    def calibrated() -> dict[str, Tensor]:
        return step(joint_batch(140, width, 24, torch.bfloat16), backend="native", keep=keep)

    rounded = with_threads(calibrated)
    monkeypatch.setattr(cpu, "gradient_buffer", lambda features: cpu.floats(*features.shape))
    exact = calibrated()  # gradients of sorted pairs become bfloat16 when the order is restored
    assert all(torch.equal(value, found[name]) for found in rounded for name, value in exact.items())


def test_incoming_gradients_other_than_one():
    batch = random_batch(140).to(torch.bfloat16)
    truth = outcome(eager.sweep, batch.to(torch.float64), (-2.5, 1e4))
    result = outcome(sweep, batch, (-2.5, 1e4))
    for ours, theirs in zip(result.tensors()[2:], truth.tensors()[2:], strict=True):
        assert (ours.double() - theirs).norm() <= 2**-7 * theirs.norm()


@pytest.mark.parametrize("cuts", [([0, 20, 300], [0, 300]), ([0, 131, 300], [0, 131, 300])])
def test_rectangles_add_up_to_the_whole(cuts):
    batch = random_batch(300).to(torch.bfloat16)
    exact = outcome(eager.sweep, batch.to(torch.float64), (0.7, 1.3))
    found = in_pieces(kernels, batch, *cuts)
    for ours, theirs in zip(found, exact.tensors(), strict=True):
        assert (ours.double() - theirs).norm() <= 2**-6 * theirs.norm()


@pytest.mark.parametrize("keep", KEEP)
def test_memory_that_nothing_was_written_to_changes_no_bit(keep):
    batch = random_batch(150, width=70).to(torch.bfloat16)
    first, cpu = outcome(sweep, batch, keep=keep), extension.load().cpu
    for size in (1 << 20, 1 << 22, 1 << 23, 1 << 24):  # whatever the pool hands out next is full of NaN
        torch.frombuffer(cpu.Workspace(size), dtype=torch.float32).fill_(torch.nan)
    assert same_bits(first, outcome(sweep, batch, keep=keep))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_features_yield_nan(value):
    batch = random_batch(150).to(torch.bfloat16)
    batch.image[70, 3] = value
    result = outcome(sweep, batch)
    assert result.retention.isnan() and result.image.isnan().any()


def test_numbers_below_the_smallest_normal_one_count_as_0():
    results = []
    for value in (1e-39, 0.0):
        batch = random_batch(150).to(torch.bfloat16)
        batch.image[70, 3] = value
        results.append(outcome(sweep, batch))
    assert same_bits(*results)
