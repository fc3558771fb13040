"""The adapters of transformers' models with BERT as their text tower: ChineseCLIPModel and BLIP's retrieval model."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import Projection, Tower
from cliperase_fast.models.adapters.transformers import PretrainedAdapter, family_of, pooled

_BLIP_TEMPERATURE = 0.07  # at which its training starts; checkpoints of transformers do not hold the learned one


class BertTowerAdapter(PretrainedAdapter):
    """Wrap a model whose text tower hides padding from its attention, so that captions are cut to the longest."""

    @property
    def _padding(self) -> int:
        return int(self._config.text_config.pad_token_id or 0)

    def _read_length(self, tokens: Tensor) -> int:
        read = (tokens != self._padding).any(dim=0).nonzero()
        return max(1, int(read[-1]) + 1 if len(read) else 1)

    def _mask(self, tokens: Tensor) -> Tensor:
        return (tokens != self._padding).long()  # [B, L]


class ChineseClipAdapter(BertTowerAdapter):
    """Wrap a ChineseCLIPModel."""

    kind = "chinese_clip"
    model_class, config_class = "ChineseCLIPModel", "ChineseCLIPConfig"
    processor_class = "ChineseCLIPImageProcessor"
    _tail = re.compile(r"(vision_model\.post_layernorm|visual_projection|text_projection)\b")

    def _default_image_processor(self) -> Any:
        import transformers

        height, width = self._image_size
        size = {"height": height, "width": width}
        return transformers.ChineseCLIPImageProcessor(size=size, crop_size=size)

    def tower(self, name: str) -> Tower | None:
        if name == "logit_scale":
            return "scale"
        return "image" if name.startswith(("vision_model.", "visual_projection.")) else "text"

    def is_tail(self, name: str) -> bool:
        return self._tail.match(name) is not None

    def projection(self, tower: Tower) -> Projection | None:
        return Projection(self.module, "visual_projection" if tower == "image" else "text_projection", nn.Identity())

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict as transformers loads it: with 0 for the padding token, whose row nothing reads."""
        state = super().saved_state()
        name = "text_model.embeddings.word_embeddings.weight"
        table = state[name].clone()
        table[self._padding] = 0
        return {**state, name: table}

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        if tower == "image":
            return list(self._model.vision_model.encoder.layers)
        return list(self._model.text_model.encoder.layer)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return pooled(self._model.get_text_features(input_ids=tokens, attention_mask=self._mask(tokens)))


class BlipAdapter(BertTowerAdapter):
    """Wrap a BlipForImageTextRetrieval: its two contrastive heads.

    The matching head and the cross-attention in front of it are left alone: they are neither trained nor measured, and
    still use the towers. The scale is a constant, 1 / 0.07: published checkpoints do not hold the learned temperature.
    """

    kind = "blip"
    model_class, config_class = "BlipForImageTextRetrieval", "BlipConfig"
    processor_class = "BlipImageProcessor"
    _tail = re.compile(r"(vision_model\.post_layernorm|vision_proj|text_proj)\b")

    def log_scale(self) -> Tensor:
        like = self._model.text_proj.weight
        return torch.full((), -math.log(_BLIP_TEMPERATURE), dtype=torch.float32, device=like.device)

    def tower(self, name: str) -> Tower | None:
        if name.startswith(("vision_model.", "vision_proj.")):
            return "image"
        return None if name.startswith("itm_head.") or ".crossattention." in name else "text"

    def is_tail(self, name: str) -> bool:
        return self._tail.match(name) is not None

    def projection(self, tower: Tower) -> Projection | None:
        return Projection(self.module, "vision_proj" if tower == "image" else "text_proj", nn.Identity())

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        if tower == "image":
            return list(self._model.vision_model.encoder.layers)
        return list(self._model.text_encoder.encoder.layer)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.vision_proj(self._model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])

    def _text_features(self, tokens: Tensor) -> Tensor:
        encoded = self._model.text_encoder(input_ids=tokens, attention_mask=self._mask(tokens))
        return self._model.text_proj(encoded.last_hidden_state[:, 0])


CHINESE_CLIP = family_of(ChineseClipAdapter, "chinese_clip")
BLIP = family_of(BlipAdapter, "blip")
