"""Multiply features on a GPU, with float32 results and the user's tf32 setting, for the streamed backends."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 16  # elements of a row and of a step from row to row, and bytes of an address


def as_pair(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype, with rows that GPUs copy in pieces of 16 bytes.

    Rows are contiguous and begin at multiples of 16 bytes; the width is a multiple of 16, as Triton takes no other as
    aligned. Features that are not so already are copied, with zeros beyond their width.
    """
    dtype = torch.promote_types(image.dtype, text.dtype)
    return _aligned(image.to(dtype)), _aligned(text.to(dtype))


def _aligned(features: Tensor) -> Tensor:
    rows, width = features.shape
    padding = -width % _ALIGNMENT
    steps_fit = features.stride(1) == 1 and features.stride(0) % _ALIGNMENT == 0
    if padding == 0 and steps_fit and features.data_ptr() % _ALIGNMENT == 0:
        return features
    copy = features.new_empty(rows, width + padding)
    copy[:, :width] = features
    copy[:, width:] = 0
    return copy


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


def batched_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Compute left @ right in float32 into `out`, for several products at once: [b, n, D] @ [b, D, m] -> [b, n, m]."""
    if left.dtype == torch.float32:
        torch.bmm(left, right, out=out)
    elif left.is_cuda:
        torch.bmm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.bmm(left.float(), right.float(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in place, accumulated in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
