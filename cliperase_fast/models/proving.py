"""Whether two models compute the same features, on random input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cliperase_fast.models.adapters.base import ClipAdapter

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def tolerance(module: nn.Module) -> float:
    """How far normalised features may differ for rounding alone."""
    return _TOLERANCES.get(next(module.parameters()).dtype, 3e-2)


@torch.no_grad()
def feature_difference(one: ClipAdapter, other: ClipAdapter) -> float | None:
    """Largest difference of a normalised feature; None where no input is known that suits both."""
    probe = one.probe()
    if probe is None:
        return None
    pixels, tokens = probe
    worst = 0.0
    with evaluating(one.module), evaluating(other.module):
        for name, inputs in (("encode_image", pixels), ("encode_text", tokens)):
            found = [getattr(adapter, name)(inputs.to(adapter.device)).double().cpu() for adapter in (one, other)]
            worst = max(worst, (found[0] - found[1]).abs().max().item())
    return worst


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each part's own mode comes back afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def random_pixels(image_size: int | tuple[int, int], like: Tensor, channels: int = 3) -> Tensor:  # [2, 3, H, W]
    generator = torch.Generator("cpu").manual_seed(0)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float32, device="cpu").to(like)
