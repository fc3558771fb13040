"""Tests of the Triton sweep on a GPU, against float64 (`make gpu-check`). The interpreter tests the odd cases."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count

import pytest
import sigmoid_checks
import torch
from accuracy_cases import rounding_unit
from calibrated_cases import batch, exact, step
from sweep_cases import Batch, moved, outcome, random_batch

from cliperase_fast.ops import eager
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.triton.configs import SHARED
from cliperase_fast.ops.triton.sigmoid import sigmoid
from cliperase_fast.ops.triton.sweep import TritonKernels, sweep

pytestmark = pytest.mark.gpu
NAMES = count()
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


# 1: nothing off the diagonal; 17: part of a block; 1000: many blocks, the last not full
@pytest.mark.parametrize("n", [1, 17, 1000] if DEVICE == "cuda" else [1, 17])
@pytest.mark.parametrize("width", [40, 64, 512])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients(dtype, groups, width, n):
    given = replace(random_batch(n, width, 96, scale=50.0), group_ids=torch.arange(n) // 2 if groups else None)
    given = given.to(dtype).to(torch.float64)
    truth = outcome(eager.sweep, given)
    unit = rounding_unit(given, truth, torch.finfo(torch.float32).eps)
    mass = rounding_unit(given, truth, 1 / (1 + given.scale.item() + given.teacher_scale.item()))
    runs = [moved_outcome(given.to(dtype)) for _ in range(2)]
    for first, second in zip(*(run.tensors() for run in runs), strict=True):
        assert torch.equal(first, second)
    losses = runs[0].retention.double() + runs[0].consistency.double()
    assert (losses.cpu() - truth.retention - truth.consistency).abs() <= 2 * unit["loss"]
    half = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    for key in ("image", "text", "scale"):
        error = (getattr(runs[0], key).cpu().double() - getattr(truth, key)).abs().max().item()
        assert error <= 2 * unit[key] + half * mass[key] + 2**-24 * (half > 0), key


# equal widths are multiplied in one loop; at scale 1000 many tiles are out of reach of one exponential
@pytest.mark.parametrize(("width", "teacher_width", "scale"), [(96, 96, 50.0), (96, 40, 50.0), (512, 512, 1000.0)])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variants_with_one_exponential_agree_with_the_shipped_kernels(dtype, keep, width, teacher_width, scale):
    given = moved(random_batch(1000 if DEVICE == "cuda" else 40, width, teacher_width, scale=scale).to(dtype), DEVICE)
    shared = as_sweep(TritonKernels(SHARED[architecture()], f"shared_{next(NAMES)}"))
    pairs = zip(*(outcome(one, given, keep=keep).tensors() for one in (shared, sweep)), strict=True)
    for ours, theirs in pairs:
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", [False, True], ids=["shipped", "one exponential"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_for_each_similarity_change_little(dtype, variant):
    given = moved(random_batch(1000 if DEVICE == "cuda" else 40, 192, 96, scale=50.0).to(dtype), DEVICE)
    kernels = TritonKernels(SHARED[architecture()] if variant else None, f"compact_{next(NAMES)}")
    assert kernels.cache_size(given.inputs(keep="compact")) % 2 == 1
    one = as_sweep(kernels)
    for ours, theirs in zip(
        *(outcome(one, given, keep=keep).tensors() for keep in ("compact", "nothing")), strict=True
    ):
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() <= 4 * torch.finfo(dtype).eps


def architecture() -> int:
    major = torch.cuda.get_device_capability()[0] if DEVICE == "cuda" else 9
    return major if major in SHARED else 8


@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_calibrated_loss(dtype, keep, groups):
    b = batch(1000 if DEVICE == "cuda" else 40, 192, 96, dtype, groups=groups)
    given = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in b.items()}
    runs = [step(given, backend="triton", keep=keep) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    truth = step(exact(b), backend="eager")
    for name, value in truth.items():
        error = (runs[0][name].cpu().double() - value).norm() / value.norm()
        assert error <= 4 * torch.finfo(dtype).eps + 2e-5, name


@pytest.mark.parametrize(("n", "m", "pair_offset"), [(17, 17, 0), (1000, 1300, 300), (130, 1000, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sigmoid_loss(dtype, n, m, pair_offset):
    def on_the_gpu(inputs):
        return sigmoid.loss(moved(inputs, DEVICE)).cpu()

    sigmoid_checks.check(
        sigmoid_checks.Subject(on_the_gpu, "triton", rounds_ds=True),
        sigmoid_checks.random_case(n, m, pair_offset, 96),
        dtype,
    )


def moved_outcome(given: Batch):
    return outcome(sweep, moved(given, DEVICE), keep="nothing")
