"""Any module with two encoders and a scale."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from cliperase_fast.models.adapters.base import ClipAdapter, Tower, longest_stack
from cliperase_fast.models.saving import save_weights

_IMAGE_WORDS = {"visual", "vision", "image", "images", "img", "pixel", "pixels"}
_TEXT_WORDS = {"text", "texts", "txt", "token", "tokens", "transformer", "language", "caption", "captions"}
_TAIL_WORDS = {"proj", "projection", "head", "norm", "ln", "layernorm", "final", "post", "pool", "pooler"}
_BODY_WORDS = {"pre", "embed", "embedding", "embeddings", "pos", "position", "positional", "patch", "stem"}


class GenericAdapter(ClipAdapter):
    """Wrap any module with `encode_image(pixels)`, `encode_text(tokens)` (both -> [B, D]) and `logit_scale`.

    logit_scale: the log of the scale, a parameter, buffer or plain tensor. Towers and blocks are guessed from the
    names of the parameters when they are needed.
    """

    kind = "generic"
    _marker = "model.safetensors"

    def tower(self, name: str) -> Tower | None:
        if name in ("logit_scale", "logit_bias"):
            return "scale" if name == "logit_scale" else None
        for word in _words(name):  # the outermost one decides: image_encoder.transformer belongs to the image tower
            if word in _IMAGE_WORDS:
                return "image"
            if word in _TEXT_WORDS:
                return "text"
        return None

    def is_tail(self, name: str) -> bool:
        words = set(_words(name))
        return bool(words & _TAIL_WORDS) and not words & _BODY_WORDS

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        return longest_stack(child for name, child in self.module.named_modules() if self.tower(name) == tower)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens)

    def _write(self, directory: Path, final: Path) -> None:
        save_weights(self.saved_state(), directory / "model.safetensors")


def missing_parts(module: nn.Module) -> list[str]:
    """Return what the module lacks to be wrapped in a `GenericAdapter`."""
    missing = [f"{name}()" for name in ("encode_image", "encode_text") if not callable(getattr(module, name, None))]
    if not isinstance(getattr(module, "logit_scale", None), Tensor):
        missing.append("logit_scale (a parameter or tensor that holds the log of the scale)")
    return missing


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
