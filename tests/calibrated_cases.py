"""Batches for calibrated forgetting, and its terms written a second time, entry by entry from the definition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.functional import CalibratedTerms, calibrated_loss

STUDENT = ("image_features", "text_features", "logit_scale")
TERMS = ("retain", "forget", "consistency", "anchor")


def features(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def masks(n: int) -> dict[str, Tensor]:
    """Which of n pairs are to be forgotten."""
    some = torch.arange(n, dtype=torch.int64, device="cpu") * 5 % 7 < 2
    return {"some": some, "none": torch.zeros_like(some), "all": torch.ones_like(some)}


def batch(
    n: int = 9,
    width: int = 6,
    teacher_width: int = 4,
    dtype: torch.dtype = torch.float64,
    forget: str = "some",
    groups: bool = True,
    background: bool = True,
) -> dict[str, Any]:
    """Arguments of `calibrated_loss`. The concepts of forget pairs have retain pairs too."""
    scale_dtype = torch.promote_types(dtype, torch.float32)
    places = torch.arange(n, dtype=torch.int64, device="cpu")
    return {
        "image_features": features(n, width, 1, dtype),
        "text_features": features(n, width, 2, dtype),
        "teacher_image": features(n, teacher_width, 3, dtype),
        "teacher_text": features(n, teacher_width, 4, dtype),
        "logit_scale": torch.tensor(7.0, dtype=scale_dtype),
        "teacher_logit_scale": torch.tensor(5.0, dtype=scale_dtype),
        "forget_mask": masks(n)[forget],
        "group_ids": places * 3 % max(1, n // 3) - 1 if groups else None,
        "background_image": 0.3 * features(1, n, 5, scale_dtype)[0] if background else None,
        "background_text": 0.3 * features(1, n, 6, scale_dtype)[0] if background else None,
    }


def orthogonal(n: int, groups: str) -> dict[str, Any]:
    """A batch to forget whose cosines are all 0, as are its levels, where the teacher's pairs were close.

    groups: "none" for one concept, "own" for one of each pair.
    """
    zeros = torch.zeros(n, 16, dtype=torch.float32, device="cpu")
    text = features(n, 16, 3, torch.float32)
    image = F.normalize(text + 0.2 * features(n, 16, 4, torch.float32), dim=1)
    return {
        "image_features": torch.cat((features(n, 16, 1, torch.float32), zeros), 1),
        "text_features": torch.cat((zeros, features(n, 16, 2, torch.float32)), 1),
        "teacher_image": image if groups == "none" else torch.cat((image, zeros), 1),
        "teacher_text": text if groups == "none" else torch.cat((zeros, text), 1),
        "logit_scale": torch.tensor(100.0, dtype=torch.float32),
        "teacher_logit_scale": torch.tensor(100.0, dtype=torch.float32),
        "forget_mask": masks(n)["all"],
        "group_ids": None if groups == "none" else torch.arange(n, dtype=torch.int64, device="cpu"),
    }


def expected_terms(b: dict[str, Any]) -> dict[str, Tensor]:
    """The four terms by sums over the sets of the definition."""
    image, text, s, t = b["image_features"], b["text_features"], b["logit_scale"], b["teacher_logit_scale"]
    n, forget = len(image), b["forget_mask"].tolist()
    keep = [i for i in range(n) if not forget[i]]
    zero = (image.sum() + text.sum() + s) * 0

    def one_concept(i: int, j: int) -> bool:
        ids = b["group_ids"]
        return bool(forget[i] and forget[j]) if ids is None else bool(ids[i] == ids[j])

    teacher = b["teacher_image"] @ b["teacher_text"].T
    of_image, of_text = b["background_image"], b["background_text"]
    if of_image is None:
        mean = b["teacher_text"][keep].mean(0) if keep else 0 * b["teacher_text"][0]
        of_image = b["teacher_image"] @ mean
    if of_text is None:
        mean = b["teacher_image"][keep].mean(0) if keep else 0 * b["teacher_image"][0]
        of_text = b["teacher_text"] @ mean
    edited = [(i, j) for j in range(n) if forget[j] for i in range(n) if one_concept(i, j)]
    others = sorted({(i, j) for i in range(n) for j in range(n)} - set(edited))
    target = teacher.clone()
    for i, j in edited:
        target[i, j] = (of_image[i] + of_text[j]) / 2

    cosines = image @ text.T
    retain = zero
    for i in keep:
        fellows = [j for j in keep if j == i or b["group_ids"] is None or not one_concept(i, j)]
        for logits in (s * cosines[i, fellows], s * cosines[fellows, i]):
            retain = retain - 0.5 * (s * cosines[i, i] - logits.logsumexp(0)) / len(keep)

    def divergence(dim: int) -> Tensor:
        p, q = F.log_softmax(t * target, dim), F.log_softmax(s * cosines, dim)
        return (p.exp() * (p - q)).sum(dim).mean()

    def mean_of(entries: list[tuple[int, int]], term: Any) -> Tensor:
        return zero + sum(term(cosines[i, j] - target[i, j]) for i, j in entries) / max(1, len(entries))

    return {
        "retain": retain,
        "forget": mean_of(edited, lambda d: d.clamp(min=0) ** 2),
        "consistency": divergence(0) + divergence(1),
        "anchor": mean_of(others, lambda d: d**2),
    }


def step(b: dict[str, Any], weights: tuple[float, ...] = (1, 0, 0, 0, 0), **options: Any) -> dict[str, Tensor]:
    """The terms, and the gradients of their weighted sum (total, retain, forget, consistency, anchor)."""
    leaves = {name: b[name].detach().clone().requires_grad_() for name in STUDENT}
    terms = calibrated_loss(**{**b, **leaves}, **options)
    assert isinstance(terms, CalibratedTerms)
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
    total.backward()
    found = {name: term.detach() for name, term in terms._asdict().items()}
    for name, leaf in leaves.items():
        found[f"d {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def exact(b: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in b.items()}
