"""Conversions between open_clip, transformers and diffusers, on tiny models with every weight random."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import RESNET, TIMM, pixels_for, tiny_clip, tiny_open_clip, tiny_pipeline

import cliperase_fast as cf
from cliperase_fast import export


def tokens_for(length=16, end=49407):
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, min(end, 49000), (5, length), generator=g)
    tokens[torch.arange(5), torch.tensor([3, 5, 7, 9, 15])] = end
    tokens[0, 4:] = 0
    return tokens


def normal(output):
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


VARIANTS = {
    "plain": {},
    "quick GELU": {"quick_gelu": True},
    "tanh GELU": {
        "text_cfg": {"act_kwargs": {"approximate": "tanh"}},
        "vision_cfg": {"act_kwargs": {"approximate": "tanh"}},
    },
    "odd widths": {"vision_cfg": {"mlp_ratio": 2.7}, "text_cfg": {"mlp_ratio": 3.3}},
    "end mark": {"text_cfg": {"pool_type": "eos", "eos_id": 40000}},
    "own text tower": {"custom_text": True},
    "small epsilon": {"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}, "text_cfg": {"norm_kwargs": {"eps": 1e-3}}},
}


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_features_survive_the_way_to_transformers_and_back(name):
    model = tiny_open_clip(**VARIANTS[name])
    images, tokens = pixels_for(model), tokens_for(end=40000 if name == "end mark" else 49407)
    there = export.to_transformers(model)
    back = export.to_open_clip(there)
    for image, text in (
        (there.get_image_features(pixel_values=images), there.get_text_features(input_ids=tokens)),
        (back.encode_image(images), back.encode_text(tokens)),
    ):
        torch.testing.assert_close(normal(image), normal(model.encode_image(images)), rtol=0, atol=1e-5)
        torch.testing.assert_close(normal(text), normal(model.encode_text(tokens)), rtol=0, atol=1e-5)
    assert there.logit_scale.item() == back.logit_scale.item() == model.logit_scale.item()


@torch.no_grad()
@pytest.mark.parametrize("end", [2, 9])  # transformers' legacy mark: pool at the highest id
def test_a_transformers_model_becomes_an_open_clip_one(end, tmp_path):
    model = tiny_clip(eos_token_id=end)
    result = export.to_open_clip(model)
    tokens = torch.tensor([[8, 2, 3, 9, 0, 9], [8, 9, 1, 1, 1, 1]])
    tokens = F.pad(tokens, (0, 10))
    images = pixels_for(model)
    torch.testing.assert_close(
        normal(result.encode_text(tokens)), normal(model.get_text_features(input_ids=tokens)), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        normal(result.encode_image(images)), normal(model.get_image_features(pixel_values=images)), rtol=0, atol=1e-5
    )
    export.to_transformers(result).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_models_state_and_dtype_stay():
    model = tiny_open_clip().bfloat16().train()
    result = export.to_transformers(model)
    assert next(result.parameters()).dtype == torch.bfloat16
    assert model.training and not result.training


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (RESNET, "patch_size|layers"),
        (TIMM, "timm_model_name"),
        ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "pool"),
        ({"init_logit_bias": -10.0}, "init_logit_bias"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type"),
    ],
)
def test_what_transformers_has_no_place_for_is_refused_by_name(changes, says):
    with pytest.raises(cf.InputError, match=says):
        export.to_transformers(tiny_open_clip(**changes))


def test_two_activations_and_other_models_are_refused_by_open_clip():
    model = tiny_clip(hidden_act="gelu")
    with pytest.raises(cf.InputError, match="one activation"):
        export.to_open_clip(model)
    with pytest.raises(cf.InputError, match="not a Linear"):
        export.to_open_clip(torch.nn.Linear(2, 2))


def test_what_is_no_model_of_the_other_library_is_refused_by_name():
    for convert in (export.to_transformers, export.to_open_clip, export.to_diffusers_text_encoder):
        with pytest.raises(cf.InputError, match="the model is a str; pass a torch module"):
            convert("ViT-B-32:openai")
    with pytest.raises(cf.InputError, match="to_transformers takes an open_clip model, not a CLIPModel"):
        export.to_transformers(tiny_clip())
    with pytest.raises(cf.InputError, match="takes an open_clip model or a transformers CLIPModel, not a Linear"):
        export.to_diffusers_text_encoder(torch.nn.Linear(2, 2))
    changed = tiny_open_clip()
    changed.ln_final = torch.nn.Identity()
    with pytest.raises(cf.InputError, match="cannot be converted: no configuration") as error:
        export.to_transformers(changed)
    assert "local-dir" not in str(error.value)


def test_a_wrong_conversion_is_never_returned(monkeypatch):
    renamed = export._transformers_state
    monkeypatch.setattr(
        export,
        "_transformers_state",
        lambda state: {
            **renamed(state),
            "visual_projection.weight": renamed(state)["visual_projection.weight"].flip(0),
        },
    )
    with pytest.raises(cf.InputError, match="differ by"):
        export.to_transformers(tiny_open_clip())


@torch.no_grad()
def test_the_text_tower_is_exported_beside_any_image_tower():
    model = tiny_open_clip(**TIMM)
    tokens = tokens_for(model.context_length)
    with pytest.raises(cf.InputError, match="CLIPModel cannot express timm"):
        export.to_transformers(model)
    projected = export.to_diffusers_text_encoder(model, projection=True)
    torch.testing.assert_close(projected(tokens).text_embeds, model.encode_text(tokens), rtol=1e-4, atol=1e-5)
    plain = export.to_diffusers_text_encoder(model)(tokens).last_hidden_state
    torch.testing.assert_close(plain, projected(tokens).last_hidden_state)


@torch.no_grad()
def test_a_diffusion_pipeline_paints_with_the_exported_text_encoder():
    model = tiny_open_clip(text_cfg={"context_length": 77})
    encoder = export.to_diffusers_text_encoder(model)
    tokens = tokens_for(77)
    hidden = encoder(tokens).last_hidden_state
    clip = export.to_transformers(model)
    torch.testing.assert_close(hidden, clip.text_model(tokens).last_hidden_state)
    projected = export.to_diffusers_text_encoder(clip, projection=True)
    torch.testing.assert_close(projected(tokens).text_embeds, model.encode_text(tokens), rtol=1e-4, atol=1e-5)

    pipeline = tiny_pipeline(encoder, None)
    pipeline.set_progress_bar_config(disable=True)

    def paint(tokens):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        prompt = pipeline.text_encoder(tokens)[0]
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=0 * prompt,
            num_inference_steps=2,
            latents=noise,
            output_type="pt",
        ).images

    one, other = paint(tokens[:1]), paint(tokens[1:2])
    assert one.shape == (1, 3, 16, 16) and one.isfinite().all()
    assert not torch.equal(one, other)  # it reads the caption
