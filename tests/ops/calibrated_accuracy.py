"""Float64 batches of the calibrated loss in which cancellation bites, and the error that rounding allows there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accuracy_cases import off_diagonal_mass, regime
from calibrated_cases import batch
from torch import Tensor

LAMBDAS = {"retain": 1.0, "forget": 3.0, "consistency": 3.0, "anchor": 30.0}
REGIMES = ("random", "converged", "anti-aligned", "collapsed", "collapsed teacher", "half converged", "equal")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each to `tolerance` of its norm."""
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm().item()
        assert error <= tolerance * (1e-3 + value.double().norm().item()), (name, error)


class Entries(NamedTuple):
    """Of each entry, [n, n]: what bounds its part of dS, the factor of C - C* in H, and |C - C*|."""

    mass: Tensor
    pull: Tensor
    difference: Tensor


def entries(b: dict) -> Entries:
    mask, ids, n = b["forget_mask"], b["group_ids"], len(b["forget_mask"])
    s, t = b["logit_scale"], b["teacher_logit_scale"]
    cosines, teacher = b["image_features"] @ b["text_features"].T, b["teacher_image"] @ b["teacher_text"].T
    edited = mask & (ids[:, None] == ids)
    target = torch.where(edited, (b["background_image"][:, None] + b["background_text"]) / 2, teacher)
    mass = torch.zeros(n, n, dtype=torch.float64)
    for similarity in (s * cosines, t * target):
        of, own = off_diagonal_mass(similarity)
        mass += LAMBDAS["consistency"] / n * (of + own.diag())
    if not mask.all():
        kept = torch.nonzero(~mask)[:, 0]
        of, own = off_diagonal_mass(s * cosines[kept][:, kept])
        mass[kept[:, None], kept] += LAMBDAS["retain"] / len(kept) * (of + own.diag())
    pull = torch.where(
        edited, 2 * LAMBDAS["forget"] / edited.sum().clamp(min=1), 2 * LAMBDAS["anchor"] / (~edited).sum().clamp(min=1)
    )
    return Entries(mass, pull, (cosines - target).abs())


def unit(b: dict, expected: dict[str, Tensor], eps: float) -> dict[str, float]:
    """What a rounding of the cosines and similarities may do to loss and gradients, as in `accuracy_cases.py`."""
    mass, pull, difference = entries(b)
    s, cosines = b["logit_scale"], b["image_features"] @ b["text_features"].T
    rounding = eps * (1 + s + b["teacher_logit_scale"])
    error = rounding * s * mass + 3 * eps * pull * (1 + difference)
    worst = max(error.sum(0).max().item(), error.sum(1).max().item())
    of_loss = rounding * mass + 3 * eps * pull * (eps + difference)
    return {
        "total": of_loss.sum().item() + eps * expected["total"].abs().item(),
        "d image_features": worst,
        "d text_features": worst,
        "d logit_scale": (rounding * mass * cosines.abs()).sum().item(),
    }


def rounding_of_ds(b: dict, dtype: torch.dtype) -> float:
    """What rounding dS and the pull to `dtype`, a half precision, may do to the gradients of features."""
    mass, pull, difference = entries(b)
    of = b["logit_scale"] * mass + pull * difference
    return torch.finfo(dtype).eps / 2 * max(of.sum(0).max().item(), of.sum(1).max().item())


def in_regime(name: str, scale: float, forget: str, n: int = 150) -> dict:
    """A float64 batch of float32 numbers. "equal": the student is the teacher."""
    b, of = batch(n, forget=forget), regime("converged" if name == "equal" else name, scale, n)
    teacher = (of.image, of.text) if name == "equal" else (of.teacher_image, of.teacher_text)
    numbers = {
        "image_features": of.image, "text_features": of.text, "teacher_image": teacher[0], "teacher_text": teacher[1],
        "logit_scale": of.scale, "teacher_logit_scale": of.teacher_scale,
        "background_image": b["background_image"], "background_text": b["background_text"],
    }  # fmt: skip
    return {**b, **{key: value.float().double() for key, value in numbers.items()}}
