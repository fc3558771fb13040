"""Tests of the CUDA half of the backend "native" on a GPU, against float64 (`make gpu-check`).

Needs the extension, built with nvcc. `test_runtime_on_gpu.py` tests streams, graphs and devices for all backends.
"""

from __future__ import annotations

import os
from dataclasses import replace

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
from cliperase_fast.ops.native.graphs import GraphedKernels, l2_share
from cliperase_fast.ops.streaming import sweep as streamed

pytestmark = pytest.mark.gpu
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch's deterministic mode
NAME = "native_cuda_checked"
on_gpu = as_sweep(CudaKernels(name=NAME, block_columns=128))
whole = as_sweep(CudaKernels(name=f"{NAME}_whole"))
BLOCK_BYTES = 1 << 20  # a thousand pairs are many blocks
batched = as_sweep(CudaKernels(name=f"{NAME}_batched", batched=True, block_bytes=BLOCK_BYTES))
graph_kernels = GraphedKernels(name=f"{NAME}_graphs", block_bytes=BLOCK_BYTES)
graphed = as_sweep(graph_kernels)


def sweep(inputs):
    """`on_gpu` for CPU tensors; gradients flow back to them."""
    return tuple(loss.cpu() for loss in on_gpu(moved(inputs, "cuda")))


@pytest.fixture
def subject():
    return Subject(sweep, NAME, CudaKernels, row_unit=8, device="cuda")


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


def thousand(dtype=torch.bfloat16, seed=0, teacher_width=192, device="cuda"):
    batch = random_batch(1000, 192, teacher_width, scale=50.0, seed=seed).to(dtype)
    return moved(replace(batch, group_ids=torch.arange(1000) // 3), device)


def plain(batch):
    """The same blocks and products without graphs."""
    return run(batched, batch, keep="nothing")


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("teacher_width", [192, 96], ids=["one product", "two products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batched_products_and_graphs_agree_with_float64(dtype, teacher_width):
    batch = thousand(dtype, teacher_width=teacher_width)
    expected = run(streamed, batch.to(torch.float64))
    for ours, theirs in zip(run(graphed, batch), expected, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 8 * torch.finfo(dtype).eps + 1e-4
    assert_equal(run(graphed, batch), plain(batch))


def test_graphs_are_replayed_on_new_data_without_waiting_and_earlier_results_stay():
    first, second = thousand(), thousand(seed=1)
    found = run(graphed, first)
    copies = [tensor.clone() for tensor in found]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(graphed, second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(again, plain(second))
    assert_equal(found, copies)


def test_graphs_replayed_on_two_streams_take_turns():
    batches = [thousand(seed=seed) for seed in range(2)]
    expected = [plain(batch) for batch in batches]
    run(graphed, batches[0])
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in batches], []
    for _ in range(5):
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(graphed, batch))
    torch.cuda.synchronize()
    for place, tensors in enumerate(found):
        assert_equal(tensors, expected[place % 2])


def test_a_graph_of_the_caller_contains_the_launches_of_the_sweep():
    static, other = thousand(), thousand(seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(graphed, static)
    static.image.copy_(other.image)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, plain(static))


@pytest.mark.xdist_group("memory")
def test_cleared_graphs_leave_no_memory_behind():
    batch = thousand()
    plain(batch)
    graph_kernels.clear()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for dtype in (torch.bfloat16, torch.float32):
        run(graphed, batch.to(dtype))
    graph_kernels.clear()
    torch.cuda.empty_cache()
    # cuBLAS's workspaces of two streams and two threads stay
    assert torch.cuda.memory_reserved() - before <= 160 << 20


def test_graphs_serve_every_device_with_blocks_of_half_its_l2_cache():
    by_l2 = as_sweep(GraphedKernels(name=f"{NAME}_l2"))
    expected = plain(thousand())
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        assert 1 << 20 <= l2_share(device) <= 256 << 20
        for ours, theirs in zip(run(by_l2, thousand(device=device)), expected, strict=True):
            assert ((ours.cpu().double() - theirs.cpu().double()).norm() / theirs.cpu().double().norm()) < 2e-2
