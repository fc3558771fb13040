"""What the calibrated loss of every backend of GPU kernels must keep, against float64: imported, whole, by its tests.

A test file brings the fixture `calibrated`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy_cases import UNDERFLOW
from calibrated_accuracy import assert_same, in_regime, rounding_of_ds, unit
from calibrated_cases import STUDENT, batch, exact, orthogonal, step
from torch import Tensor

from cliperase_fast.functional import calibrated_loss
from cliperase_fast.ops import blocks
from cliperase_fast.ops.calibrated import Calibrated
from cliperase_fast.ops.registry import REGISTRY

WEIGHTS = (0.0, 0.7, -2.0, 1.3, 5.0)


@dataclass(frozen=True)
class CalibratedSubject:
    """A backend under test. Two sevenths of `pairs` pairs are to be forgotten (`calibrated_cases.masks`)."""

    backend: str
    kernels: type
    pairs: int  # several blocks of rows and columns
    cached_rows: int  # similarities are kept of a multiple of these rows
    budget: int  # of the similarities, in bytes: some rows of the retain pairs are kept, others are not
    device: str = "cpu"

    def given(self, b: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in b.items()}

    def step(self, b: dict[str, Any], *weights: tuple[float, ...], **options: Any) -> dict[str, Tensor]:
        found = step(self.given(b), *weights, backend=self.backend, **options)
        return {name: value.cpu() for name, value in found.items()}


def let_the_public_loss_use(monkeypatch: pytest.MonkeyPatch, backend: str, loss: Callable, device: str = "cpu") -> None:
    loaded = REGISTRY[backend].loaded
    implementation = loaded.get(device) or REGISTRY[backend].load(device)
    monkeypatch.setitem(loaded, device, implementation._replace(calibrated=Calibrated(loss)))


def single(b: dict[str, Any]) -> dict[str, Any]:
    """The float64 numbers in float32."""
    return {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in b.items()}


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
@pytest.mark.parametrize(("n", "keep", "forget"), [
    (1, "nothing", "none"), (2, "similarities", "all"), (None, "similarities", "some"), (None, "nothing", "some"),
])  # fmt: skip
def test_the_loss_is_that_of_the_reference(calibrated, forget, groups, n, keep):
    b = batch(n or calibrated.pairs, 40, 24, torch.float32, forget, groups)
    assert_same(calibrated.step(b, WEIGHTS, keep=keep), step(exact(b), WEIGHTS, backend="eager"), 2e-6)


@pytest.mark.parametrize(("name", "scale", "forget", "dtype"), [
    ("random", 1000.0, "some", torch.float32), ("anti-aligned", 100.0, "some", torch.float32),
    ("collapsed teacher", 1000.0, "some", torch.float32), ("equal", 1.0, "some", torch.float32),
    ("converged", 100.0, "all", torch.bfloat16), ("collapsed", 30.0, "some", torch.bfloat16),
    ("random", 100.0, "some", torch.float16), ("half converged", 100.0, "some", torch.float16),
    ("equal", 100.0, "some", torch.float16),
])  # fmt: skip
def test_each_precision_costs_its_rounding_and_no_more(calibrated, name, scale, forget, dtype):
    b = in_regime(name, scale, forget, 35)
    given = single({k: v.to(dtype) if isinstance(v, Tensor) and v.ndim == 2 else v for k, v in b.items()})
    truth = exact(given)
    expected, found = step(truth, backend="eager"), calibrated.step(given)
    assert found["d image_features"].dtype == dtype and found["total"].dtype == torch.float32
    for key, allowed in unit(truth, expected, 2.0**-23).items():
        allowed = 2 * allowed + UNDERFLOW
        if found[key].dtype != torch.float32:
            info = torch.finfo(dtype)
            allowed += rounding_of_ds(truth, dtype) + info.eps / 2 * expected[key].abs().max().item() + info.tiny
        assert (found[key].double() - expected[key]).abs().max().item() <= allowed, key


@pytest.mark.parametrize("factor", [1e-9, 1e4])
def test_float16_keeps_its_digits_of_the_calibrated_loss(calibrated, factor):
    b = calibrated.given(batch(12, dtype=torch.float16))
    image = b["image_features"].requires_grad_()
    scale = b["logit_scale"].requires_grad_()
    (factor * calibrated_loss(**b, backend=calibrated.backend).total).backward()
    found = calibrated.step({**b, "image_features": image.detach(), "logit_scale": scale.detach()})
    torch.testing.assert_close(scale.grad.cpu(), factor * found["d logit_scale"], rtol=1e-4, atol=0)
    expected = (factor * found["d image_features"].float()).half()
    torch.testing.assert_close(image.grad.cpu(), expected, rtol=2e-3, atol=2**-24)


@pytest.mark.parametrize("groups", ["none", "own"])
def test_a_student_at_the_edited_teacher_has_no_divergence(calibrated, groups):
    found = calibrated.step(orthogonal(calibrated.pairs, groups), (0, 0, 0, 1, 0))
    assert found["consistency"].abs() <= 1e-6


def test_a_student_that_is_its_teacher_has_no_anchor_loss(calibrated):
    b = single({**in_regime("equal", 100.0, "none", 35), "group_ids": None})
    found = calibrated.step(b, (0, 0, 0, 0, 1))
    assert found["anchor"] <= 1e-13
    assert max(found[f"d {name}"].abs().max().item() for name in STUDENT) <= 1e-8


def test_two_runs_are_bitwise_equal_where_some_similarities_are_kept(calibrated, monkeypatch):
    monkeypatch.setattr(blocks, "_CACHED_ROWS", calibrated.cached_rows)
    monkeypatch.setattr(blocks, "cache_budget", lambda device: calibrated.budget)
    kept = []
    original = calibrated.kernels.workspace

    def workspace(self, size, device):
        kept.append(size)
        return original(self, size, device)

    monkeypatch.setattr(calibrated.kernels, "workspace", workspace)
    b = batch(calibrated.pairs, 40, 40, torch.bfloat16)
    runs = [calibrated.step(b, keep=keep) for keep in ("similarities", "similarities", "nothing")]
    assert kept == [calibrated.budget, calibrated.budget, 0]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_same(runs[0], runs[2], torch.finfo(torch.bfloat16).eps)


def test_strides_of_the_joint_batch_do_not_matter(calibrated):
    b = {**batch(35, 24, 24, torch.float32), "forget_mask": torch.arange(35) >= 20}  # sorted, so nothing is copied
    odd = {
        **b,
        "image_features": b["image_features"].T.contiguous().T,
        "text_features": torch.cat((b["text_features"], torch.full((35, 1), torch.nan)), 1)[:, :24],
        "teacher_image": torch.stack((b["teacher_image"],) * 2, 2).flatten(1)[:, ::2],
        "group_ids": torch.stack((b["group_ids"],) * 2, 1).flatten()[::2],
        "background_text": torch.stack((b["background_text"],) * 2, 1).flatten()[::2],
    }
    assert not odd["group_ids"].is_contiguous()
    found, expected = (calibrated.step(one) for one in (odd, b))
    assert_same(found, expected, 1e-7)


def test_uninitialised_memory_is_never_read_by_the_calibrated_loss(calibrated):
    torch.use_deterministic_algorithms(True)  # with it torch.empty is filled with NaN
    try:
        b = batch(35, 40, 24, torch.float32)
        expected = step(exact(b), backend="eager")
        assert_same(calibrated.step(b, keep="similarities"), expected, 2e-6)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("needed", ["text_features", "logit_scale"])
def test_a_single_input_of_the_calibrated_loss_may_need_the_gradient(calibrated, needed):
    b = calibrated.given(batch(12, dtype=torch.float32))
    expected = calibrated.step(b)[f"d {needed}"]
    b[needed].requires_grad_()
    calibrated_loss(**b, backend=calibrated.backend).total.backward()
    torch.testing.assert_close(b[needed].grad.cpu(), expected)
