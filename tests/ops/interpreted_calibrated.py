"""The calibrated loss of the backend "triton" in Triton's interpreter against float64; by `test_triton_interpreter.py`.

Blocks are 32 x 32 here. 50 pairs are 36 retain and 14 forget pairs (`calibrated_cases.masks`): two tiles and one.
"""

from __future__ import annotations

import pytest
import torch
from accuracy_cases import UNDERFLOW
from calibrated_accuracy import assert_same, in_regime, rounding_of_ds, unit
from calibrated_cases import STUDENT, batch, exact, step
from torch import Tensor

from cliperase_fast.functional import calibrated_loss
from cliperase_fast.ops import blocks
from cliperase_fast.ops.calibrated import Calibrated
from cliperase_fast.ops.calibrated_sweep import as_calibrated
from cliperase_fast.ops.registry import REGISTRY
from cliperase_fast.ops.triton import forward
from cliperase_fast.ops.triton.sweep import TritonKernels

NAME = "triton_in_blocks_calibrated"
WEIGHTS = (0.0, 0.7, -2.0, 1.3, 5.0)
in_blocks = as_calibrated(TritonKernels(name=NAME, block_columns=32))  # dS: blocks of one tile of columns


@pytest.fixture(autouse=True)
def several_programs_and_blocks(monkeypatch):
    """Let the public loss use small blocks of dS, and chunks of several tiles."""
    monkeypatch.setattr(forward, "_PROGRAMS", 2)
    loaded = REGISTRY["triton"].loaded
    implementation = loaded.get("cpu") or REGISTRY["triton"].load("cpu")
    monkeypatch.setitem(loaded, "cpu", implementation._replace(calibrated=Calibrated(in_blocks.loss)))


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
@pytest.mark.parametrize(("n", "keep", "forget"), [
    (1, "nothing", "none"), (2, "similarities", "all"), (50, "similarities", "some"), (50, "nothing", "some"),
])  # fmt: skip
def test_the_loss_is_that_of_the_reference(forget, groups, n, keep):
    b = batch(n, 40, 24, torch.float32, forget, groups)
    assert_same(step(b, WEIGHTS, backend="triton", keep=keep), step(exact(b), WEIGHTS, backend="eager"), 2e-6)


@pytest.mark.parametrize(("name", "scale", "forget", "dtype"), [
    ("random", 1000.0, "some", torch.float32), ("anti-aligned", 100.0, "some", torch.float32),
    ("collapsed teacher", 1000.0, "some", torch.float32), ("equal", 1.0, "some", torch.float32),
    ("converged", 100.0, "all", torch.bfloat16), ("collapsed", 30.0, "some", torch.bfloat16),
    ("random", 100.0, "some", torch.float16), ("half converged", 100.0, "some", torch.float16),
    ("equal", 100.0, "some", torch.float16),
])  # fmt: skip
def test_each_precision_costs_its_rounding_and_no_more(name, scale, forget, dtype):
    b = in_regime(name, scale, forget, 35)
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in b.items()}
    given = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in given.items()}
    truth = exact(given)
    expected, found = step(truth, backend="eager"), step(given, backend="triton")
    assert found["d image_features"].dtype == dtype and found["total"].dtype == torch.float32
    for key, allowed in unit(truth, expected, 2.0**-23).items():
        allowed = 2 * allowed + UNDERFLOW
        if found[key].dtype != torch.float32:
            info = torch.finfo(dtype)
            allowed += rounding_of_ds(truth, dtype) + info.eps / 2 * expected[key].abs().max().item() + info.tiny
        assert (found[key].double() - expected[key]).abs().max().item() <= allowed, key


@pytest.mark.parametrize("factor", [1e-9, 1e4])
def test_float16_keeps_its_digits_whatever_the_incoming_gradients(factor):
    b = batch(12, dtype=torch.float16)
    image = b["image_features"].requires_grad_()
    scale = b["logit_scale"].requires_grad_()
    (factor * calibrated_loss(**b, backend="triton").total).backward()
    found = step({**b, "image_features": image.detach(), "logit_scale": scale.detach()}, backend="triton")
    torch.testing.assert_close(scale.grad, factor * found["d logit_scale"], rtol=1e-4, atol=0)
    expected = (factor * found["d image_features"].float()).half()
    torch.testing.assert_close(image.grad, expected, rtol=2e-3, atol=2**-24)


def test_a_student_that_is_its_teacher_has_no_anchor_loss():
    b = {**in_regime("equal", 100.0, "none", 35), "group_ids": None}
    b = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in b.items()}
    found = step(b, (0, 0, 0, 0, 1), backend="triton")
    assert found["anchor"] <= 1e-13
    assert max(found[f"d {name}"].abs().max().item() for name in STUDENT) <= 1e-8


def test_two_runs_are_bitwise_equal_with_kept_similarities_and_without(monkeypatch):
    monkeypatch.setattr(blocks, "_CACHED_ROWS", 32)
    monkeypatch.setattr(blocks, "cache_budget", lambda device: 8 * 36 * 34)  # the first 32 of the 36 retain rows
    b = batch(50, 40, 40, torch.bfloat16)
    runs = [step(b, backend="triton", keep=keep) for keep in ("similarities", "similarities", "nothing")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_same(runs[0], runs[2], torch.finfo(torch.bfloat16).eps)


def test_strides_do_not_matter():
    b = batch(35, 24, 24, torch.float32)
    odd = {
        **b,
        "image_features": b["image_features"].T.contiguous().T,
        "text_features": torch.cat((b["text_features"], torch.full((35, 1), torch.nan)), 1)[:, :24],
        "teacher_image": torch.stack((b["teacher_image"],) * 2, 2).flatten(1)[:, ::2],
    }
    found, expected = ({**step(one, backend="triton")} for one in (odd, b))
    assert_same(found, expected, 1e-7)


def test_uninitialised_memory_is_never_read():
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        b = batch(35, 40, 24, torch.float32)
        expected = step(exact(b), backend="eager")
        assert_same(step(b, backend="triton", keep="similarities"), expected, 2e-6)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("needed", ["text_features", "logit_scale"])
def test_a_single_input_may_need_the_gradient(needed):
    b = batch(12, dtype=torch.float32)
    expected = step(b, backend="triton")[f"d {needed}"]
    b[needed].requires_grad_()
    calibrated_loss(**b, backend="triton").total.backward()
    torch.testing.assert_close(b[needed].grad, expected)
