"""Outputs of the fused CLIPModel and SiglipModel: transformers' own, with logits computed when they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPOutput as StockClipOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput as StockSiglipOutput

_LOGITS = ("logits_per_image", "logits_per_text")


class _LogitsWhenRead:
    """An attribute that is computed unless the instance has it: instance attributes take precedence."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, output: Any, owner: type | None = None) -> Tensor | None:
        if output is None:
            return None  # the dataclass's default
        output.form_logits()
        return output.__dict__.get(self.name)


class _Fused:
    """A mixin for an output class of transformers.

    Reading `logits_per_image` or `logits_per_text`, as an attribute or by name, computes them, with gradient. So do
    positions after the loss and `to_tuple()`. `keys()`, `values()` and `items()` do not, because wrappers such as DDP
    and accelerate iterate over them in training. A wrapper's copy of the output has None there, and so does the output
    of a compiled model.
    """

    logits_per_image = _LogitsWhenRead()
    logits_per_text = _LogitsWhenRead()
    _pending: tuple[Tensor, Tensor | None, Any] | None = None

    @classmethod
    def with_logits(cls, model: Any, wanted: bool, **fields: Any) -> Any:
        """Build the output from its fields; compute the logits now if `wanted`, otherwise when they are read."""
        output: Any = cls(**fields)
        text = fields["text_embeds"]
        scale = model.logit_scale.exp().to(text.device)
        bias = model.logit_bias.to(text.device) if hasattr(model, "logit_bias") else None
        if torch.compiler.is_compiling() and not wanted:
            return output
        kind = text.device.type
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        output.__dict__["_pending"] = (scale, bias, autocast)
        if wanted:
            output.form_logits()
        else:
            for name in _LOGITS:
                del output.__dict__[name]
        return output

    def form_logits(self) -> None:
        """Compute pending logits as transformers does: [texts, images] and its transpose."""
        pending = self.__dict__.pop("_pending", None)
        if pending is None:
            return
        scale, bias, autocast = pending
        output: Any = self
        text, image = output.text_embeds, output.image_embeds
        with autocast:
            logits = torch.matmul(text, image.t().to(text.device)) * scale
            logits = logits if bias is None else logits + bias
        output.logits_per_image, output.logits_per_text = logits.t(), logits
        for name in ("text_embeds", "image_embeds", "text_model_output", "vision_model_output"):
            output.move_to_end(name)

    def to_tuple(self) -> tuple[Any, ...]:
        self.form_logits()
        return super().to_tuple()  # type: ignore[misc]

    def __getitem__(self, key: Any) -> Any:
        output: Any = self
        if isinstance(key, int) and key == 0:
            return output.loss  # needs no logits
        if key in _LOGITS:
            self.form_logits()
        return super().__getitem__(key)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        self.form_logits()
        return super().__reduce__()

    def get(self, key: str, default: Any = None) -> Any:
        if key in _LOGITS:
            self.form_logits()
        return super().get(key, default)  # type: ignore[misc]


class ClipOutput(_Fused, StockClipOutput):
    """`CLIPOutput`, see `_Fused`."""


class SiglipOutput(_Fused, StockSiglipOutput):
    """`SiglipOutput`, see `_Fused`."""
