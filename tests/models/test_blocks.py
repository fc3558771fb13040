"""open_clip's blocks with less work and memory: no used output changes."""

import copy

import pytest
import torch
from tiny_models import RESNET, TIMM, TIMM_CONVOLUTION, TwoTowers, pixels_for, tiny_clip, tiny_open_clip

from cliperase_fast.models import load_model, set_trainable
from cliperase_fast.models.fast_paths import blocks
from cliperase_fast.models.fast_paths.blocks import disable_recompute, enable_recompute
from cliperase_fast.models.runtime import in_fast_layout

FITTING = {
    "CLIP": tiny_open_clip,
    "CustomTextCLIP": lambda: tiny_open_clip(custom_text=True),
    "layer scale, norm after pooling": lambda: tiny_open_clip(
        vision_cfg={"ls_init_value": 0.3, "final_ln_after_pool": True}
    ),
}
OTHERS = {
    "mean of the tokens": lambda: tiny_open_clip(vision_cfg={"pool_type": "avg"}),
    "attention pooling": lambda: tiny_open_clip(vision_cfg={"attentional_pool": True}),
    "custom blocks": lambda: tiny_open_clip(vision_cfg={"qk_norm": True}),
    "resnet": lambda: tiny_open_clip(**RESNET),
    "timm": lambda: tiny_open_clip(**TIMM),
    "transformers": tiny_clip,
    "generic": TwoTowers,
}


@pytest.mark.parametrize("make", FITTING.values(), ids=FITTING.keys())
def test_features_and_gradients_are_those_of_plain_blocks(make, monkeypatch):
    monkeypatch.setattr(blocks, "_SMALL", 0)
    whole = load_model(make().double())
    part = load_model(copy.deepcopy(whole.module))
    names = [name for name, _ in part.module.named_parameters()]
    length = part._read_length(part.tokenize(["a cat"]))
    last = part.module.visual.transformer.resblocks[-1]
    tokens_out, computed = [], []
    enable_recompute(part)
    assert [name for name, _ in part.module.named_parameters()] == names
    pixels = pixels_for(whole.module).double()
    last.ln_2.register_forward_hook(lambda module, inputs, output: tokens_out.append(output.shape[1]))
    first = part.module.visual.transformer.resblocks[0]
    first.mlp.gelu.register_forward_hook(lambda *_: computed.append("activation"))
    first.mlp.c_proj.register_forward_hook(lambda *_: computed.append("product"))
    features, expected = part.encode_image(pixels), whole.encode_image(pixels)
    assert tokens_out == [1]
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(expected)
    (features * direction).sum().backward()
    (expected * direction).sum().backward()
    part.encode_text(part.tokenize(["a cat"])).square().sum().backward()
    whole.encode_text(part.tokenize(["a cat"])).square().sum().backward()
    for (name, parameter), reference in zip(part.module.named_parameters(), whole.module.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert computed == ["activation", "product", "activation"]  # the product was not computed again
    part._reader = None  # as in a copy of the adapter: what is known of the text tower is found again
    assert part._read_length(part.tokenize(["a cat"])) == length < 16
    disable_recompute(part)
    assert type(last) is type(whole.module.visual.transformer.resblocks[-1])


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_models_that_may_read_other_tokens_are_left_alone(make):
    adapter = load_model(make())
    enable_recompute(adapter)
    first_token = blocks.block_kinds()[2]
    assert not any(type(module) is first_token for module in adapter.module.modules())
    adapter.encode_image(pixels_for(adapter.module) if adapter.kind != "generic" else torch.randn(2, 3, 8, 8))


def test_a_block_that_somebody_watches_or_lora_wraps_is_left_alone():
    watched = load_model(tiny_open_clip())
    seen = []
    block = watched.module.visual.transformer.resblocks[-1]
    block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    enable_recompute(watched)
    watched.encode_image(pixels_for(watched.module))
    assert seen == [17]
    pytest.importorskip("peft")
    lora = load_model(tiny_open_clip())
    set_trainable(lora, "lora", 2)
    enable_recompute(lora)
    lora.encode_image(pixels_for(lora.module)).sum().backward()


def test_a_tower_of_depthwise_convolutions_gets_its_channels_last_and_computes_the_same():
    adapter = load_model(tiny_open_clip(**TIMM_CONVOLUTION).double())
    pixels = pixels_for(adapter.module).double()
    expected = adapter.module.encode_image(pixels, normalize=True)
    seen = []
    adapter.module.visual.trunk.conv_stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    torch.testing.assert_close(adapter.encode_image(pixels), expected, rtol=1e-10, atol=1e-12)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    transformer = tiny_open_clip()
    assert in_fast_layout(transformer.visual, pixels) is pixels
