"""Frozen layers on two ranks, with and without ZeRO: each image passes them once over all ranks, with equal losses."""

from __future__ import annotations

import numpy as np
import pytest
from runs import run, told

CHANGES = {"trainable": "last:1", "epochs": 3, "evaluate_every": 3, "epoch_over": "retain"}


def _count_images(rank: int, changes: dict) -> tuple[dict, int]:
    """Run; also return how many images passed the first layers on this rank in training mode."""
    from open_clip.transformer import VisionTransformer

    counts, embed = [0], VisionTransformer._embeds

    def counting(self, x):
        counts[0] += len(x) if self.training else 0
        return embed(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "_embeds", counting)
        result = run(**CHANGES, **changes)
    return told(result), counts[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"deepspeed": "zero2", "grad_cache_chunk": 2}, {"deepspeed": "zero3", "precision": "bf16"}],
    ids=["ranks", "stage 2, in chunks", "stage 3, bf16"],
)
def test_each_image_passes_the_frozen_layers_once_over_all_ranks(two, changes):
    (found, first), (_, second) = two.run(_count_images, changes)
    (expected, every_step), _ = two.run(_count_images, {**changes, "image_cache_mib": 0})
    steps = len(expected["losses"])
    assert steps * 5 < every_step, "without room every step computes them"
    assert first + second < every_step, f"{first} and {second} images"
    assert np.allclose(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    assert np.allclose(found["features"], expected["features"], atol=1e-3)
