"""Tests of the fused backends that need a GPU: streams, graphs, devices, precisions, offsets (`make gpu-check`)."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.ops import backends

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BACKENDS = [name for name in ("triton", "native") if name in backends() and "cuda" in backends()[name].devices]


def features(n: int, width: int, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator), dim=1).to(device, dtype)


def batch(n: int = 1000, width: int = 192, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> list[Tensor]:
    """Student image and text, scale, teacher image and text, scale."""
    student, teacher = ([features(n, width, seed, dtype, device) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    scales = [torch.full((), value, device=device) for value in (50.0, 40.0)]
    return [*student, scales[0], *teacher, scales[1]]


def step(backend: str, inputs: list[Tensor], **options: str) -> list[Tensor]:
    """Losses and gradients of a CLIPErase loss."""
    image, text, scale, teacher_image, teacher_text, teacher_scale = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (image, text, scale)]
    terms = functional.cliperase_loss(
        leaves[0][:64], leaves[1][:64], *leaves[:2], teacher_image, teacher_text, leaves[2], teacher_scale,
        backend=backend, **options,
    )  # fmt: skip
    return [*(term.detach() for term in terms), *torch.autograd.grad(terms.total, leaves)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_runs_on_the_current_stream(backend):
    inputs = batch()
    expected = step(backend, inputs)
    torch.cuda.synchronize()
    late = [torch.zeros_like(tensor) for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of ms: work on another stream would read the zeros
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        found = step(backend, late)
    side.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_captured_into_a_graph_and_replayed_on_new_data(backend):
    static = batch()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(backend, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(backend, static)
    other = [features(1000, 192, seed) for seed in (10, 11, 12, 13)]
    for target, source in zip((static[0], static[1], static[3], static[4]), other, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, step(backend, static))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("consistency", ["logits", "intra", "features"])
def test_nothing_waits_for_the_device(backend, consistency):
    inputs = batch()
    step(backend, inputs, consistency=consistency)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(backend, inputs, consistency=consistency)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_device_is_served_whichever_is_current(backend):
    expected = step(backend, batch())
    for index in range(torch.cuda.device_count()):
        assert_equal(step(backend, batch(device=f"cuda:{index}")), expected)


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_ieee_unless_tf32_is_asked_for(backend):
    inputs = batch(dtype=torch.float32)
    exact = step("eager", [tensor.double() for tensor in inputs])
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        plain = step(backend, inputs)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = step(backend, inputs)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert worst(plain, exact) < 3e-5
    assert 3e-5 < worst(rounded, exact) < 3e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("consistency", ["intra", "features"])
def test_the_other_consistencies_agree_with_float64(backend, consistency):
    inputs = batch(dtype=torch.float32)
    exact = step("eager", [tensor.double() for tensor in inputs], consistency=consistency)
    assert worst(step(backend, inputs, consistency=consistency), exact) < 1e-4


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
def test_more_similarities_than_32_bits_count(monkeypatch, backend, keep):
    # 50,000² are more than 2^31 entries: 18.6 GiB for S and S° when they are kept
    monkeypatch.setenv("CLIPERASE_KEEP_MIB", "40000")
    monkeypatch.setenv("CLIPERASE_STRIP_MIB", "12000")
    inputs = batch(50_000, 16)
    expected = step("torch", inputs)
    for ours, theirs in zip(step(backend, inputs, keep=keep), expected, strict=True):
        assert ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item() < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_takes_the_whole_graph(backend):
    inputs = batch()

    def total(image, text, scale):
        return functional.cliperase_loss(
            image[:64], text[:64], image, text, *inputs[3:5], scale, inputs[5], backend=backend
        ).total

    gradients = []
    for run in (torch.compile(total, fullgraph=True), total):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
        gradients.append(torch.autograd.grad(run(*leaves), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-6)


def test_there_is_a_gpu_backend_to_test():
    assert os.environ.get("TRITON_INTERPRET") != "1" and "triton" in BACKENDS
