"""Rounding: each backend in float32 and the half precisions against float64; the unit is in `accuracy_cases.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy_cases import REGIMES, allowed_errors, errors, native_errors, regime, rounding_unit
from sweep_cases import BACKENDS, CPU_BACKENDS, Batch, naive_sweep, outcome, random_batch

from cliperase_fast.ops import eager, streaming
from cliperase_fast.ops.registry import REGISTRY

N = 150


@pytest.fixture(autouse=True)
def _several_strips(monkeypatch):
    monkeypatch.setattr(streaming, "_STRIP_BYTES_CPU", 1)  # the least height: strips of 64, 64 and 22 rows


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "rm", "kl"])
def test_float32_is_as_good_as_the_rounding_of_the_similarities_allows(backend, name, scale, wanted):
    batch = regime(name, scale, N)
    batch = replace(batch, want_retention=wanted[0]) if wanted[1] else batch.without_teacher()
    truth = outcome(eager.sweep, batch)
    result = outcome(REGISTRY[backend].load("cpu").sweep, batch.to(torch.float32))
    allowed = allowed_errors(batch, truth, torch.float32)
    for key, error in errors(result, truth).items():
        assert error <= allowed[key], (key, error, allowed[key])


def without_norm(batch: Batch) -> Batch:
    """The same similarities from features that are not normalised, at a scale of 1."""
    grown = replace(batch, image=batch.image * batch.scale, scale=torch.ones_like(batch.scale))
    if batch.teacher_image is None:
        return grown
    factor = batch.teacher_scale
    return replace(grown, teacher_image=batch.teacher_image * factor, teacher_scale=torch.ones_like(factor))


# Here a softmax is one entry and the rest vanishes, whatever a rounding of the similarities does: each gradient is as
# good as its own arithmetic, sums of N products. A softmax that does not add up to 1 is off by the last digit of a
# logit, 6e-2 for 1e6.
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("scale", [1e6, 1e7, 1e8, 1e10])
@pytest.mark.parametrize("name", ["random", "half converged"])
@pytest.mark.parametrize("variant", ["retention", "consistency", "groups", "not normalised", "kept"])
def test_large_logits_cost_no_digits_of_the_gradients(backend, scale, name, variant):
    batch = regime(name, scale, N)
    if variant == "retention":
        batch = batch.without_teacher()
    elif variant == "groups":
        batch = replace(batch, group_ids=torch.arange(N) // 2)
    elif variant == "consistency":
        batch = replace(batch, want_retention=False)
    elif variant == "not normalised":
        batch = without_norm(batch).to(torch.float32).to(torch.float64)
    truth = outcome(eager.sweep, batch)
    options = {"keep": "similarities"} if variant == "kept" else {}
    result = outcome(REGISTRY[backend].load("cpu").sweep, batch.to(torch.float32), **options)
    for key in ("image", "text", "scale"):
        largest = getattr(truth, key).abs().max().item()
        assert errors(result, truth)[key] <= N * 2.0**-23 * largest, key


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_the_bound_would_notice_one_minus_p(scale):
    # P_ii - 1 taken from a softmax: what the bound is there for
    batch = regime("converged", scale, N).without_teacher()
    truth = outcome(eager.sweep, batch)
    assert truth.retention < 1e-8
    naive = errors(outcome(naive_sweep, batch.to(torch.float32)), truth)
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    assert all(naive[key] > 1000 * unit[key] for key in naive)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGIMES)
def test_half_precision_features_cost_one_rounding_of_the_gradient(backend, dtype, name, scale):
    # computed in float32, so that only the rounding of the gradients to `dtype` comes on top, and nothing for
    # the losses or the gradient of the (float32) scale; a sweep written in `dtype` has many times that error.
    # Products of bfloat16 on the CPU also round dS, never the similarities.
    batch = regime(name, scale, N).to(dtype).to(torch.float64)
    truth = outcome(eager.sweep, batch)
    result = outcome(REGISTRY[backend].load("cpu").sweep, batch.to(dtype))
    assert result.image.dtype == result.text.dtype == dtype
    assert result.retention.dtype == result.consistency.dtype == torch.float32
    allowed = (native_errors if backend == "native" else allowed_errors)(batch, truth, dtype)
    naive = errors(outcome(naive_sweep, batch.to(dtype)), truth)
    for key, error in errors(result, truth).items():
        margin = allowed[key]
        assert error <= margin, (key, error, margin)
        assert not error > naive[key] + margin  # naive may be NaN: it overflows in float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_are_promoted_and_each_gradient_keeps_its_own(backend):
    batch = random_batch(20, teacher_width=8)
    mixed = replace(
        batch,
        image=batch.image.to(torch.bfloat16),
        text=batch.text.to(torch.float32),
        teacher_image=batch.teacher_image.to(torch.float16),
    )
    exact = outcome(eager.sweep, mixed.to(torch.float64))
    result = outcome(REGISTRY[backend].load("cpu").sweep, mixed)
    assert (result.image.dtype, result.text.dtype, result.retention.dtype) == (
        torch.bfloat16, torch.float32, torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(result.retention, exact.retention)
    torch.testing.assert_close(result.text.double(), exact.text, rtol=1e-6, atol=1e-8)
