"""The streamed calibrated loss: its strips, precision, custom ops and memory, against the float64 reference."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from accuracy_cases import INSTRUCTION_SETS, UNDERFLOW
from calibrated_accuracy import REGIMES, assert_same, in_regime, unit
from calibrated_cases import STUDENT, TERMS, batch, exact, masks, orthogonal, step
from processes import apart, peak
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.functional import calibrated_loss
from cliperase_fast.ops import streaming
from cliperase_fast.ops.calibrated import CalibratedInputs
from cliperase_fast.ops.calibrated_sweep import gradients_by_blocks, losses_by_blocks
from cliperase_fast.ops.native import cpu, extension
from cliperase_fast.ops.registry import REGISTRY
from cliperase_fast.validation import choose, computes

STREAMED = [
    name
    for name, backend in REGISTRY.items()
    if name != "eager" and backend.missing is None and computes(backend, "calibrated", "cpu")
]


@pytest.fixture
def low_strips(monkeypatch):
    """Strips of 3 rows in pure PyTorch."""
    monkeypatch.setattr(streaming, "_STRIP_BYTES_CPU", 1)
    monkeypatch.setattr(streaming, "_LEAST_ROWS", 3)


def tolerance(backend: str) -> tuple[torch.dtype, float]:
    float64 = torch.float64 in REGISTRY[backend].dtypes
    return (torch.float64, 1e-10) if float64 else (torch.float32, 2e-6)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("forget", ["some", "none", "all"])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
def test_several_strips_and_tiles_give_what_the_reference_gives(low_strips, backend, keep, forget, groups):
    dtype, limit = tolerance(backend)
    for n in (1, 2, 40, 600):
        b = batch(n, 10, 7, dtype, forget, groups)
        weights = (0.0, 0.7, -2.0, 1.3, 5.0)
        found = step(b, weights, backend=backend, keep=keep)
        assert_same(found, step(exact(b), weights, backend="eager"), limit)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("groups", ["none", "own"])
@pytest.mark.parametrize("n", [1, 40, 600])
def test_a_student_at_the_edited_teacher_has_no_divergence(backend, groups, n):
    found = step(orthogonal(n, groups), (0, 0, 0, 1, 0), backend=backend)
    assert found["consistency"].abs() <= 1e-6


@pytest.mark.parametrize("backend", ["eager", *STREAMED])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("forget", ["some", "all"])
def test_float32_is_as_good_as_the_rounding_of_the_similarities_allows(monkeypatch, backend, name, scale, forget):
    monkeypatch.setattr(streaming, "_STRIP_BYTES_CPU", 1)  # strips of 64 rows
    b = in_regime(name, scale, forget)
    expected = step(b, backend="eager")
    single = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in b.items()}
    found = step(single, backend=backend)
    for key, allowed in unit(b, expected, 2.0**-23).items():
        error = (found[key].double() - expected[key]).abs().max().item()
        assert error <= 2 * allowed + UNDERFLOW, (key, error / allowed)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["random", "converged", "equal"])
def test_half_precision_features_cost_one_rounding_of_the_gradient(backend, dtype, name):
    b = in_regime(name, 100.0, "some")
    half = {k: v.to(dtype) if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in b.items()}
    half = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in half.items()}
    expected, found = step(exact(half), backend="eager"), step(half, backend=backend)
    assert found["d image_features"].dtype == dtype and found["total"].dtype == torch.float32
    for key, allowed in unit(exact(half), expected, 2.0**-23).items():
        if found[key].dtype == dtype:
            allowed += torch.finfo(dtype).eps * expected[key].abs().max().item() + torch.finfo(dtype).smallest_normal
        assert (found[key].double() - expected[key]).abs().max().item() <= 2 * allowed, key


@pytest.mark.parametrize("backend", STREAMED)
def test_a_student_that_is_its_teacher_is_not_pulled(backend):
    b = {**in_regime("equal", 100.0, "none"), "group_ids": None}
    single = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in b.items()}
    found = step(single, (0, 0, 0, 0, 1), backend=backend)
    assert found["anchor"] <= 1e-13
    assert max(found[f"d {name}"].abs().max().item() for name in STUDENT) <= 1e-8


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("name", ["group_ids", "no groups"])
def test_a_retain_softmax_far_below_the_joint_one_keeps_its_digits(backend, name):
    # forget captions near every image: exp of the distance between the two softmaxes overflows float32
    b = in_regime("random", 1000.0, "some")
    b["text_features"] = torch.where(b["forget_mask"][:, None], b["image_features"].mean(0), -b["text_features"])
    b = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in b.items()}
    b["group_ids"] = b["group_ids"] if name == "group_ids" else None
    assert_same(step(b, backend=backend), step(exact(b), backend="eager"), 1e-4)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("needed", STUDENT)
def test_a_single_input_may_need_the_gradient(backend, needed):
    b = batch(20, dtype=torch.float32)
    expected = step(b, backend=backend)[f"d {needed}"]
    b[needed].requires_grad_()
    calibrated_loss(**b, backend=backend).total.backward()
    torch.testing.assert_close(b[needed].grad, expected)


@pytest.mark.parametrize("backend", STREAMED)
def test_two_runs_are_bitwise_equal_and_leave_the_inputs_alone(backend):
    b = batch(300, dtype=torch.float32)
    before = {k: v.clone() for k, v in b.items()}
    first, second = (step(b, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(b[name], before[name]) for name in b)


@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_gives_the_same_bits_for_any_number_of_threads(keep, dtype):
    b, found = batch(700, 40, 24, dtype), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(step(b, backend="native", keep=keep))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def available_instructions() -> list[str]:
    found = []
    for name in INSTRUCTION_SETS:
        with contextlib.suppress(ValueError):
            found.append(extension.load().cpu.instruction_set(name))
    return found


@pytest.mark.parametrize("instructions", available_instructions())
def test_every_instruction_set_that_runs_here_gives_the_loss(monkeypatch, instructions):
    monkeypatch.setenv("CLIPERASE_CPU", instructions)
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)):
        b = batch(150, dtype=dtype)
        assert_same(step(b, backend="native"), step(exact(b), backend="eager"), limit)


def test_a_part_of_the_similarities_may_be_kept(monkeypatch):
    b = batch(700, 40, 24, torch.float32)
    whole = step(b, backend="native", keep="nothing")
    sizes = []
    original = cpu.CpuKernels.calibrated_losses

    def watched(self, inputs, cache_size):
        found = original(self, inputs, cache_size)
        sizes.append(len(found[-1]))
        return found

    monkeypatch.setattr(cpu.CpuKernels, "calibrated_losses", watched)
    for mebibytes in ("1", "2", "1000"):
        monkeypatch.setenv("CLIPERASE_KEEP_MIB", mebibytes)
        assert_same(step(b, backend="native", keep="similarities"), whole, 1e-6)
    none, some, every = sizes
    assert none == 0 < some <= 2 << 20 < every


@pytest.mark.parametrize("keep", ["nothing", "similarities"])
@pytest.mark.parametrize("forget", ["first", "last", "some", "none", "all"])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
def test_native_gives_the_same_in_one_sweep_and_by_blocks(monkeypatch, keep, forget, groups):
    n = 700
    b = batch(n, 40, 24, torch.float32, groups=groups)
    places = torch.arange(n)
    # neither 300 nor 400 is a whole number of tiles
    b["forget_mask"] = {"first": places < 300, "last": places >= 400, **masks(n)}[forget]
    monkeypatch.setenv("CLIPERASE_KEEP_MIB", "4")  # less than the whole
    found = step(b, backend="native", keep=keep)
    monkeypatch.setattr(cpu.CpuKernels, "calibrated_losses", losses_by_blocks)
    monkeypatch.setattr(cpu.CpuKernels, "calibrated_gradients", gradients_by_blocks)
    assert_same(found, step(b, backend="native", keep=keep), 1e-6)
    assert_same(found, step(exact(b), backend="eager"), 2e-6)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("forget", ["some", "none", "all"])
def test_uninitialised_memory_is_never_read(low_strips, backend, forget):
    dtype, limit = tolerance(backend)
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        for keep in ("nothing", "similarities"):
            b = batch(40, dtype=dtype, forget=forget)
            assert_same(step(b, backend=backend, keep=keep), step(exact(b), backend="eager"), limit)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", STREAMED)
def test_autocast_changes_nothing(backend):
    b = batch(33, dtype=torch.float32)
    expected = step(b, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(b, backend=backend)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("backend", STREAMED)
def test_backward_twice_over_a_retained_graph_doubles_the_gradient(backend):
    b = batch(20, dtype=torch.float32)
    image = b["image_features"].requires_grad_()
    total = calibrated_loss(**b, backend=backend).total
    total.backward(retain_graph=True)
    once = image.grad.clone()
    total.backward()
    torch.testing.assert_close(image.grad, 2 * once, rtol=0, atol=0)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
def test_the_operators_keep_the_rules_of_torch_library(backend, groups):
    b = batch(5, 4, 3, dtype=torch.float32, groups=groups)
    leaves = [b[name].requires_grad_() for name in STUDENT]
    flat = (
        *leaves, b["teacher_image"], b["teacher_text"], b["teacher_logit_scale"], b["forget_mask"],
        b["background_image"], b["background_text"], b["group_ids"], 2,
    )  # fmt: skip
    forward = getattr(torch.ops.cliperase_fast, f"{backend}_calibrated").default
    backward = getattr(torch.ops.cliperase_fast, f"{backend}_calibrated_backward").default
    torch.library.opcheck(forward, (*flat, 0))
    _, *saved = (output.detach() for output in forward(*flat, 0))
    frozen = [argument.detach() if isinstance(argument, Tensor) else argument for argument in flat]
    for need in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (torch.ones(4), *saved, *frozen, *need))


@pytest.mark.parametrize("backend", ["eager", *STREAMED])
def test_torch_compile_takes_the_whole_graph(backend):
    b = batch(20, dtype=torch.float32, background=False)

    def loss(image, text, scale):
        student = {"image_features": image, "text_features": text, "logit_scale": scale}
        return calibrated_loss(**{**b, **student}, backend=backend).total

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [b[name].clone().requires_grad_() for name in STUDENT]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


def test_features_on_device_meta_give_a_loss_of_the_right_form():
    b = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch(20, dtype=torch.float32).items()}
    for backend in ("eager", "torch"):
        image = b["image_features"].clone().requires_grad_()
        loss = calibrated_loss(**{**b, "image_features": image}, backend=backend).total
        loss.backward()
        assert (loss.device.type, loss.shape, image.grad.shape) == ("meta", (), image.shape)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_sweep_over_the_joint_batch_edits_only_blocks_of_forget_columns(monkeypatch, direction):
    seen = []
    original = getattr(streaming.TorchKernels, f"calibrated_{direction}")

    def watched(self, inputs, edit, *others):
        seen.append((inputs.n, inputs.m, edit is not None))
        return original(self, inputs, edit, *others)

    monkeypatch.setattr(streaming.TorchKernels, f"calibrated_{direction}", watched)
    mask = torch.arange(10) < 3
    step({**batch(10), "forget_mask": mask}, backend="torch")
    assert seen == [(7, 7, False), (3, 7, False), (7, 3, True), (3, 3, True)]
    seen.clear()
    step({**batch(10, groups=False), "forget_mask": mask}, backend="torch")
    assert seen == [(7, 7, False), (3, 7, False), (7, 3, False), (3, 3, True)]


def extra_memory(backend: str, n: int) -> int:
    """Bytes at the peak beyond inputs and gradients."""

    def run(b: dict) -> None:
        calibrated_loss(**b, backend=backend, keep="nothing").total.backward()

    def leaves(n: int) -> dict:
        b = batch(n, 64, 64, dtype=torch.float32)
        return {**b, **{name: b[name].requires_grad_() for name in STUDENT[:2]}}

    run(leaves(300))  # loads what is loaded on first use
    inputs = leaves(n)
    return peak(lambda: run(inputs)) - sum(inputs[name].grad.nbytes for name in STUDENT[:2])


@pytest.mark.parametrize("backend", STREAMED)
def test_memory_is_that_of_strips_and_copies_of_the_features(backend):
    n = 8192
    extra = apart(extra_memory, backend, n)
    strips, copies = 14 * (8 << 20), 14 * 4 * n * 64  # one similarity matrix has 256 MiB
    assert 0 < extra < strips + copies, f"{extra / 2**20:.1f} MiB"


def test_backends_without_the_loss_are_refused_by_name(monkeypatch):
    features = torch.ones(2, 3)
    triton = replace(REGISTRY["triton"], devices=("cuda", "cpu"), why_missing=None, loss_devices={"calibrated": ()})
    monkeypatch.setitem(REGISTRY, "triton", triton)
    with pytest.raises(
        InputError, match="backend='triton' does not compute the calibrated loss; use auto, eager, torch"
    ):
        choose("triton", features, features, loss="calibrated")
    monkeypatch.setenv("CLIPERASE_BACKEND", "triton")
    with pytest.raises(InputError, match="CLIPERASE_BACKEND=triton does not compute the calibrated loss"):
        calibrated_loss(**batch(4, dtype=torch.float32))


def test_terms_have_the_order_of_the_kernels():
    b = batch(12)
    inputs = CalibratedInputs(
        b["image_features"], b["text_features"], b["logit_scale"], b["teacher_image"], b["teacher_text"],
        b["teacher_logit_scale"], b["forget_mask"], b["background_image"], b["background_text"], b["group_ids"],
    )  # fmt: skip
    terms = calibrated_loss(**b, backend="eager")
    for backend in ("eager", "torch"):
        loss = REGISTRY[backend].load("cpu").calibrated
        assert loss is not None
        torch.testing.assert_close(loss.loss(inputs), tuple(getattr(terms, name) for name in TERMS))
