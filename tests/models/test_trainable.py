"""Which parameters are trained: all, a tower, the last K blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import MODELS, RESNET, TIMM, TIMM_CONVOLUTION, TwoTowers, tiny_clip, tiny_open_clip
from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model, set_trainable


def chosen(model: nn.Module, spec: str) -> set[str]:
    adapter = load_model(model)
    pairs = set_trainable(adapter, spec)
    names = [name for name, _ in pairs]
    in_order = [name for name, parameter in adapter.module.named_parameters() if parameter.requires_grad]
    assert names == in_order
    assert all(parameter is adapter.module.get_parameter(name) for name, parameter in pairs)
    return set(names)


@pytest.mark.parametrize("kind", MODELS)
def test_the_towers_and_the_scale_make_up_all(kind: str) -> None:
    model = MODELS[kind]()
    everything = {name for name, _ in model.named_parameters()}
    image, text = chosen(model, "image"), chosen(model, "text")
    assert image and text and not image & text
    assert everything == image | text | {"logit_scale"}
    assert chosen(model, "all") == everything


@pytest.mark.parametrize("kind", MODELS)
def test_training_a_tower_changes_its_features_only(kind: str) -> None:
    model = MODELS[kind]()
    adapter = load_model(model)
    for tower in ("image", "text"):
        names = {name for name, _ in set_trainable(adapter, tower)}
        assert all(adapter.tower(name) == tower for name in names)
        features = adapter.encode_image(_pixels(kind)), adapter.encode_text(_tokens(kind, adapter))
        assert features[0].requires_grad == (tower == "image")
        assert features[1].requires_grad == (tower == "text")


def _pixels(kind: str) -> torch.Tensor:
    size = {"resnet": 32, "timm": 160, "generic": 8}.get(kind, 16)
    return torch.randn(2, 3, size, size)


def _tokens(kind: str, adapter: Any) -> torch.Tensor:
    return torch.randint(0, adapter.vocabulary_size or 50, (2, adapter.context_length or 5))


def test_unused_parameters_are_never_trained() -> None:
    model = tiny_open_clip(custom_text=True, init_logit_bias=-10.0)
    assert "logit_bias" not in chosen(model, "all")
    assert not model.logit_bias.requires_grad


def test_the_last_blocks_of_an_open_clip_model() -> None:
    blocks = {f"{tower}transformer.resblocks.1." for tower in ("visual.", "")}
    names = chosen(tiny_open_clip(), "last:1")
    inside = {name for name in names if any(name.startswith(block) for block in blocks)}
    assert len(inside) == 2 * 12
    assert names - inside == {
        "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
        "ln_final.weight", "ln_final.bias", "text_projection",
    }  # fmt: skip


def test_the_last_blocks_of_a_custom_text_model() -> None:
    names = chosen(tiny_open_clip(custom_text=True), "last:2")
    outside = {name for name in names if "resblocks" not in name}
    assert outside == {
        "visual.ln_post.weight", "visual.ln_post.bias", "visual.proj",
        "text.ln_final.weight", "text.ln_final.bias", "text.text_projection",
    }  # fmt: skip
    assert len(names - outside) == 2 * 2 * 12  # towers, blocks, parameters of a block


def test_the_last_blocks_of_a_resnet_are_its_last_stages() -> None:
    names = chosen(tiny_open_clip(**RESNET), "last:1")
    assert {name.split(".")[1] for name in names if name.startswith("visual.")} == {"layer4", "attnpool"}


def test_the_last_blocks_of_a_timm_trunk() -> None:
    model = tiny_open_clip(**TIMM)
    count = len(model.visual.trunk.blocks)
    names = chosen(model, "last:1")
    image = {name for name in names if name.startswith("visual.") and f"blocks.{count - 1}." not in name}
    assert {name.rsplit(".", 1)[0] for name in image} <= {
        "visual.head.proj",
        "visual.trunk.norm",
        "visual.trunk.fc_norm",
    }
    assert "visual.head.proj.weight" in image


def test_the_last_stages_of_an_efficientnet_come_with_the_layers_behind_them() -> None:
    model = tiny_open_clip(**TIMM_CONVOLUTION)
    last = f"visual.trunk.blocks.{len(model.visual.trunk.blocks) - 1}."
    image = {name for name in chosen(model, "last:1") if name.startswith("visual.")}
    behind = {name.rsplit(".", 1)[0] for name in image if not name.startswith(last)}
    assert behind == {"visual.trunk.conv_head", "visual.trunk.bn2", "visual.head.proj"}
    assert behind < {name.rsplit(".", 1)[0] for name in image}


def test_the_last_blocks_of_a_transformers_model() -> None:
    names = chosen(tiny_clip(), "last:1")
    outside = {name for name in names if ".layers.1." not in name}
    assert outside == {
        "vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias", "visual_projection.weight",
        "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias", "text_projection.weight",
    }  # fmt: skip
    assert len(names - outside) == 2 * 16


def test_the_last_blocks_of_a_generic_model() -> None:
    modules = {
        "image_blocks.2.norm", "image_blocks.2.linear", "image_norm",
        "text_blocks.1.norm", "text_blocks.1.linear", "text_proj",
    }  # fmt: skip
    assert chosen(TwoTowers(), "last:1") == {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}


def test_more_blocks_than_there_are_is_an_error_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"image tower has 3 known blocks .* text tower 2"):
        chosen(TwoTowers(), "last:3")
    with pytest.raises(InputError, match="image tower has 2 known blocks"):
        chosen(tiny_open_clip(), "last:13")


@pytest.mark.parametrize("spec", ["last:1", "lora"])
def test_without_known_blocks_the_error_says_what_can_be_trained(spec: str) -> None:
    model = TwoTowers()
    model.image_blocks, model.text_blocks = nn.ModuleList(), nn.ModuleList()
    with pytest.raises(InputError, match='use trainable="all", "image" or "text"'):
        chosen(model, spec)


@pytest.mark.parametrize("spec", ["everything", "last", "last:0", "last:-1", "last:two", ""])
def test_an_unknown_choice_is_named(spec: str) -> None:
    with pytest.raises(InputError, match="use all, image, text, last:K"):
        chosen(tiny_open_clip(), spec)


def test_unidentified_towers_are_an_error_unless_all_is_trained() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.logit_scale = nn.Parameter(torch.tensor(1.0))

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.first(pixels)

        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.second(tokens)

    with pytest.raises(InputError, match=r"the image tower \(its parts: first, second\)"):
        chosen(Plain(), "image")
    assert len(chosen(Plain(), "all")) == 5
