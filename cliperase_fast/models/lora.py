"""Add LoRA (Hu et al. 2021, arXiv 2106.09685) with `peft`, and fold it back into plain weights."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.models.adapters.base import ClipAdapter
from cliperase_fast.models.adapters.open_clip_config import probe_pixels
from cliperase_fast.models.requirements import computed_weights
from cliperase_fast.models.runtime import evaluating

# These read the weights of their inner layers without calling them (the second one only without gradients), so an
# update wrapped around such a layer would be lost.
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_log = logging.getLogger(__name__)


class SplitAttention(nn.Module):
    """Compute nn.MultiheadAttention's self-attention with two ordinary linear layers, which LoRA can wrap.

    peft's own class for nn.MultiheadAttention adds the output layer's update twice and rewrites the base
    weights in every forward pass.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """query: [B, L, D] ([L, B, D] unless batch_first); key and value are the same tensor (or aliases of it).

        attn_mask: added to the logits, [L, L] or [B * heads, L, L].
        """
        if need_weights or not (_is_same(key, query) and _is_same(value, query)):
            raise NotImplementedError("only self-attention without returned weights")
        x = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        parts = self.in_proj(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, L, D / heads] each
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(batch, self.heads, length, length)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def to_multihead_attention(self) -> nn.MultiheadAttention:
        """Return the nn.MultiheadAttention with these weights (the same parameters, not copies)."""
        width = self.out_proj.out_features
        attention: Any = nn.MultiheadAttention(
            width, self.heads, dropout=self.dropout, batch_first=self.batch_first,
            dtype=self.in_proj.weight.dtype, device="meta",
        )  # fmt: skip
        attention.in_proj_weight, attention.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        attention.out_proj.weight, attention.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return attention.train(self.training)


def inject_lora(adapter: ClipAdapter, rank: int, alpha: float) -> None:
    """Wrap the linear layers in both towers' blocks with LoRA updates, in place, and freeze everything else.

    These are attention and MLP layers, or the convolutions of a tower whose blocks have no linear layer. The update of
    a weight W is (alpha / rank) B A with B = 0 at first, so the features do not change yet.
    """
    peft: Any = import_extra("lora", 'trainable="lora"')
    for tower, blocks in zip(("image", "text"), adapter.blocks(), strict=True):
        if not blocks:
            raise InputError(
                f'trainable="lora" needs the blocks of the {tower} tower, which are unknown for this '
                f"{type(adapter.module).__name__} (a ModuleList or Sequential of modules of one class would be found): "
                'use trainable="all", "image" or "text"'
            )
        if adapter.kind == "open_clip":
            for block in blocks:
                _split_attention(block)
    targets = _target_names(adapter)
    pattern = "|".join(re.escape(name) for name in targets)  # full names, because a suffix could match other layers too
    scale: Any = alpha  # peft declares an int but accepts any number
    config = peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=pattern, lora_dropout=0.0, bias="none")
    peft.inject_adapter_in_model(config, adapter.module)


def merge_lora(adapter: ClipAdapter) -> None:
    """Fold LoRA updates into the weights, in place; this restores the original layers and state-dict keys.

    Does nothing to a model without LoRA layers.
    """
    module = adapter.module
    wrapped: dict[str, Any] = {name: child for name, child in module.named_modules() if hasattr(child, "lora_A")}
    for name, layer in wrapped.items():
        layer.merge(safe_merge=True)
        module.set_submodule(name, layer.get_base_layer())
    split = {name: child for name, child in module.named_modules() if isinstance(child, SplitAttention)}
    for name, attention in split.items():
        module.set_submodule(name, attention.to_multihead_attention())
    if wrapped and hasattr(module, "peft_config"):
        del module.peft_config


def _target_names(adapter: ClipAdapter) -> list[str]:
    names = {child: name for name, child in adapter.module.named_modules()}
    held = Counter(id(weight) for owner in adapter.module.modules() for weight in owner._parameters.values())
    shared = {weight for weight, owners in held.items() if owners > 1}  # folding would change the other owner too
    targets: list[str] = []
    for tower, blocks in zip(("image", "text"), adapter.blocks(), strict=True):
        inside = [child for block in blocks for child in block.modules()]
        bypassed = {child for owner in inside if isinstance(owner, _READS_WEIGHTS) for child in owner.modules()}
        usable = [child for child in inside if child not in bypassed]
        if tower == "image" and hasattr(getattr(adapter.module, "visual", None), "trunk"):
            called = _called(adapter, usable)
            usable = [child for child in usable if child in called]
        usable = [child for child in usable if not any(computed_weights(child)) and not shared & _weights(child)]
        # not those that neither encoder uses, such as BLIP's cross-attention
        usable = [child for child in usable if adapter.tower(f"{names[child]}.weight") == tower]
        layers: list[nn.Module] = [child for child in usable if isinstance(child, nn.Linear)]
        # A low-rank update mixes all channels, which a grouped convolution keeps apart.
        layers = layers or [child for child in usable if isinstance(child, nn.Conv2d) and child.groups == 1]
        if not layers:
            raise InputError(
                f'trainable="lora": the blocks of the {tower} tower have no linear layer or ungrouped 2-D convolution '
                'of their own to adapt; use trainable="all" or "last:K"'
            )
        left = len({id(child) for child in inside if isinstance(child, _WEIGHTED)}) - len(layers)
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        _log.info("LoRA adapts %d layers of the %s tower (%s) and skips %d", len(layers), tower, kinds, left)
        targets += [names[layer] for layer in layers]
    return targets


def _weights(layer: nn.Module) -> set[int]:
    return {id(weight) for weight in layer._parameters.values() if weight is not None}


@torch.no_grad()
def _called(adapter: ClipAdapter, layers: list[nn.Module]) -> set[nn.Module]:
    """Return the `layers` that the image tower calls: some timm blocks only read a layer's weight."""
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in layers]
    try:
        with evaluating(adapter.module):
            adapter.encode_image(probe_pixels(adapter.module))
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether both are one tensor or aliases of it: ZeRO-3 passes a module an alias of each input."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


def _split_attention(block: nn.Module) -> None:
    for name, child in list(block.named_modules()):
        if isinstance(child, nn.MultiheadAttention):
            block.set_submodule(name, SplitAttention(child).train(child.training))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer
