"""open_clip models: features, transform, tokenizer, saving from a bare instance and loading again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_models import (
    CAPTIONS,
    RESNET,
    TIMM,
    picture,
    pixels_for,
    randomised,
    tiny_config,
    tiny_hugging_face,
    tiny_open_clip,
    word_tokenizer,
)
from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import OpenClipAdapter, load_model
from cliperase_fast.models.adapters import open_clip as adapter_module

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "resnet": RESNET,
    "timm": TIMM,
    "timm_without_projection": {
        **TIMM,
        "embed_dim": 64,
        "vision_cfg": {**TIMM["vision_cfg"], "timm_pool": "token", "timm_proj": "none"},
    },
    "timm_classifier": {**TIMM, "vision_cfg": {**TIMM["vision_cfg"], "timm_proj": ""}},
    "timm_mlp": {**TIMM, "vision_cfg": {**TIMM["vision_cfg"], "timm_proj": "mlp", "timm_proj_bias": True}},
    "custom_text": {"custom_text": True},
    "oblong": {"vision_cfg": {"image_size": [16, 24], "patch_size": [4, 8]}},
    "odd_mlp": {"vision_cfg": {"mlp_ratio": 2.7}, "text_cfg": {"mlp_ratio": 3.3}},
    # 54 hidden units, and 49 * (54 / 49) is a little less than 54
    "inexact_mlp": {"vision_cfg": {"width": 49, "head_width": 7, "mlp_ratio": 54.5 / 49}},
    "average_pool": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}},
    "attention_pool": {"vision_cfg": {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 4}},
    "layer_scale": {"vision_cfg": {"ls_init_value": 0.1}, "text_cfg": {"ls_init_value": 0.1}},
    "epsilon": {"vision_cfg": {"norm_kwargs": {"eps": 1e-2}}, "text_cfg": {"norm_kwargs": {"eps": 1e-2}}},
    "tanh_gelu": {"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}},
    "custom_blocks": {"vision_cfg": {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True, "scale_heads": True}},
    "siglip": {
        "custom_text": True,
        "init_logit_bias": -10.0,
        "nonscalar_logit_scale": True,
        "text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "pad_id": 1},
    },
    "eos_pool": {"custom_text": True, "text_cfg": {"pool_type": "eos", "eos_id": 49407, "embed_cls": False}},
    "class_token": {
        "custom_text": True,
        "text_cfg": {"embed_cls": True, "pool_type": "last", "vocab_size": 60},
    },
}


def both_features(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return (
            model.encode_image(pixels_for(model), normalize=True),
            model.encode_text(tokens, normalize=True),
        )


def tokens_for(model: nn.Module) -> torch.Tensor:
    vocabulary = min(model.vocab_size, 49408)
    tokens = torch.randint(2, vocabulary - 1, (3, model.context_length), generator=torch.Generator().manual_seed(2))
    tokens[:, 9] = vocabulary - 1
    tokens[:, 10:] = 0
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bare_instance_is_saved_so_that_open_clip_loads_the_same_model(variant: str, tmp_path: Path) -> None:
    model = tiny_open_clip(**VARIANTS[variant])
    load_model(model).save(tmp_path / "model")

    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")

    assert type(loaded) is type(model)
    tokens = tokens_for(model)
    for expected, found in zip(both_features(model, tokens), both_features(loaded.eval(), tokens), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(transform(picture()), load_model(model).transform(picture()))
    torch.testing.assert_close(loaded.logit_scale, model.logit_scale)


def test_features_are_open_clips_normalised_ones_and_the_scale_its_exponential() -> None:
    for model in (tiny_open_clip(), tiny_open_clip(**VARIANTS["siglip"])):
        adapter = load_model(model)
        tokens = tokens_for(model)
        image, text = both_features(model, tokens)

        assert adapter.kind == "open_clip"
        torch.testing.assert_close(adapter.encode_image(pixels_for(model)), image)
        torch.testing.assert_close(adapter.encode_text(tokens), text)
        assert adapter.logit_scale().shape == ()
        assert adapter.logit_scale().item() == pytest.approx(1 / 0.07)
        adapter.logit_scale().backward()
        assert model.logit_scale.grad is not None


def test_a_model_with_dictionary_output_encodes_alike() -> None:
    model, twin = tiny_open_clip(), tiny_open_clip(output_dict=True)
    assert twin.output_dict
    pixels = pixels_for(model)
    torch.testing.assert_close(load_model(twin).encode_image(pixels), load_model(model).encode_image(pixels))


def test_towers_that_return_their_tokens_too_encode_alike(tmp_path: Path) -> None:
    model = tiny_open_clip(custom_text=True)
    both = {"vision_cfg": {"output_tokens": True}, "text_cfg": {"output_tokens": True}}
    twin = tiny_open_clip(custom_text=True, **both)
    assert isinstance(twin.encode_image(pixels_for(twin)), tuple)
    load_model(twin).save(tmp_path)
    for adapter in (load_model(twin), load_model(tmp_path)):
        torch.testing.assert_close(
            adapter.encode_image(pixels_for(model)), load_model(model).encode_image(pixels_for(model))
        )
        torch.testing.assert_close(
            adapter.encode_text(tokens_for(model)), load_model(model).encode_text(tokens_for(model))
        )
        assert isinstance(adapter.module.encode_text(tokens_for(model)), tuple)


def test_a_zero_feature_stays_zero_with_a_finite_gradient() -> None:
    model = tiny_open_clip()
    with torch.no_grad():
        model.visual.proj.zero_()
    features = load_model(model).encode_image(pixels_for(model))
    features.sum().backward()
    assert features.abs().max() == 0
    assert torch.isfinite(model.visual.proj.grad).all()


def test_under_autocast_the_features_are_float32_of_length_one() -> None:
    adapter = load_model(tiny_open_clip())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = adapter.encode_image(pixels_for(adapter.module))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_the_transform_and_tokenizer_are_open_clips(tmp_path: Path) -> None:
    model = tiny_open_clip()
    adapter = load_model(model)
    expected = open_clip.image_transform((16, 16), is_train=False)
    torch.testing.assert_close(adapter.transform(picture()), expected(picture()))
    tokens = adapter.tokenize(CAPTIONS)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, open_clip.tokenize(CAPTIONS, context_length=16))
    adapter.save(tmp_path)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(CAPTIONS), tokens)


def test_a_tower_with_frozen_batch_norms_is_saved_and_loaded(tmp_path: Path) -> None:
    model: Any = tiny_open_clip(**RESNET)
    model.lock_image_tower(freeze_bn_stats=True)
    load_model(model).save(tmp_path / "model")
    loaded: Any = load_model(tmp_path / "model").module
    torch.testing.assert_close(loaded.encode_image(pixels_for(model)), model.eval().encode_image(pixels_for(model)))


def test_the_preprocessing_settings_are_saved(tmp_path: Path) -> None:
    model = tiny_open_clip()
    settings = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.1, 0.2, 0.3),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    open_clip.set_model_preprocess_cfg(model, {"size": 16, **settings})
    expected = load_model(model).transform(picture())
    load_model(model).save(tmp_path / "model")

    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")

    torch.testing.assert_close(transform(picture()), expected)
    saved = json.loads((tmp_path / "model" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert {key: tuple(saved[key]) if isinstance(saved[key], list) else saved[key] for key in settings} == settings


@pytest.mark.parametrize("settings", [{"clean": "canonicalize"}, {"additional_special_tokens": ["<dog>"]}])
def test_tokenizer_settings_are_saved(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=16, **settings)
    model = tiny_open_clip(text_cfg={"vocab_size": 49410})
    adapter = load_model(model, tokenizer=tokenizer)
    adapter.save(tmp_path)
    captions = ["A Photo, of_a <dog>!"]
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path}")(captions), adapter.tokenize(captions))
    plain = load_model(model, tokenizer=open_clip.SimpleTokenizer(context_length=16))
    assert not torch.equal(adapter.tokenize(captions), plain.tokenize(captions))
    assert torch.equal(load_model(tmp_path).tokenize(captions), adapter.tokenize(captions))


def test_a_model_with_another_vocabulary_needs_a_tokenizer() -> None:
    model = tiny_open_clip(text_cfg={"vocab_size": 60})
    with pytest.raises(InputError, match="pass tokenizer="):
        load_model(model).tokenize(CAPTIONS)
    given = load_model(model, tokenizer=lambda captions: torch.ones(len(captions), 16, dtype=torch.int32))
    assert torch.equal(given.tokenize(CAPTIONS), torch.ones(3, 16, dtype=torch.int64))


def test_tokens_of_another_length_or_vocabulary_are_refused() -> None:
    model = tiny_open_clip()
    for tokens, message in [
        (torch.ones(3, 9, dtype=torch.long), "needs exactly 16"),
        (torch.ones(3, 20, dtype=torch.long), "context holds 16"),
        (torch.full((3, 16), 49408), "vocabulary"),
        (torch.full((3, 16), -1), "vocabulary"),
    ]:
        with pytest.raises(InputError, match=message):
            load_model(model, tokenizer=lambda captions, tokens=tokens: tokens).tokenize(CAPTIONS)


def test_a_clone_is_independent_and_the_original_untouched() -> None:
    adapter = load_model(tiny_open_clip())
    adapter.encode_image(pixels_for(adapter.module)).sum().backward()
    before = copy.deepcopy(adapter.module.state_dict())
    twin = adapter.clone()
    assert isinstance(twin, OpenClipAdapter)
    assert all(parameter.grad is None for parameter in twin.module.parameters())
    assert twin.identity() == adapter.identity()
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.module.state_dict().items())
    assert twin.identity() != adapter.identity()


def test_the_identity_names_values_buffers_and_class() -> None:
    model = tiny_open_clip(**RESNET)
    identity = load_model(model).identity()
    assert identity == load_model(tiny_open_clip(**RESNET)).identity()
    assert identity != load_model(tiny_open_clip(seed=1, **RESNET)).identity()
    with torch.no_grad():
        model.visual.bn1.running_mean[0] += 1e-3
    assert load_model(model).identity() != identity
    assert len(load_model(tiny_open_clip().to(torch.bfloat16)).identity()) == 64


def test_checking_that_a_model_can_be_saved_changes_neither_its_mode_nor_the_random_state() -> None:
    model = tiny_open_clip(**TIMM).train()
    model.visual.eval()
    state = torch.get_rng_state()
    load_model(model).check_saveable()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.visual.training


class Doubled(open_clip.CLIP):
    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = super().encode_text(text.flip(1), normalize)
        return 2 * features


def test_a_model_no_configuration_rebuilds_is_refused_before_any_work(tmp_path: Path) -> None:
    model = Doubled(**tiny_config()).eval()
    adapter = load_model(model)
    with pytest.raises(InputError, match=r"its features differ by .*local-dir:DIR"):
        adapter.check_saveable()
    with pytest.raises(InputError, match="ViT-B-32:openai"):
        adapter.save(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_model_with_an_extra_parameter_is_refused() -> None:
    model = tiny_open_clip()
    model.visual.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match=r"extra|Unexpected key"):
        load_model(model).check_saveable()


def test_a_replaced_tower_is_refused_by_name() -> None:
    model = tiny_open_clip()
    model.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 24))
    model.visual.image_size = 16
    with pytest.raises(InputError, match="not built as open_clip builds it"):
        load_model(model).check_saveable()


@pytest.mark.parametrize(
    ("family", "pooler", "projection"),
    [("roberta", "mean_pooler", "linear"), ("bert", "cls_pooler", None), ("bert", "mean_pooler", "mlp")],
)
def test_a_hugging_face_text_tower_is_saved_with_all_that_loading_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, pooler: str, projection: str | None
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tiny_hugging_face(family, pooler, projection)
    adapter = load_model(model, tokenizer=word_tokenizer())
    length = 19 if family == "roberta" else 20  # its positions begin behind the padding's
    assert adapter.context_length == length
    assert [len(blocks) for blocks in adapter.blocks()] == [2, 2]

    adapter.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = load_model(f"local-dir:{tmp_path / 'moved'}")

    assert again.context_length == length
    captions = ["a photo of a dog", "red"]
    assert torch.equal(again.tokenize(captions), adapter.tokenize(captions))
    tokens = adapter.tokenize(captions)
    torch.testing.assert_close(again.encode_text(tokens), adapter.encode_text(tokens))
    torch.testing.assert_close(again.encode_image(pixels_for(model)), adapter.encode_image(pixels_for(model)))


def test_coca_is_loaded_saved_and_trained_without_its_decoder(tmp_path: Path) -> None:
    from cliperase_fast.models import set_trainable

    config = tiny_config(
        custom_text=True,
        vision_cfg={
            "output_tokens": True,
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 4,
        },
        text_cfg={"embed_cls": True, "output_tokens": True, "vocab_size": 60},
        multimodal_cfg={"width": 24, "context_length": 16, "vocab_size": 60, "layers": 1, "heads": 2},
    )
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    model = randomised(open_clip.CoCa(**arguments).eval())
    adapter = OpenClipAdapter(model, model_cfg=config)
    adapter.save(tmp_path / "coca")

    again = load_model(f"local-dir:{tmp_path / 'coca'}")

    tokens = tokens_for(model.text)
    torch.testing.assert_close(again.encode_image(pixels_for(model)), adapter.encode_image(pixels_for(model)))
    torch.testing.assert_close(again.encode_text(tokens), adapter.encode_text(tokens))
    names = [name for name, _ in set_trainable(adapter, "all")]
    assert not any(name.startswith("text_decoder") for name in names)
    adapter.encode_image(pixels_for(model)).sum().backward()
    with pytest.raises(InputError, match="coca_"):
        load_model(model).check_saveable()


def test_saving_over_a_saved_model_replaces_it_and_keeps_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    load_model(tiny_open_clip()).save(folder)
    (folder / "notes.txt").write_text("mine")
    second = tiny_open_clip(seed=1)
    load_model(second).save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert load_model(str(folder)).identity() == load_model(second).identity()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_crash_while_saving_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def stops(module: nn.Module, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_module, "save_weights", stops)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_open_clip()).save(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_crash_while_replacing_a_model_leaves_none_rather_than_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cliperase_fast.models import saving

    folder = tmp_path / "model"
    load_model(tiny_open_clip()).save(folder)
    moved: list[str] = []

    def stops_at_the_second(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target.name)

    monkeypatch.setattr(saving.os, "replace", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_open_clip(seed=1)).save(folder)
    assert moved == ["open_clip_model.safetensors"]
    with pytest.raises(
        InputError, match=r"neither open_clip_config\.json \(open_clip\) nor config\.json \(transformers, "
    ):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_the_folder_of_a_run_is_named_with_that_of_its_model(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as without:
        load_model(f"{prefix}{tmp_path}")
    load_model(tiny_open_clip()).save(tmp_path / "model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError) as hinted:
        load_model(f"{prefix}{tmp_path}")
    assert str(hinted.value) == f"{without.value}; did you mean {tmp_path / 'model'}?"


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(InputError, match="is a file"):
        load_model(tiny_open_clip()).save(tmp_path / "model")


def test_wrong_input_shapes_are_named() -> None:
    adapter = load_model(tiny_open_clip())
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        adapter.encode_image(torch.zeros(3, 16, 16))
    with pytest.raises(InputError, match=r"\[B, L\]"):
        adapter.encode_text(torch.zeros(16, dtype=torch.long))


def test_compiled_and_parallel_wrappers_are_opened() -> None:
    model = tiny_open_clip()
    assert load_model(nn.DataParallel(model)).module is model
    assert load_model(torch.compile(model)).module is model
