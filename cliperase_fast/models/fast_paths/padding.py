"""Drop the padding after the longest caption, for text towers whose features provably do not depend on it.

A causal tower that takes a caption's features at its end token never sees the positions after that token. Cutting a
batch to its longest caption then changes neither features nor gradients. Of 77 positions, "a photo of a dog" needs 7.
The same holds for open_clip's towers from transformers that hide the padding from attention and pooling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# In transformers: encoders whose attention never reads padding, and whose positions count from the first token.
_HIDE_PADDING = ("bert", "roberta", "xlm-roberta")


def end_position(tokens: Tensor, end: int | None) -> Tensor:  # [B, L] -> int64 [B]
    """Return the position of the features: the first `end`, or the highest id if `end` is None, as in CLIP."""
    return tokens.argmax(dim=1) if end is None else (tokens == end).int().argmax(dim=1)


def read_length(tokens: Tensor, end: int | None) -> int:
    """Return how many positions of these captions [B, L] can affect the features."""
    return int(end_position(tokens, end).max()) + 1 if len(tokens) else tokens.shape[1]


def masked_length(module: Any, tokens: Tensor) -> int:
    """Return how many positions a tower from transformers reads: all up to the last one that is not padding.

    All of them unless every part of the tower is known to hide the padding. module: the open_clip model.
    """
    import open_clip
    from open_clip import hf_model

    text = module.text
    poolers = (hf_model.MeanPooler, hf_model.ClsPooler, hf_model.ClsLastHiddenStatePooler)
    known = (
        type(module).encode_text is open_clip.CustomTextCLIP.encode_text
        and "encode_text" not in vars(module)
        and type(text) is hf_model.HFTextEncoder
        and type(text.pooler) in poolers
        and text.config.model_type in _HIDE_PADDING
        and type(text.transformer).__module__.startswith("transformers.models.")
        and not _hooked(text)
        and not text.output_tokens
    )
    if not known:
        return tokens.shape[1]
    read = (tokens != text.config.pad_token_id).any(dim=0).nonzero()
    return int(read[-1]) + 1 if len(read) else tokens.shape[1]


def is_causal(mask: Tensor) -> bool:
    """Return whether an additive mask [L, L] hides exactly the later positions from each position."""
    return mask.ndim == 2 and torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))


class CausalReader:
    """Run open_clip's causal text tower on captions shorter than its context.

    tower: the module with the tower's parts, the CLIP model or its TextTransformer. end: see `end_position`.
    """

    def __init__(self, tower: Any, end: int | None) -> None:
        self.tower, self.end = tower, end
        self.mask: Tensor = tower.attn_mask

    @classmethod
    def of(cls, module: Any) -> CausalReader | None:
        """Return the reader of a model; None unless every part of its text tower is known to be safe."""
        import open_clip
        from open_clip import transformer

        from cliperase_fast.models.fast_paths.blocks import block_kinds
        from cliperase_fast.models.lora import SplitAttention

        if "encode_text" in vars(module):
            return None
        if type(module).encode_text is open_clip.CLIP.encode_text:
            tower, pooling, end = module, getattr(module, "text_pool_type", ""), getattr(module, "text_eos_id", None)
        elif type(module).encode_text is open_clip.CustomTextCLIP.encode_text:
            tower = module.text
            if type(tower) is not transformer.TextTransformer or _hooked(tower):
                return None
            if tower.cls_emb is not None or getattr(tower, "use_pad_mask", False) or tower.output_tokens:
                return None
            pooling, end = tower.pool_type, getattr(tower, "eos_id", None)
        else:
            return None
        blocks = getattr(tower.transformer, "resblocks", ())
        known = (*block_kinds(), transformer.CustomResidualAttentionBlock)
        attentions = (nn.MultiheadAttention, transformer.Attention, SplitAttention)
        if type(tower.transformer) is not transformer.Transformer or not all(
            type(block) in known and isinstance(block.attn, attentions) for block in blocks
        ):
            return None
        mask = getattr(tower, "attn_mask", None)
        if pooling not in ("argmax", "eos") or (pooling == "eos" and end is None):
            return None
        if not isinstance(mask, Tensor) or not is_causal(mask):
            return None
        return cls(tower, end if pooling == "eos" else None)

    def __call__(self, tokens: Tensor) -> Tensor:  # [B, L] with L up to the context -> [B, D]
        tower, length = self.tower, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)  # [B, L, W]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        x = x[torch.arange(len(x), dtype=torch.int64, device=x.device), end_position(tokens, self.end)]  # [B, W]
        x = tower.ln_final(x)
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
