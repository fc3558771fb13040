"""Models load, encode, convert and are saved the same whatever torch's defaults are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import CAPTIONS, pixels_for, tiny_clip, tiny_open_clip, word_tokenizer
from torch import Tensor
from torch_defaults import assert_independent, torch_default

from cliperase_fast import export
from cliperase_fast.data import open_source
from cliperase_fast.demo import train_small_clip
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.models import load_model

DEFAULTS = ("float64", "bfloat16", "meta")
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "open_clip": (tiny_open_clip, {}),
    "custom_text": (lambda: tiny_open_clip(custom_text=True), {}),
    "transformers": (tiny_clip, {"tokenizer": word_tokenizer()}),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kind", MODELS)
def test_features_do_not_depend_on_the_defaults_of_torch(kind, default):
    make, options = MODELS[kind]
    module = make()
    pixels = pixels_for(module)

    def features() -> list[Tensor]:
        adapter = load_model(module, **options)
        tokens = adapter.tokenize(CAPTIONS)
        return [tokens, adapter.encode_image(pixels).detach(), adapter.encode_text(tokens).detach()]

    assert_independent(default, features)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_is_read_and_written_the_same(tmp_path, kind, default):
    make, options = MODELS[kind]
    adapter = load_model(make(), **options)
    adapter.save(tmp_path / "plain")

    def loaded() -> list[Tensor]:
        return list(load_model(str(tmp_path / "plain"), **options).module.state_dict().values())

    assert_independent(default, loaded)
    with torch_default(default):
        adapter.save(tmp_path / "other")
    written = [
        next(file for file in sorted((tmp_path / folder).iterdir()) if file.suffix == ".safetensors").read_bytes()
        for folder in ("plain", "other")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("default", DEFAULTS)
def test_conversions_do_not_depend_on_the_defaults_of_torch(default):
    model = tiny_open_clip(text_cfg={"heads": 2}, vision_cfg={"head_width": 24})

    def converted() -> list[Tensor]:
        there = export.to_transformers(model)
        back = export.to_open_clip(there)
        return [*there.state_dict().values(), *back.state_dict().values()]

    assert_independent(default, converted)


@pytest.mark.parametrize("default", DEFAULTS)
def test_the_demos_model_does_not_depend_on_the_defaults_of_torch(default):
    recipe = replace(DEMO_MODELS["demo"], epochs=1)
    pairs = open_source("demo").train.subset(range(0, 1024, 64))

    def trained() -> list[Tensor]:
        return list(train_small_clip(pairs, replace(recipe, batch_size=8)).state_dict().values())

    assert_independent(default, trained)
