"""The CUDA half of "native" with batched products, small blocks and graphs, emulated on the CPU, against float64."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import build
from kernel_checks import *  # noqa: F403
from kernel_checks import FORMS, Subject, check, formed, some_groups
from recorded_graphs import Recorder
from sweep_cases import outcome, random_batch

from cliperase_fast.errors import InputError
from cliperase_fast.ops import blocks, registry
from cliperase_fast.ops.autograd import as_sweep
from cliperase_fast.ops.native import cuda, graphs
from cliperase_fast.ops.native.cuda import CudaKernels
from cliperase_fast.ops.native.graphs import GraphedKernels

NAME = "native_graphs_emulated"
# Two units of 64 x 128 in the forward pass of bfloat16 and one in the backward pass, so 300 pairs are many blocks.
BLOCK_BYTES = 2 * 64 * 128 * 8
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(scope="module")
def sweep_of_graphs(kernels):
    return as_sweep(GraphedKernels(kernels, NAME, block_columns=128, block_bytes=BLOCK_BYTES, capture=Recorder()))


@pytest.fixture(scope="module")
def plain(kernels):
    """The same blocks and products without graphs."""
    return as_sweep(CudaKernels(kernels, f"{NAME}_plain", 128, batched=True, block_bytes=BLOCK_BYTES))


@pytest.fixture
def subject(sweep_of_graphs):
    return Subject(sweep_of_graphs, NAME, GraphedKernels, row_unit=8)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def graphed(kernels, recorder):
    return GraphedKernels(kernels, block_columns=128, block_bytes=BLOCK_BYTES, capture=recorder)


@pytest.fixture
def sweep(graphed):
    graphed.name = f"{NAME}_{next(NUMBERS)}"
    return as_sweep(graphed)


def assert_equal(ours, theirs):
    for one, other in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(one, other)


def pairs(n=40, seed=0, width=40, teacher_width=40, dtype=torch.float32):
    return random_batch(n, width, teacher_width, seed=seed).to(dtype)


@pytest.fixture
def products(monkeypatch):
    """How many products each call forms."""
    calls = []
    single, batched = cuda.product, cuda.batched_product
    monkeypatch.setattr(cuda, "product", lambda *given, **named: calls.append(1) or single(*given, **named))
    monkeypatch.setattr(cuda, "batched_product", lambda left, *rest: calls.append(len(left)) or batched(left, *rest))
    return calls


# 300 pairs are five by three blocks, in blocks of two units in one pass and of one unit in the other
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "form"), [(1, "both"), (65, "both"), (65, "rm"), (65, "kl"), (300, "both")])
@pytest.mark.parametrize("groups", [False, True], ids=["no groups", "groups"])
def test_products_of_student_and_teacher_are_one_call(subject, products, n, form, groups, dtype):
    batch = random_batch(n, 40, 40)
    batch = formed(replace(batch, group_ids=some_groups(n) if groups else None), form)
    check(subject, batch, dtype)
    assert set(products) == {2 if FORMS[form][1] else 1}


def test_products_of_different_widths_or_dtypes_are_two_calls(subject, products):
    check(subject, random_batch(65, 40, 24))
    batch = random_batch(65, 40, 40).to(torch.bfloat16)
    outcome(subject.sweep, replace(batch, teacher_image=batch.teacher_image.float()))
    assert set(products) == {1}
    check(subject, random_batch(65, 40, 45))  # both are padded to 48
    assert 2 in products


def test_the_budget_of_a_block_is_kept(kernels, monkeypatch):
    shapes = []
    add_blocks = CudaKernels._add_blocks

    def watched(self, found, blocks, *rest):
        shapes.append((blocks.rows, blocks.columns))
        add_blocks(self, found, blocks, *rest)

    monkeypatch.setattr(CudaKernels, "_add_blocks", watched)
    for budget in (0, 64 * 128 * 12, 1 << 20):
        sweep = as_sweep(CudaKernels(kernels, f"{NAME}_budget_{budget}", batched=True, block_bytes=budget))
        outcome(sweep, pairs(600), keep="nothing")
    assert shapes[:2] == [(640, 640), (64, 128)]
    assert 64 * 128 < shapes[2][0] * shapes[2][1] <= (1 << 20) / 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_data_is_replayed_and_earlier_results_stay(sweep, plain, recorder, dtype):
    first, second = pairs(130, 0, dtype=dtype), pairs(130, 1, dtype=dtype)
    first, second = (replace(batch, group_ids=some_groups(130) + seed) for seed, batch in enumerate((first, second)))
    found = outcome(sweep, first)
    copies = [tensor.clone() for tensor in found.tensors()]
    assert (recorder.captures, recorder.replays) == (2, 2)
    assert_equal(outcome(sweep, second), outcome(plain, second))
    assert_equal(outcome(sweep, first), found)
    assert (recorder.captures, recorder.replays) == (2, 6)
    for tensor, copy in zip(found.tensors(), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_the_backward_pass_takes_the_data_of_its_own_forward_pass(sweep, plain):
    batches = [pairs(40, seed) for seed in range(2)]
    leaves = [[t.clone().requires_grad_() for t in (batch.image, batch.text, batch.scale)] for batch in batches]
    losses = [sum(sweep(batch.inputs(*some))) for batch, some in zip(batches, leaves, strict=True)]
    for batch, some, loss in zip(batches, leaves, losses, strict=True):  # after both forward passes
        expected = outcome(plain, batch)
        for ours, theirs in zip(torch.autograd.grad(loss, some), expected.tensors()[2:], strict=True):
            assert torch.equal(ours, theirs)


def test_strides_share_a_graph_and_kinds_do_not(sweep, recorder):
    def captures(batch, weights=(1.0, 1.0), **options):
        before = recorder.captures
        outcome(sweep, batch, weights, **options)
        return recorder.captures - before

    batch = pairs()
    assert captures(batch) == 2
    assert captures(replace(batch, image=batch.image.T.contiguous().T), (3.0, -1.0), keep="nothing") == 0
    assert captures(replace(batch, teacher_image=batch.teacher_image[:1].expand(40, 40))) == 0
    for other in (
        pairs(41), pairs(teacher_width=24), batch.to(torch.bfloat16), batch.without_teacher(),
        replace(batch, group_ids=some_groups(40)), replace(batch, scale=batch.scale.double()),
        replace(batch, want_retention=False),
    ):  # fmt: skip
        assert captures(other) == 2
    assert captures(batch, strip_rows=64) == 2


def test_a_gradient_that_is_not_needed_has_a_graph_of_its_own(sweep, plain, recorder):
    batch = pairs()
    expected = outcome(plain, batch)
    for captures, names in ((2, ("image", "text")), (3, ("image",)), (3, ("text", "image"))):
        inputs = {name: getattr(batch, name).clone() for name in ("image", "text", "scale")}
        for name in names:
            inputs[name].requires_grad_()
        sum(sweep(batch.inputs(*inputs.values()))).backward()
        assert recorder.captures == captures
        for name in names:
            assert torch.equal(inputs[name].grad, getattr(expected, name))


def test_settings_of_torch_that_a_graph_contains_make_another(sweep, recorder):
    outcome(sweep, pairs())
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        outcome(sweep, pairs())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert recorder.captures == 4
    outcome(sweep, pairs())
    assert recorder.captures == 4


def test_only_the_last_graphs_are_kept_until_they_are_cleared(sweep, graphed, recorder):
    for n in (*range(20, 26), 25, 24):
        outcome(sweep, pairs(n))
    (device,) = graphed._devices.values()
    assert recorder.captures == 12 and len(device._graphs) == 8
    outcome(sweep, pairs(22))  # one of the last four
    assert recorder.captures == 12
    outcome(sweep, pairs(21))  # takes the place of 23, which was used before all others
    outcome(sweep, pairs(22))
    assert recorder.captures == 14
    outcome(sweep, pairs(23))
    assert recorder.captures == 16
    assert recorder.pools[0] is None and len(set(recorder.pools[1:])) == 1  # one memory for all
    graphed.clear()
    assert len(device._graphs) == 0
    outcome(sweep, pairs(23))
    assert recorder.captures == 18 and recorder.pools[16] is None


def test_a_stream_that_is_captured_gets_the_launches_themselves(sweep, plain, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "capturing", lambda device: True)
    assert_equal(outcome(sweep, pairs()), outcome(plain, pairs()))
    assert recorder.captures == recorder.replays == 0


def test_the_passes_are_not_captured_while_torch_compile_traces(graphed, recorder, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    graphed.losses(pairs(), 0)
    assert recorder.captures == recorder.replays == 0


def test_a_pass_runs_once_on_another_stream_before_it_is_captured(monkeypatch):
    events, names = [], iter(("warm", "side"))

    class Context:
        def __init__(self, *given, **named):
            events.append((given, named))

        def __enter__(self):
            events.append("begin")

        def __exit__(self, *error):
            events.append("end")

    def stream(device):
        name = next(names, "current")
        return SimpleNamespace(
            name=name, device=device, wait_stream=lambda other: events.append(f"{name} waits for {other.name}")
        )

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "stream", lambda of: Context(of.name))
    monkeypatch.setattr(
        torch.cuda, "graph", lambda *given, stream, **named: Context(*given, stream=stream.name, **named)
    )
    capture = graphs.GpuCapture(torch.device("cuda", 0))
    assert capture(lambda: events.append("run") or (), "pool") == ("graph", ())
    assert events == [
        "warm waits for current", (("warm",), {}), "begin", "run", "end", "current waits for warm",
        (("graph",), {"pool": "pool", "stream": "side", "capture_error_mode": "thread_local"}), "begin", "run", "end",
    ]  # fmt: skip


def test_a_capture_that_fails_is_tried_again(kernels, plain):
    class Failing(Recorder):
        def capture(self, run, pool):
            if self.captures == 0:
                self.captures += 1
                raise RuntimeError("out of memory")
            return super().capture(run, pool)

    failing = Failing()
    sweep = as_sweep(GraphedKernels(kernels, f"{NAME}_failing", 128, BLOCK_BYTES, failing))
    with pytest.raises(RuntimeError, match="out of memory"):
        outcome(sweep, pairs())
    assert_equal(outcome(sweep, pairs()), outcome(plain, pairs()))


def test_threads_take_turns(sweep, plain, recorder):
    batches = [pairs(40, seed) for seed in range(4)]
    expected = [outcome(plain, batch) for batch in batches]
    found = {}

    def work(place):
        found[place] = [outcome(sweep, batches[place]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.captures == 2 and recorder.replays == 40
    for place, results in found.items():
        for result in results:
            assert_equal(result, expected[place])


def test_a_graph_of_inference_mode_serves_training(sweep, plain, recorder):
    batch = pairs()
    with torch.inference_mode():
        losses = sweep(batch.inputs())
    assert all(loss.is_inference() for loss in losses)
    assert_equal(outcome(sweep, batch), outcome(plain, batch))
    assert recorder.captures == 2


def test_similarities_that_are_kept_are_computed_as_without_graphs(sweep, kernels, recorder, monkeypatch):
    shipped = as_sweep(CudaKernels(kernels, f"{NAME}_shipped", block_columns=128))
    batch = pairs(130)
    assert_equal(outcome(sweep, batch, keep="similarities"), outcome(shipped, batch, keep="similarities"))
    assert recorder.captures == 0
    monkeypatch.setattr(blocks, "free_bytes", lambda device, enough: enough)  # so that "auto" would keep all
    outcome(sweep, batch, keep="auto")
    assert recorder.captures == 2


def test_graphs_are_used_where_the_environment_asks_for_them(monkeypatch):
    load = registry.REGISTRY["native"].load
    for value, expected in ((None, cuda.sweep), ("", cuda.sweep), ("0", cuda.sweep), ("1", graphs.sweep)):
        monkeypatch.delenv("CLIPERASE_CUDA_GRAPHS", raising=False)
        if value is not None:
            monkeypatch.setenv("CLIPERASE_CUDA_GRAPHS", value)
        found = load("cuda")
        assert found.sweep is expected and found.kernels is cuda.kernels and found.calibrated is cuda.calibrated
    monkeypatch.setenv("CLIPERASE_CUDA_GRAPHS", "yes")
    with pytest.raises(InputError, match="CLIPERASE_CUDA_GRAPHS=yes must be 1"):
        load("cuda")
