"""Rounding: each backend in float32 and the half precisions against float64, where cancellation bites.

The unit of the allowed error is what one rounding of the similarities can do. Each S_ij = s <I_i, T_j> has an
error of about eps (1 + s), so a gradient s Σ_j dS_ij T_j cannot be better than eps (1 + s) times its mass
s Σ_j |dS_ij| (worst row or column), nor a loss better than eps (1 + s) Σ_ij |dS_ij| plus eps times itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sweep_cases import BACKENDS, Batch, Outcome, naive_sweep, outcome, random_batch
from torch import Tensor

from cliperase_fast.ops import reference, streaming
from cliperase_fast.ops.dispatch import REGISTRY

N = 150
UNDERFLOW = 1e-36  # float32 ends near 1e-38; what is smaller comes out as 0


@pytest.fixture(autouse=True)
def _several_strips(monkeypatch):
    monkeypatch.setattr(streaming, "_STRIP_BYTES_CPU", 1)  # the least height: strips of 64, 64 and 22 rows


def _perturbed(tensor: Tensor, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return F.normalize(tensor + noise * random / tensor.shape[1] ** 0.5, dim=1)


def regime(name: str, scale: float) -> Batch:
    """float64 batches of float32 numbers, so that the inputs carry no rounding of their own."""
    batch = random_batch(N, width=64, teacher_width=64, scale=scale, teacher_scale=scale)
    if name == "random":
        pass
    elif name == "converged":  # nearly perfect pairs in student and teacher
        text = _perturbed(batch.image, 0.05, 1)
        teacher = _perturbed(batch.image, 0.1, 2), _perturbed(batch.image, 0.1, 3)
        batch = replace(batch, text=text, teacher_image=teacher[0], teacher_text=teacher[1])
    elif name == "anti-aligned":  # every pair points apart
        batch = replace(batch, text=_perturbed(-batch.image, 0.05, 1))
    elif name == "collapsed":  # all rows equal; the teacher is not
        batch = replace(batch, image=batch.image[:1].repeat(N, 1), text=batch.text[:1].repeat(N, 1))
    elif name == "collapsed teacher":
        teacher = batch.teacher_image[:1].repeat(N, 1), batch.teacher_text[:1].repeat(N, 1)
        batch = replace(batch, teacher_image=teacher[0], teacher_text=teacher[1])
    elif name == "half converged":  # some rows perfect, some hopeless, in one batch
        sign = torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0).double()[:, None]
        batch = replace(batch, text=_perturbed(batch.image * sign, 0.05, 1))
    else:
        raise ValueError(name)
    return batch.to(torch.float32).to(torch.float64)


REGIMES = ("random", "converged", "anti-aligned", "collapsed", "collapsed teacher", "half converged")


def _off_diagonal_mass(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Row plus column softmax off the diagonal, [N, N], and 1 - P_ii of both, [N]; nothing cancels."""
    lowest = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -torch.inf)
    mass = (lowest - similarity.logsumexp(1, keepdim=True)).exp() + (lowest - similarity.logsumexp(0)).exp()
    return mass, (mass.sum(1) + mass.sum(0)) / 2


def rounding_unit(batch: Batch, truth: Outcome, eps: float) -> dict[str, float]:
    """What a rounding of eps in the similarities may do to each result; see the head of this file."""
    s = batch.scale.item()
    similarity = s * batch.image @ batch.text.T
    mass, rest = _off_diagonal_mass(similarity)
    if batch.want_consistency:
        teacher_mass, teacher_rest = _off_diagonal_mass(
            batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T
        )
        mass, rest = mass + teacher_mass, rest + teacher_rest
    mass = (mass + rest.diag()) / N
    worst = max(mass.sum(0).max().item(), mass.sum(1).max().item())
    of_scale = (mass * (batch.image @ batch.text.T).abs()).sum().item()
    unit = eps * (1 + s + (batch.teacher_scale.item() if batch.want_consistency else 0))
    loss = unit * mass.sum().item() + eps * (truth.retention + truth.consistency).abs().item()
    return {
        "loss": loss,
        "image": unit * s * worst,
        "text": unit * s * worst,
        "scale": unit * max(of_scale, 1e-300),
    }


def errors(result: Outcome, truth: Outcome) -> dict[str, float]:
    pairs = {
        "loss": (
            result.retention.double() + result.consistency.double(),
            truth.retention + truth.consistency,
        ),
        "image": (result.image, truth.image),
        "text": (result.text, truth.text),
        "scale": (result.scale, truth.scale),
    }
    return {name: (a.double() - b).abs().max().item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "rm", "kl"])
def test_float32_is_as_good_as_the_rounding_of_the_similarities_allows(backend, name, scale, wanted):
    batch = regime(name, scale)
    batch = replace(batch, want_retention=wanted[0]) if wanted[1] else batch.without_teacher()
    truth = outcome(reference.sweep, batch)
    result = outcome(REGISTRY[backend].load(), batch.to(torch.float32))
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    for key, error in errors(result, truth).items():
        assert error <= 2 * unit[key] + UNDERFLOW, (key, error, unit[key])


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_the_bound_would_notice_one_minus_p(scale):
    # P_ii - 1 taken from a softmax: what the bound is there for
    batch = regime("converged", scale).without_teacher()
    truth = outcome(reference.sweep, batch)
    assert truth.retention < 1e-8
    naive = errors(outcome(naive_sweep, batch.to(torch.float32)), truth)
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    assert all(naive[key] > 1000 * unit[key] for key in naive)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGIMES)
def test_half_precision_features_cost_one_rounding_of_the_gradient(backend, dtype, name, scale):
    # computed in float32, so that only the rounding of the gradients to `dtype` comes on top, and nothing for
    # the losses or the gradient of the (float32) scale; a sweep written in `dtype` has many times that error
    batch = regime(name, scale).to(dtype).to(torch.float64)
    truth = outcome(reference.sweep, batch)
    result = outcome(REGISTRY[backend].load(), batch.to(dtype))
    assert result.image.dtype == result.text.dtype == dtype
    assert result.retention.dtype == result.consistency.dtype == torch.float32
    unit = rounding_unit(batch, truth, torch.finfo(torch.float32).eps)
    naive = errors(outcome(naive_sweep, batch.to(dtype)), truth)
    for key, error in errors(result, truth).items():
        margin = 2 * unit[key] + UNDERFLOW
        if key in ("image", "text"):
            largest = getattr(truth, key).abs().max().item()
            margin += torch.finfo(dtype).eps / 2 * largest + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
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
    exact = outcome(reference.sweep, mixed.to(torch.float64))
    result = outcome(REGISTRY[backend].load(), mixed)
    assert (result.image.dtype, result.text.dtype, result.retention.dtype) == (
        torch.bfloat16, torch.float32, torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(result.retention, exact.retention)
    torch.testing.assert_close(result.text.double(), exact.text, rtol=1e-6, atol=1e-8)
