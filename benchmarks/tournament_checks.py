"""What the rounds of the tournament share: an entry, and the comparison of a sweep with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.spec import SimilarityInputs, Sweep

_LARGEST_ERROR = 1e-2  # relative, of bfloat16 gradients

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One measurement. needs: key of the entry that must have passed. missing: why it cannot run here."""

    key: str
    run: Callable[[], Row]
    needs: str | None = None
    missing: str | None = None


def outcome(sweep: Sweep, inputs: SimilarityInputs, dtype: torch.dtype) -> list[Tensor]:
    """Losses and gradients of RM + CM on the CPU, computed from the inputs in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)

    def converted(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(wide if tensor.ndim == 0 else dtype)

    names = ("image", "text", "scale", "teacher_image", "teacher_text", "teacher_scale")
    fields: dict[str, Any] = {field: converted(getattr(inputs, field)) for field in names}
    inputs = replace(inputs, **fields)
    leaves = [tensor.requires_grad_() for tensor in (inputs.image, inputs.text, inputs.scale)]
    retention, consistency = sweep(inputs)
    gradients = torch.autograd.grad(retention + 3 * consistency, leaves)
    return [tensor.detach().cpu() for tensor in (retention, consistency, *gradients)]


def worst_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest relative error. Raises ArithmeticError if it is too large."""
    worst = max(
        ((ours.double().cpu() - exact.cpu()).norm() / exact.cpu().norm()).item()
        for ours, exact in zip(found, truth, strict=True)
    )
    if not worst <= _LARGEST_ERROR:
        raise ArithmeticError(f"off by {worst:.1e}, more than {_LARGEST_ERROR:.0e}")
    return worst
