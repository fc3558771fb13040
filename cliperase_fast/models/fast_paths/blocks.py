"""Run open_clip's transformer blocks with less work and memory and the same values and gradients.

FirstTokenBlock: if an image's features are those of the class token, the other outputs of the last block are not used.
Those tokens are keys and values there, but need no query, output projection or MLP: 10 of a block's 12 products.

RecomputeBlock: a block stores about 17 numbers per input until the backward pass, 5 of them outputs of the second norm
and of the activation. Those are recomputed from their inputs, without a matrix product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cliperase_fast.models.adapters.base import ClipAdapter

_SMALL = 1 << 20  # with fewer numbers in a block's hidden layer, storing them costs less than the bookkeeping


@cache
def block_kinds() -> tuple[type, type, type]:
    """Return open_clip's block and our two variants of it."""
    from open_clip.transformer import ResidualAttentionBlock

    class RecomputeBlock(ResidualAttentionBlock):
        def forward(
            self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
        ) -> Tensor:  # [B, L, W] -> [B, L, W]
            if not torch.is_grad_enabled() or q_x.numel() * self.mlp.c_fc.out_features < _SMALL * q_x.shape[-1]:
                return super().forward(q_x, k_x, v_x, attn_mask)
            x = q_x + self.ls_1(self.attention(self.ln_1(q_x), attn_mask=attn_mask))
            # Recomputing stops once the last saved tensor is known, before the linear layer's product.
            hidden = checkpoint(self._widen, x, use_reentrant=False, preserve_rng_state=False)  # [B, L, 4 W]
            narrowed = checkpoint(self._narrow, hidden, use_reentrant=False, preserve_rng_state=False)
            return x + self.ls_2(narrowed)

        def _widen(self, x: Tensor) -> Tensor:
            return self.mlp.c_fc(self.ln_2(x))

        def _narrow(self, hidden: Tensor) -> Tensor:
            return self.mlp.c_proj(self.mlp.gelu(hidden))

    class FirstTokenBlock(ResidualAttentionBlock):
        def forward(
            self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
        ) -> Tensor:  # [B, L, W] -> [B, 1, W]
            normed = self.ln_1(q_x)
            x = q_x[:, :1] + self.ls_1(self.attention(normed[:, :1], normed, normed))
            return x + self.ls_2(self.mlp(self.ln_2(x)))

    return ResidualAttentionBlock, RecomputeBlock, FirstTokenBlock


def enable_recompute(adapter: ClipAdapter) -> None:
    """Turn the blocks of an open_clip model into those above, in place, if that changes no used output.

    Parameters and their names stay. Other models are not changed. `disable_recompute` undoes it.
    """
    if adapter.kind != "open_clip":
        return
    plain, recompute, first_token = block_kinds()
    last = _last_block(adapter)
    for block in adapter.module.modules():
        if type(block) is plain and not _watched(block) and not hasattr(block, "ln_1_kv"):
            if block is last:
                block.__class__ = first_token
            elif isinstance(block.mlp, nn.Sequential) and list(block.mlp._modules) == ["c_fc", "gelu", "c_proj"]:
                block.__class__ = recompute


def disable_recompute(adapter: ClipAdapter) -> None:
    """Restore open_clip's own blocks, in place."""
    if adapter.kind != "open_clip":
        return
    plain, *ours = block_kinds()
    for block in adapter.module.modules():
        if type(block) in ours:
            block.__class__ = plain


def plain_vision(adapter: ClipAdapter) -> Any:
    """Return the image tower if it is open_clip's vision transformer with its own forward and no hooks, else None."""
    visual = own_vision(adapter)
    if visual is None:
        return None
    from open_clip import transformer

    if type(visual) is not transformer.VisionTransformer or type(visual.transformer) is not transformer.Transformer:
        return None
    if not getattr(visual.transformer, "batch_first", True) or visual.output_tokens:
        return None
    return visual


def own_vision(adapter: ClipAdapter) -> Any:
    """Return the image tower of an open_clip model with open_clip's own encode_image and no hooks, else None."""
    if adapter.kind != "open_clip":
        return None
    import open_clip

    model: Any = adapter.module
    encoders = (open_clip.CLIP.encode_image, open_clip.CustomTextCLIP.encode_image)
    if "encode_image" in vars(model) or type(model).encode_image not in encoders:
        return None
    return None if _watched(model.visual) else model.visual


def _last_block(adapter: ClipAdapter) -> Any:
    """Return the last block of the image tower if only the class token of its output is used, else None."""
    visual = plain_vision(adapter)
    if visual is None or visual.pool_type != "tok" or visual.attn_pool is not None:
        return None
    if len(visual.transformer.resblocks) == 0:
        return None
    block = visual.transformer.resblocks[-1]
    fits = isinstance(block.attn, nn.MultiheadAttention) and block.attn.batch_first
    return block if fits else None


def _watched(module: nn.Module) -> bool:
    """Return whether a hook or a replaced forward sees the inputs or outputs of the module or of its parts."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())
