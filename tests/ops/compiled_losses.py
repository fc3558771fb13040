"""The losses under torch.compile with its default backend, inductor, for the tests that do so."""

from __future__ import annotations

import torch
from loss_cases import gradients, losses
from torch import Tensor


def weighted(backend: str, names: tuple[str, ...], dtype: torch.dtype):
    """One loss of several, in one graph: compiling is what takes the time. Weights that differ tell them apart."""
    chosen = losses(backend, dtype)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        parts = [chosen[name](image, text, scale) for name in names]
        return torch.stack([(1 + place) ** 0.5 * part for place, part in enumerate(parts)]).sum()

    return total


def assert_compiled_right(backend: str, names: tuple[str, ...]) -> None:
    """Against the float64 reference, which is not compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(weighted(backend, names, torch.float32), fullgraph=True)
    expected = gradients(weighted("eager", names, torch.float64), torch.float64)
    for ours, exact in zip(gradients(compiled), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
