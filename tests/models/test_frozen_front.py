"""The frozen front of an image tower: both parts together equal the tower, and only frozen parts count as frozen."""

import copy

import pytest
import torch
from tiny_models import RESNET, TIMM, TIMM_CONVOLUTION, TwoTowers, pixels_for, tiny_clip, tiny_open_clip

from cliperase_fast.models import load_model, set_trainable
from cliperase_fast.models.fast_paths.blocks import enable_recompute
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront

VISION = {
    "class token": lambda: tiny_open_clip(),
    "own text tower": lambda: tiny_open_clip(custom_text=True),
    "mean of the tokens": lambda: tiny_open_clip(vision_cfg={"pool_type": "avg"}),
    "attention pooling": lambda: tiny_open_clip(vision_cfg={"attentional_pool": True}),
    "norm after pooling": lambda: tiny_open_clip(vision_cfg={"final_ln_after_pool": True}),
    "timm, EfficientNet": lambda: tiny_open_clip(**TIMM_CONVOLUTION),
    "timm, ConvNeXt": lambda: tiny_open_clip(**timm_tower("test_convnext")),
}


def timm_tower(name):
    return {**TIMM_CONVOLUTION, "vision_cfg": {**TIMM_CONVOLUTION["vision_cfg"], "timm_model_name": name}}


WHOLE = {
    "open_clip": tiny_open_clip,
    "resnet": lambda: tiny_open_clip(**RESNET),
    "timm": lambda: tiny_open_clip(**TIMM),
    "transformers": tiny_clip,
    "generic": TwoTowers,
}


def checkpointed(model):
    model.visual.set_grad_checkpointing(True)
    return model


def prepared(model, trainable):
    adapter = load_model(model.double())
    set_trainable(adapter, trainable)
    enable_recompute(adapter)
    adapter.module.train()
    for module in adapter.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    pixels = torch.randn(2, 3, 8, 8) if adapter.kind == "generic" else pixels_for(adapter.module)
    return adapter, pixels.double()


@pytest.mark.parametrize("make", VISION.values(), ids=VISION.keys())
def test_the_last_blocks_train_the_same_from_what_the_others_made_of_the_images(make):
    adapter, pixels = prepared(make(), "last:1")
    front = FrozenFront.of(adapter, pixels)
    made = front.first(pixels)
    assert not made.requires_grad
    features, expected = front.rest(made), adapter.encode_image(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-14)
    trained = [p for n, p in adapter.module.named_parameters() if p.requires_grad and adapter.tower(n) == "image"]
    direction = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((x * direction).sum(), trained) for x in (features, expected))
    assert all(gradient.abs().max() > 0 for gradient in wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE.keys())
def test_an_untrained_image_tower_is_frozen_entirely(make):
    adapter, pixels = prepared(make(), "text")
    front = FrozenFront.of(adapter, pixels)
    made = front.first(pixels)
    assert made.ndim == 2
    assert torch.equal(front.rest(made), adapter.encode_image(pixels))


def _first_layer(adapter):
    adapter.module.visual.conv1.weight.requires_grad_(True)


def _watched(adapter):
    adapter.module.visual.ln_post.register_forward_hook(lambda *_: None)


def _seldom_random(adapter):
    adapter.module.visual.patch_dropout = torch.nn.Dropout(1e-9).train()


def _checkpointed(adapter):
    adapter.module.visual.set_grad_checkpointing(True)


@pytest.mark.parametrize("change", [_first_layer, _watched, _seldom_random, _checkpointed])
def test_nothing_is_frozen_where_a_part_in_front_is_trained_seen_random_or_computed_again(change):
    adapter, pixels = prepared(tiny_open_clip(), "last:1")
    assert FrozenFront.of(adapter, pixels) is not None
    change(adapter)
    assert FrozenFront.of(adapter, pixels) is None


@pytest.mark.parametrize(
    ("make", "trainable"),
    [
        (tiny_open_clip, "all"),
        (lambda: tiny_open_clip(vision_cfg={"patch_dropout": 0.5}), "text"),
        (lambda: tiny_open_clip(vision_cfg={"patch_dropout": 0.5}), "last:1"),
        (lambda: tiny_open_clip(**RESNET), "last:1"),
        (lambda: tiny_open_clip(**TIMM), "last:1"),
        (lambda: checkpointed(tiny_open_clip(**TIMM_CONVOLUTION)), "last:1"),
    ],
    ids=[
        "all trained",
        "random, whole",
        "random, in front",
        "a tower we cannot part",
        "a transformer of timm's",
        "computed again",
    ],
)
def test_nothing_is_frozen_where_that_is_not_known(make, trainable):
    model = make()
    adapter = load_model(model)
    set_trainable(adapter, trainable)
    adapter.module.train()
    assert FrozenFront.of(adapter, pixels_for(adapter.module)) is None


def test_an_image_encoder_that_reads_a_trained_parameter_of_the_text_tower_is_not_frozen():
    class Shared(TwoTowers):
        def encode_image(self, pixels):
            return super().encode_image(pixels) + self.text_proj.weight.sum()

    adapter, pixels = prepared(Shared(), "text")
    assert FrozenFront.of(adapter, pixels) is None


def test_a_tower_that_computes_more_than_its_parts_is_not_split():
    adapter, pixels = prepared(tiny_open_clip(), "last:1")
    visual = adapter.module.visual
    embed = copy.copy(visual._embeds)
    calls = iter(range(10))
    visual._embeds = lambda x: embed(x).roll(next(calls), -1)  # another result each time
    assert FrozenFront.of(adapter, pixels) is None
