"""Small models of each further family, with the calls of their own library that give features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_models import TIMM, randomised, tiny_hugging_face, tiny_open_clip, word_tokenizer
from torch import Tensor, nn

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SHAPE, "vocab_size": 10, "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 8,
        "eos_token_id": 9}  # fmt: skip
VISION = {**SHAPE, "image_size": 16, "patch_size": 8}
SIGLIP = {"vision_cfg": {"pool_type": "avg"}, "text_cfg": {"pool_type": "last"}, "init_logit_bias": -10.0}


@dataclass(frozen=True)
class TinyFamily:
    """make: the model. image, text: features as its own library computes them, not normalised.

    load: the saved model with its own library.
    """

    make: Callable[[], Any]
    image: Callable[[Any, Tensor], Any]
    text: Callable[[Any, Tensor], Any]
    load: Callable[[Any], Any]
    size: int = 16


def built(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = randomised(model.eval())
    with torch.no_grad():
        for name, value in (("logit_scale", 2.5), ("logit_bias", -8.0)):
            if isinstance(getattr(model, name, None), Tensor):
                getattr(model, name).fill_(value)
    return model


def siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
    torch.manual_seed(1)
    return built(transformers.SiglipModel(config))


def siglip2() -> nn.Module:
    vision = {**SHAPE, "patch_size": 8, "num_patches": 4}
    config = transformers.Siglip2Config(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
    torch.manual_seed(1)
    return built(transformers.Siglip2Model(config))


def chinese_clip() -> nn.Module:
    config = transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    torch.manual_seed(1)
    return built(transformers.ChineseCLIPModel(config))


def blip() -> nn.Module:
    text = {**TEXT, "encoder_hidden_size": 32, "projection_dim": 24, "sep_token_id": 9}
    config = transformers.BlipConfig(
        text_config=text, vision_config={**VISION, "projection_dim": 24}, projection_dim=24, image_text_hidden_size=24
    )
    torch.manual_seed(1)
    return built(transformers.BlipForImageTextRetrieval(config))


def patches(pixels: Tensor, patch: int = 8) -> dict[str, Tensor]:
    """What Siglip2ImageProcessor makes of square images."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    rows = torch.stack([convert_image_to_patches(image, patch) for image in pixels])
    side = pixels.shape[-1] // patch
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(len(rows), rows.shape[1], dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side]] * len(rows)),
    }


def pooled(output: Any) -> Any:
    return output if isinstance(output, Tensor) else output.pooler_output


def blip_scores(model: Any, pixels: Tensor, tokens: Tensor) -> Tensor:
    """The cosines [texts, images] of BLIP's own forward pass."""
    return model(tokens, pixels, use_itm_head=False, attention_mask=(tokens != 0).long()).itm_score


def from_pretrained(name: str) -> Callable[[Any], Any]:
    return lambda folder: getattr(transformers, name).from_pretrained(folder, local_files_only=True).eval()


def from_open_clip(folder: Any) -> Any:
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


def open_clip_family(
    make: Callable[[], Any], load: Callable[[Any], Any] = from_open_clip, size: int = 16
) -> TinyFamily:
    def first(output: Any) -> Any:
        return output[0] if isinstance(output, tuple) else output

    return TinyFamily(make, lambda m, x: first(m.encode_image(x)), lambda m, t: first(m.encode_text(t)), load, size)


def hugging_face_tower(folder: Any) -> Any:
    from cliperase_fast.models import load_model

    return load_model(f"local-dir:{folder}", tokenizer=word_tokenizer()).module


FAMILIES = {
    "siglip": TinyFamily(
        siglip, lambda m, x: pooled(m.get_image_features(pixel_values=x)),
        lambda m, t: pooled(m.get_text_features(input_ids=t)), from_pretrained("SiglipModel"),
    ),
    "siglip2": TinyFamily(
        siglip2, lambda m, x: pooled(m.get_image_features(**patches(x))),
        lambda m, t: pooled(m.get_text_features(input_ids=t)), from_pretrained("Siglip2Model"),
    ),
    "chinese_clip": TinyFamily(
        chinese_clip, lambda m, x: pooled(m.get_image_features(pixel_values=x)),
        lambda m, t: pooled(m.get_text_features(input_ids=t, attention_mask=(t != 0).long())),
        from_pretrained("ChineseCLIPModel"),
    ),
    "blip": TinyFamily(
        blip, lambda m, x: m.vision_proj(m.vision_model(pixel_values=x).last_hidden_state[:, 0]),
        lambda m, t: m.text_proj(m.text_encoder(t, attention_mask=(t != 0).long()).last_hidden_state[:, 0]),
        from_pretrained("BlipForImageTextRetrieval"),
    ),
    "open_clip siglip": open_clip_family(lambda: built(tiny_open_clip(custom_text=True, **SIGLIP))),
    "open_clip eva": open_clip_family(
        lambda: built(
            tiny_open_clip(**{**TIMM, "vision_cfg": {**TIMM["vision_cfg"], "timm_model_name": "eva02_tiny_patch14_224",
                                                     "timm_pool": "token", "image_size": 224}})
        ),
        size=224,
    ),
    "open_clip bert": open_clip_family(lambda: built(tiny_hugging_face()), hugging_face_tower),
}  # fmt: skip
