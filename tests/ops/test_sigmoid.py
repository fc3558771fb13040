"""The sigmoid loss on the CPU: streamed PyTorch, and C++ on every instruction set that runs here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accuracy_cases import INSTRUCTION_SETS, rounds_ds, runs_here
from sigmoid_checks import *  # noqa: F403
from sigmoid_checks import Subject, check, outcome, random_case

from cliperase_fast.contrastive import sigmoid_loss
from cliperase_fast.errors import InputError
from cliperase_fast.ops import backends, eager, registry
from cliperase_fast.ops.native import extension
from cliperase_fast.validation import choose

NATIVE = pytest.mark.skipif(not backends()["native"].available, reason=backends()["native"].reason)


@pytest.fixture(params=["torch", pytest.param("native", marks=NATIVE)])
def subject(request):
    loss = registry.REGISTRY[request.param].load("cpu").sigmoid.loss
    return Subject(loss, request.param, rounds_ds=rounds_ds(request.param, torch.bfloat16))


@pytest.fixture
def native():
    return Subject(registry.REGISTRY["native"].load("cpu").sigmoid.loss, "native")


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("negative_only", [False, True])
def test_the_reference_is_the_formula(n, negative_only):
    case = random_case(n)
    logits = case.scale * case.image @ case.text.T + case.bias
    z = -torch.ones_like(logits) if negative_only else 2 * torch.eye(n).double() - 1
    truth = torch.log1p(torch.exp(-z * logits)).sum() / n
    found = eager.sigmoid(case.inputs(pair_offset=n if negative_only else 0))
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)


@pytest.mark.parametrize("backend", ["eager", "torch", pytest.param("native", marks=NATIVE)])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 12), (12, 7)])
def test_texts_of_another_rank_are_negatives_of_every_image(backend, n, m):
    case = random_case(n, m).to(torch.float32)
    image, text = case.image.requires_grad_(), case.text
    loss = sigmoid_loss(image, text, 9.0, -2.0, negative_only=True, backend=backend)
    truth = F.softplus(9.0 * image @ text.T - 2.0).sum() / n
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(*(torch.autograd.grad(value, image) for value in (loss, truth)))


def test_float64_is_exact_in_strips():
    loss = registry.REGISTRY["torch"].load("cpu").sigmoid.loss
    for scale, bias in ((10.0, -4.0), (1000.0, 30.0), (0.1, 21.0)):  # exp(-21) is not lost
        case = random_case(7, scale=scale, bias=bias)
        found, truth = outcome(loss, case, strip_rows=3), outcome(eager.sigmoid, case)
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)


# a tile is 256 x 128, a strip 1024 rows: a tile of one row, a block of one column, pairs across tiles, two strips
@NATIVE
@pytest.mark.parametrize(
    ("n", "m", "pair_offset"), [(257, 257, 0), (129, 390, 261), (300, 129, 129), (1100, 1300, 100)]
)
def test_several_tiles_and_strips_of_the_cpp_loss(native, n, m, pair_offset):
    check(native, random_case(n, m, pair_offset, width=20))


@NATIVE
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_each_instruction_set_that_runs_here(native, monkeypatch, name):
    monkeypatch.setenv("CLIPERASE_CPU", name)
    if not runs_here(name):
        assert extension.why_missing() is not None
        return
    for width in (20, 300):
        case = random_case(140, 300, 100, width=width)
        check(native, case)
        check(replace(native, rounds_ds=rounds_ds("native", torch.bfloat16)), case, torch.bfloat16)


@NATIVE
def test_the_same_bits_for_any_number_of_threads(native):
    case = random_case(1100, 700, 700, width=150).to(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7, 2):
            torch.set_num_threads(threads)
            results.append(outcome(native.loss, case))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@NATIVE
def test_memory_of_the_pool_that_is_not_cleared_does_not_show(native):
    case = random_case(300).to(torch.float32)
    first = outcome(native.loss, case)
    for size in (1 << 20, 1 << 21, 1 << 22, 1 << 23):
        torch.frombuffer(extension.load().cpu.Workspace(size), dtype=torch.float32).fill_(torch.nan)
    assert all(map(torch.equal, first, outcome(native.loss, case)))


def watched(monkeypatch):
    """The names of the backends that the public loss runs."""
    seen = []
    for name, backend in registry.REGISTRY.items():
        load = backend.load

        def watching(device, name=name, load=load):
            found = load(device)
            loss = found.sigmoid.loss
            return found._replace(sigmoid=found.sigmoid._replace(loss=lambda case: seen.append(name) or loss(case)))

        monkeypatch.setitem(registry.REGISTRY, name, replace(backend, load=watching, loaded={}))
    return seen


@NATIVE
def test_the_backend_asked_for_computes_it_and_auto_takes_cpp_on_a_cpu(monkeypatch):
    monkeypatch.delenv("CLIPERASE_BACKEND", raising=False)
    seen = watched(monkeypatch)
    case = random_case(300).to(torch.float32)
    tensors = (case.image, case.text, case.scale, case.bias)
    losses = [sigmoid_loss(*tensors, backend=name) for name in ("auto", "eager", "torch", "native")]
    sigmoid_loss(*(tensor.double() for tensor in tensors))
    monkeypatch.setenv("CLIPERASE_BACKEND", "eager")
    losses.append(sigmoid_loss(*tensors))
    assert seen == ["native", "eager", "torch", "native", "torch", "eager"]
    torch.testing.assert_close(losses, [losses[0]] * 5)


def test_backends_that_lack_it_are_refused_by_name(monkeypatch):
    features = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"backend='abacus' is not a backend"):
        sigmoid_loss(features, features, 1.0, backend="abacus")
    built_with_cuda = replace(registry.REGISTRY["native"], devices=("cpu", "cuda"))
    monkeypatch.setitem(registry.REGISTRY, "native", built_with_cuda)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 3))
    if backends()["native"].available:
        with pytest.raises(InputError, match=r"computes the sigmoid loss on cpu only, not on cuda; use auto, .*torch"):
            choose("native", on_a_gpu, on_a_gpu, loss="sigmoid")


def test_an_empty_batch_is_zero_and_has_gradients():
    leaves = [torch.ones(shape, requires_grad=True) for shape in ((0, 3), (0, 3), (), ())]
    loss = sigmoid_loss(*leaves)
    loss.backward()
    assert loss == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)  # DDP waits for each of them


@pytest.mark.parametrize("backend", ["eager", "torch", pytest.param("native", marks=NATIVE)])
def test_a_scaled_loss_has_float16_gradients_that_would_underflow_without_the_scale(backend):
    """What a GradScaler does; the gradients are some 1e-8, below float16's smallest number."""
    image = torch.eye(4, 8, dtype=torch.float16).requires_grad_()
    loss = 2.0**16 * sigmoid_loss(image, image.detach().clone(), 44.0, -22.0, backend=backend)
    exact = image.detach().double().requires_grad_()
    truth = 2.0**16 * sigmoid_loss(exact, exact.detach(), 44.0, -22.0, backend="eager")
    found, expected = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, image), (truth, exact)))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2.0**-24)


def test_half_precision_of_a_trained_model_keeps_its_loss():
    """Logits of a fine-tuned SigLIP: scale 112, bias -16.5; bfloat16 features, computed in float32."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(200, 64, generator=generator), dim=1)
    text = F.normalize(image + 0.1 * torch.randn(200, 64, generator=generator), dim=1)
    tensors = [tensor.to(torch.bfloat16) for tensor in (image, text)]
    exact = sigmoid_loss(*(tensor.double() for tensor in tensors), 112.0, -16.5, backend="eager")
    assert sigmoid_loss(*tensors, 112.0, -16.5).item() == pytest.approx(exact.item(), rel=1e-5)
