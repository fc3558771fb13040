"""Features before a tower's projection: the projection of them is the tower's output, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import RESNET, TIMM, TwoTowers, pixels_for, tiny_clip, tiny_hugging_face, tiny_open_clip

from cliperase_fast.models import load_model
from cliperase_fast.models.adapters.base import Projection
from cliperase_fast.models.tower_features import with_tower_features

# Which towers' projections are known: (image, text).
MODELS = {
    "open_clip": (tiny_open_clip, True, True),
    "own text tower": (lambda: tiny_open_clip(custom_text=True), True, True),
    "attention pooling": (lambda: tiny_open_clip(vision_cfg={"attentional_pool": True}), True, True),
    "resnet": (lambda: tiny_open_clip(**RESNET), False, True),
    "timm": (lambda: tiny_open_clip(**TIMM), True, True),
    "Hugging Face text tower": (tiny_hugging_face, True, True),
    "transformers": (tiny_clip, True, True),
    "generic": (TwoTowers, False, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_projection_of_a_towers_features_is_its_output(name):
    make, *known = MODELS[name]
    adapter = load_model(make().eval())
    pixels = pixels_for(adapter.module)
    tokens = adapter.probe()[1] if adapter.probe() else torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = adapter.identity()
    with torch.no_grad():
        wide = with_tower_features(adapter, pixels[:1], tokens[:1])
        rows = {"image": (wide.encode_image(pixels), adapter.encode_image(pixels)),
                "text": (wide.encode_text(tokens), adapter.encode_text(tokens))}  # fmt: skip
    for (tower, (found, expected)), projected in zip(rows.items(), known, strict=True):
        width = expected.shape[1]
        assert torch.allclose(found[:, :width], expected, atol=1e-6)
        projection, own = adapter.projection(tower), found[:, width:]
        assert (projection is not None) == projected
        again = own if projection is None else projection(own)
        assert torch.allclose(F.normalize(again, dim=1), expected, atol=1e-5)
    assert adapter.identity() == before


def test_a_projection_that_does_not_give_the_output_is_not_used(monkeypatch):
    adapter = load_model(tiny_open_clip().eval())
    pixels, tokens = pixels_for(adapter.module), adapter.probe()[1]
    own = Projection.__call__
    monkeypatch.setattr(Projection, "__call__", lambda projection, rows: own(projection, rows).flip(1))
    with torch.no_grad():
        wide, width = with_tower_features(adapter, pixels, tokens), adapter.encode_image(pixels).shape[1]
        found = wide.encode_image(pixels)
        assert torch.allclose(found[:, :width], adapter.encode_image(pixels))
        assert torch.allclose(F.normalize(found[:, width:], dim=1), found[:, :width], atol=1e-6)


def test_an_error_in_a_tower_leaves_its_projection_in_place():
    adapter = load_model(tiny_open_clip().eval())
    projection = adapter.projection("image")
    with pytest.raises(RuntimeError, match="stop"), projection.left_out():
        assert adapter.module.visual.proj is None
        raise RuntimeError("stop")
    assert isinstance(adapter.module.visual.proj, torch.nn.Parameter)
