"""The losses that stand in for open_clip's and transformers' do not depend on torch's defaults."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_defaults import DEFAULTS, assert_independent
from transformers import CLIPConfig, CLIPModel

import cliperase_fast as cf

N, WIDTH = 9, 16


def features(seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return F.normalize(torch.randn(N, WIDTH, generator=generator, dtype=torch.float32, device="cpu"), dim=1)


FEATURES = [features(seed) for seed in range(4)]
SCALE, BIAS = torch.tensor(14.0), torch.tensor(-5.0)
LOSSES = {
    "clip": lambda image, text, scale: cf.ClipLoss()(image, text, scale),
    "distill": lambda image, text, scale: sum(cf.DistillClipLoss()(image, text, scale, *FEATURES[2:], SCALE)),
    "siglip": lambda image, text, scale: cf.SigLipLoss()(image, text, scale, BIAS),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_open_clip_and_their_gradients(name, default):
    def run() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (*FEATURES[:2], SCALE)]
        loss = LOSSES[name](*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert_independent(default, run)


@pytest.mark.parametrize("default", ["float64", "bfloat16", "float16"])
def test_the_patched_model_of_transformers(default):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99, "max_position_embeddings": 8}
    config = CLIPConfig(
        text_config=text, vision_config={**shape, "image_size": 8, "patch_size": 4}, projection_dim=WIDTH
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    batch = {"input_ids": torch.randint(1, 98, (N, 8)), "pixel_values": torch.randn(N, 3, 8, 8)}
    batch["input_ids"][:, -1] = 99

    def run() -> list[Tensor]:
        with cf.patch_transformers_clip():
            loss = model(**batch, return_loss=True).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    assert_independent(default, run)
