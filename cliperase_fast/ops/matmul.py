"""Multiply features on a GPU, with float32 results and the user's tf32 setting, for the streamed backends."""

from __future__ import annotations

import torch
from torch import Tensor


def as_pair(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype, with contiguous rows."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    return _contiguous_rows(image.to(dtype)), _contiguous_rows(text.to(dtype))


def _contiguous_rows(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def float32_precision() -> str:
    """Return the precision of torch's own float32 products: "ieee", or "tf32" if the user has enabled it."""
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked == "none":
        asked = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if asked == "tf32" else "ieee"


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute left @ right in float32, into `out` if given."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, accumulated in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
