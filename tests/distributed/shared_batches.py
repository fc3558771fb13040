"""Spread batches over ranks; compute losses and gradients of a rank's part and of the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.functional import cliperase_loss

STUDENT = ("forget_image", "forget_text", "retain_image", "retain_text", "logit_scale")
PER_PAIR = (*STUDENT[:4], "teacher_image", "teacher_text")
# ranks -> forget pairs of each, retain pairs of each
EVEN = {2: ([3, 3], [8, 8]), 4: ([2, 2, 2, 2], [5, 5, 5, 5])}
UNEVEN = {2: ([5, 1], [3, 13]), 4: ([2, 0, 4, 1], [7, 2, 0, 8])}


def features(n: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def whole_batch(m: int, n: int, dtype: torch.dtype, width: int = 12, teacher_width: int = 12) -> dict[str, Any]:
    """Arguments of `cliperase_loss` for m pairs to forget and n to retain."""
    widths = (width, width, width, width, teacher_width, teacher_width)
    rows = (m, m, n, n, n, n)
    batch: dict[str, Any] = {
        name: features(count, wide, seed, dtype)
        for seed, (name, count, wide) in enumerate(zip(PER_PAIR, rows, widths, strict=True))
    }
    return {
        **batch,
        "logit_scale": torch.tensor(14.0, dtype=torch.promote_types(dtype, torch.float32)),
        "teacher_logit_scale": torch.tensor(9.0, dtype=torch.promote_types(dtype, torch.float32)),
    }


def groups(n: int) -> Tensor:
    return torch.arange(n) * 7 % max(1, n // 3)


def part(batch: dict[str, Any], rank: int, forget_sizes: list[int], retain_sizes: list[int]) -> dict[str, Any]:
    """The rows of one rank."""
    own = dict(batch)
    for name in (*PER_PAIR, "group_ids"):
        if own.get(name) is not None:
            sizes = forget_sizes if name.startswith("forget") else retain_sizes
            own[name] = own[name].split(sizes)[rank].clone()
    return own


def step(batch: dict[str, Any], weights: tuple[float, ...] = (1, 0, 0, 0), **options: Any) -> dict[str, Tensor]:
    """The terms, and the gradients of their weighted sum."""
    leaves = {name: batch[name].clone().requires_grad_() for name in STUDENT}
    terms = cliperase_loss(**{**batch, **leaves}, **options)
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True) if weight)
    total.backward()
    found = {name: term.detach() for name, term in terms._asdict().items()}
    return {**found, **{f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def sharded_step(
    rank: int,
    batch: dict[str, Any],
    forget_sizes: list[int],
    retain_sizes: list[int],
    weights: tuple[float, ...],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    own = part(batch, rank, forget_sizes, retain_sizes)
    return step(own, weights, process_group=dist.group.WORLD, **options)


def as_one_process(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine as one process would: average scales; concatenate rows, divided by the number of ranks."""
    together = {}
    for name in parts[0]:
        found = [each[name] for each in parts]
        if not name.startswith("d "):
            assert all(torch.equal(term, found[0]) for term in found), name
            together[name] = found[0]
        elif name == "d logit_scale":
            together[name] = torch.stack(found).mean(0)
        else:
            together[name] = torch.cat(found) / len(parts)
    return together


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor to `tolerance` of its own norm."""
    assert ours.keys() == exact.keys()
    for name, found in ours.items():
        error = (found.double() - exact[name].double()).norm().item()
        assert error <= tolerance * exact[name].double().norm().item() + 1e-14, (name, error, exact[name].norm())
