"""The promise of the streamed sweeps: forward and backward in 5 % of one N x N matrix, plus what `keep` may keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from processes import apart, peak
from torch import Tensor

from cliperase_fast.functional import cliperase_loss

N, WIDTH = 16_384, 64
ALLOWED = 0.05 * 4 * N * N  # bytes


def extra_memory(backend: str, keep: str, n: int) -> int:
    """Bytes at the peak beyond inputs and gradients."""

    def batch(n: int) -> tuple[Tensor, ...]:
        features = [F.normalize(torch.randn(n, WIDTH), dim=1) for _ in range(4)]
        return features[0].requires_grad_(), features[1].requires_grad_(), features[2], features[3]

    def step(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, ids: Tensor) -> None:
        cliperase_loss(
            image[:8], text[:8], image, text, teacher_image, teacher_text, 50.0, 50.0,
            group_ids=ids, backend=backend, keep=keep,
        ).total.backward()  # fmt: skip

    step(*batch(300), torch.arange(300) // 2)  # loads what is loaded on first use
    inputs, ids = batch(n), torch.arange(n) // 2
    extra = peak(lambda: step(*inputs, ids))
    return extra - sum(tensor.grad.nbytes for tensor in inputs[:2])


def test_forward_and_backward_stay_under_a_twentieth_of_one_similarity_matrix():
    extra = apart(extra_memory, "native", "nothing", N)
    assert 0 < extra < ALLOWED, f"{extra / 2**20:.1f} MiB"


@pytest.mark.parametrize("pairs", [N // 2, pytest.param(N, marks=pytest.mark.long)])
def test_pure_pytorch_does_so_too(pairs):
    extra = apart(extra_memory, "torch", "nothing", pairs)
    assert 0 < extra < ALLOWED, f"{extra / 2**20:.1f} MiB"


def test_what_is_kept_stays_within_its_budget():
    extra = apart(extra_memory, "native", "auto", N, CLIPERASE_KEEP_MIB="128")
    assert 100 << 20 < extra < (128 << 20) + ALLOWED, f"{extra / 2**20:.1f} MiB"
