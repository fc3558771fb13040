"""Tests of the CUDA half of the backend "native" on a GPU, against float64 (`make gpu-check`).

Needs the extension, built with nvcc. `test_runtime_on_gpu.py` tests streams, graphs and devices for all backends.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from calibrated_cases import batch as joint_batch
from calibrated_cases import exact, step
from calibrated_checks import *  # noqa: F403
from calibrated_checks import CalibratedSubject, assert_same
from kernel_checks import *  # noqa: F403
from kernel_checks import Subject
from sweep_cases import Batch, moved, outcome, random_batch

from cliperase_fast import functional
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.streaming import sweep as streamed

pytestmark = pytest.mark.gpu
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch's deterministic mode
NAME = "native_cuda_checked"
on_gpu = as_sweep(CudaKernels(name=NAME, block_columns=128))
whole = as_sweep(CudaKernels(name=f"{NAME}_whole"))


def sweep(inputs):
    """`on_gpu` for CPU tensors; gradients flow back to them."""
    return tuple(loss.cpu() for loss in on_gpu(moved(inputs, "cuda")))


@pytest.fixture
def subject():
    return Subject(
        sweep,
        NAME,
        CudaKernels,
        kept_row_bytes=lambda batch: 4 * -(-len(batch.image) // 8) * 8 * (1 + batch.want_consistency),
        device="cuda",
    )


@pytest.fixture
def calibrated():
    """All retain similarities are kept, and few or none of the others."""
    return CalibratedSubject("native", CudaKernels, 1000, cached_rows=256, budget=8 * 1008 * 512, device="cuda")


def large_batch(n: int, width: int):
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (
        [F.normalize(torch.randn(n, width, generator=generator, device="cuda"), dim=1).bfloat16() for _ in range(2)]
        for _ in range(2)
    )
    scale = torch.tensor(30.0, device="cuda")
    return Batch(*student, scale, *teacher, scale)


def run(sweep_of, batch, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in (batch.image, batch.text, batch.scale)]
    losses = sweep_of(batch.inputs(*leaves, **options))
    return [*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses), leaves)]


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_blocks_and_kept_rows_of_more_entries_than_32_bits_count(monkeypatch, keep):
    # 50,048² are more than 2^31 entries; one block holds them all
    monkeypatch.setenv("CLIPERASE_STRIP_MIB", "40000")
    monkeypatch.setenv("CLIPERASE_KEEP_MIB", "40000")
    batch = large_batch(50_048, 32)
    one_block = as_sweep(CudaKernels(name=f"{NAME}_one_block_{keep}", block_columns=50_048))
    for ours, theirs in zip(run(one_block, batch, keep=keep), run(streamed, batch), strict=True):
        assert ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item() < 2e-2


def test_memory_beyond_inputs_and_gradients_is_bounded():
    n, width = 65_536, 64
    batch = large_batch(n, width)
    run(whole, batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(whole, batch)
    beyond = torch.cuda.max_memory_allocated() - before
    # the block and its partials; leaves, gradients (the text's in float32 too) and the strip's; O(N) state
    assert beyond <= (128 << 20) * 9 // 8 + 16 * n * width + 4 * n * 64 + (32 << 20)


@pytest.mark.parametrize("width", [1, 33, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_blocks_give_the_same_bits_twice(dtype, width):
    batch = moved(random_batch(1000, width, 96, scale=50.0).to(dtype), "cuda")
    first, second = (outcome(whole, batch) for _ in range(2))
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_calibrated_loss_of_a_thousand_pairs(calibrated, dtype, keep, groups):
    b = joint_batch(1000, 192, 96, dtype, groups=groups)
    first, second = (calibrated.step(b, keep=keep) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same(first, step(exact(b), backend="eager"), 4 * torch.finfo(dtype).eps + 2e-5)


def test_memory_of_the_calibrated_loss_is_bounded():
    n, width = 32_768, 64
    batch = large_batch(n, width)
    given = {
        "image_features": batch.image.requires_grad_(), "text_features": batch.text.requires_grad_(),
        "teacher_image": batch.teacher_image, "teacher_text": batch.teacher_text, "logit_scale": batch.scale,
        "teacher_logit_scale": batch.teacher_scale, "forget_mask": torch.arange(n, device="cuda") < n // 8,
    }  # fmt: skip

    def run() -> None:
        functional.calibrated_loss(**given, backend="native", keep="nothing").total.backward()

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    beyond = torch.cuda.max_memory_allocated() - before
    # the block and its partials; gradients in float32, of the whole and of a block, and others; O(N) state
    assert beyond <= (128 << 20) * 9 // 8 + 32 * n * width + 8 * n * 64 + (32 << 20)
