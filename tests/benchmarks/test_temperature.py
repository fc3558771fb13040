"""One model with several logit scales: what is changed, and the table."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from cliperase_fast.benchmarks import temperature


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_image(self, pixels):
        return 5 * pixels

    def encode_text(self, tokens):
        return 3 * tokens


def test_closer_cosines_leave_the_predictions_as_they_are():
    torch.manual_seed(0)
    images, captions = torch.randn(7, 4), torch.randn(5, 4)
    own = normalize(images, dim=-1) @ normalize(captions, dim=-1).T
    scale = Towers().logit_scale.exp().item()
    model = temperature.Closer(Towers(), 100.0)
    image_features, text_features = model.encode_image(images), model.encode_text(captions)
    for features in (image_features, text_features):
        assert features.norm(dim=-1).tolist() == pytest.approx([1.0] * len(features), abs=1e-5)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)
    closer = image_features @ text_features.T
    assert torch.allclose(closer, own * scale / 100 + temperature.UNRELATED, atol=1e-5)


def one(seed, scale, given, association, found):
    scores = {"zero_shot_top1": 1.0, "text_to_image_r@1": 1.0, "association": 0.9, "retain_top1": 0.95}
    after = {**scores, "zero_shot_top1": 0.0, "text_to_image_r@1": found, "association": association}
    return {
        "seed": seed, "logit_scale": scale, "given": given, "pairs": 20, "background": 0.1, "margin": 0.05,
        "target_reached": True, "divergence": 0.002, "before": scores, "after": {**after, "retain_top1": 0.94},
    }  # fmt: skip


def test_a_row_has_the_means_over_the_originals_of_a_logit_scale():
    runs = [one(0, 20.0, False, 0.2, 0.0), one(10, 24.0, False, 0.4, 0.5), one(0, 100.0, True, 0.1, 0.0)]
    (head, rows), said = temperature.parts({"runs": runs})
    assert rows[0] == (
        "22, as trained", "0.900", "0.100", "0.050", "0.300", "0.0 %", "25.0 %", "94.0 % (-1.0)", "0.002", "2 of 2"
    )  # fmt: skip
    assert rows[1][0] == "100" and rows[1][-1] == "1 of 1" and len(head) == len(rows[0])
    assert said == "Means over 2 originals, 20 test pairs to forget."
