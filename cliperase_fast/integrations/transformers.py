"""Compute the loss of transformers' CLIPModel and SiglipModel fused, by a patch or inside a Trainer.

`model(..., return_loss=True)` then gives the same loss and gradients without an N x N matrix. The logits are such a
matrix, so with return_loss they are computed when they are read (see `transformers_output.py`), or at once with
return_logits=True or return_dict=False, whose tuple has transformers' order. Calls without return_loss are not changed.
As in transformers, each process computes the loss of its own batch. Under autocast the loss is computed in float32,
while transformers rounds its logits to half precision.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cliperase_fast.contrastive import sigmoid_loss
from cliperase_fast.errors import InputError
from cliperase_fast.extras import require_version
from cliperase_fast.functional import clip_loss
from cliperase_fast.integrations.patching import Patch


def check_version() -> None:
    """Raise `InputError` if transformers is missing or its version is not supported."""
    require_version("transformers", ">=5.0,<6.0", extra="transformers")


check_version()

from transformers import CLIPModel, SiglipModel  # noqa: E402 - the check above has a better message than an ImportError
from transformers.models.clip import modeling_clip  # noqa: E402

from cliperase_fast.integrations import transformers_output as outputs  # noqa: E402

_STOCK: dict[type[nn.Module], Callable[..., Any]] = {kind: kind.forward for kind in (CLIPModel, SiglipModel)}


def _fused_clip(self: Any, image: Tensor, text: Tensor) -> Tensor:
    return clip_loss(text, image, self.logit_scale.exp().to(text.device))


def _fused_siglip(self: Any, image: Tensor, text: Tensor) -> Tensor:
    scale, bias = (parameter.to(text.device) for parameter in (self.logit_scale.exp(), self.logit_bias))
    return sigmoid_loss(text, image, scale, bias)


def _norm(features: Tensor) -> Tensor:
    return features.norm(p=2, dim=-1, keepdim=True)


_clip_norm: Callable[[Tensor], Tensor] = getattr(modeling_clip, "_get_vector_norm", _norm)  # the same rounding


def _fused_forward(
    stock: Callable[..., Any], output: Any, loss_of: Callable[[Any, Tensor, Tensor], Tensor]
) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        return_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if not return_loss:
            return stock(
                self, input_ids, pixel_values, attention_mask, position_ids, return_loss, interpolate_pos_encoding,
                return_dict=return_dict, **kwargs,
            )  # fmt: skip
        vision = self.get_image_features(
            pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        written = self.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        norm = _norm if loss_of is _fused_siglip else _clip_norm
        image, text = (features / norm(features) for features in (vision.pooler_output, written.pooler_output))
        image_here = image.to(text.device)  # the towers may be on two devices
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        wanted = return_logits or not return_dict
        result = output.with_logits(
            self, wanted, loss=loss_of(self, image_here, text), text_embeds=text, image_embeds=image,
            text_model_output=written, vision_model_output=vision,
        )  # fmt: skip
        return result if return_dict else result.to_tuple()

    return forward


_FUSED: dict[type[nn.Module], Callable[..., Any]] = {
    CLIPModel: _fused_forward(_STOCK[CLIPModel], outputs.ClipOutput, _fused_clip),
    SiglipModel: _fused_forward(_STOCK[SiglipModel], outputs.SiglipOutput, _fused_siglip),
}


def patch_transformers_clip() -> Patch:
    """Make every CLIPModel and SiglipModel compute its loss fused, from now on or for a `with` block.

    This includes existing models, except those whose forward was replaced before (by Trainer or accelerate) and
    subclasses with their own forward. A replaced `CLIPModel.forward` is not changed. Patching twice has no effect.
    """
    check_version()
    return Patch(_swap(_STOCK, _FUSED), unpatch_transformers_clip)


def unpatch_transformers_clip() -> None:
    """Restore transformers' own forward methods. Does nothing if nothing is patched."""
    _swap(_FUSED, _STOCK)


def _swap(
    found: dict[type[nn.Module], Callable[..., Any]], replacement: dict[type[nn.Module], Callable[..., Any]]
) -> list[str]:
    swapped = []
    for kind, forward in found.items():
        if kind.__dict__["forward"] is forward:
            kind.forward = replacement[kind]  # type: ignore[method-assign]
            swapped.append(f"{kind.__name__}.forward")
    return swapped


def fuse_loss(model: nn.Module) -> nn.Module:
    """Make the loss of this model, or of the only CLIPModel or SiglipModel it wraps (peft), fused; return `model`.

    Raises `InputError` if there is no such model, or if it has its own forward.
    """
    inner = _inner(model)
    kind = next(kind for kind in _STOCK if isinstance(inner, kind))
    current = getattr(inner.forward, "__func__", inner.forward)
    if current is not _FUSED[kind]:
        if current is not _STOCK[kind]:
            raise InputError(
                f"this {type(inner).__name__} has its own forward, which the fused loss would bypass; "
                "compute the loss there with cliperase_fast.functional.clip_loss"
            )
        inner.forward = types.MethodType(_FUSED[kind], inner)
    return model


def unfuse_loss(model: nn.Module) -> nn.Module:
    """Undo `fuse_loss`; return `model`."""
    _inner(model).__dict__.pop("forward", None)
    return model


def _inner(model: nn.Module) -> nn.Module:
    found = [module for module in model.modules() if isinstance(module, tuple(_STOCK))]
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} holds {len(found)} CLIPModel or SiglipModel; the fused loss needs exactly one"
        )
    return found[0]


class FusedLossMixin:
    """Fuse the loss in a Trainer of a CLIPModel or SiglipModel: `class MyTrainer(FusedLossMixin, Trainer)`.

    In training and evaluation the loss is the model's own contrastive loss, fused; batches need no "return_loss".
    accelerate, DDP and DeepSpeed work as Trainer sets them up, because the loss is computed in the model's forward.
    Predictions, for `compute_metrics` and `predict`, are transformers' own, logits first; nothing else computes logits.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(model if model is None else fuse_loss(model), *args, **kwargs)  # type: ignore[call-arg]
        self.can_return_loss = True  # in evaluation

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return fuse_loss(super().call_model_init(trial))  # type: ignore[misc]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if not prediction_loss_only:
            inputs = {**inputs, "return_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_loss": True}, *args, **kwargs)  # type: ignore[misc]
