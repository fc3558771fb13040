"""Matrix products of features on a GPU as the streamed backends want them: float32 results, the user's tf32 setting."""

from __future__ import annotations

import torch
from torch import Tensor


def as_pair(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, rows contiguous."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    return _contiguous_rows(image.to(dtype)), _contiguous_rows(text.to(dtype))


def _contiguous_rows(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def float32_precision() -> str:
    """What torch's own float32 products use: "ieee", or "tf32" where the user has asked for it."""
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked == "none":
        asked = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if asked == "tf32" else "ieee"


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32, into `out` where there is one."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
