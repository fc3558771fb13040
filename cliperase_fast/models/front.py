"""The front of an image tower that a training leaves alone: from pixels to what the first trained block reads.

Where an image is the same in every epoch, so is that, and computing it once is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.models.adapter import ClipAdapter, normalise
from cliperase_fast.models.blocks import plain_vision


@dataclass(frozen=True)
class FrozenFront:
    """Image features in two parts: `rest(first(pixels))` is `encode_image(pixels)`."""

    first: Callable[[Tensor], Tensor]  # [B, 3, H, W] -> [B, ...], without a trained parameter
    rest: Callable[[Tensor], Tensor]  # -> [B, D]

    @classmethod
    def of(cls, adapter: ClipAdapter, pixels: Tensor) -> FrozenFront | None:
        """The most that is frozen of the image tower; None where that is not known to be anything.

        pixels: [B, 3, H, W] on the model's device, to try it on, in the mode that the model is in: both ways must give
        the same features, and nothing may be random.
        """
        if adapter.kind == "generic":  # whose encoders may share parameters
            return None
        image = [p for name, p in adapter.module.named_parameters() if adapter.tower(name) == "image"]
        trained = [parameter for parameter in image if parameter.requires_grad]
        front = cls(adapter.encode_image, lambda features: features) if not trained else _of_blocks(adapter, trained)
        return front if front is not None and front._holds(adapter, pixels) else None

    def _holds(self, adapter: ClipAdapter, pixels: Tensor) -> bool:
        with torch.no_grad():
            before = _random_states(pixels)
            features = self.rest(self.first(pixels))
            if any(not torch.equal(*states) for states in zip(before, _random_states(pixels), strict=True)):
                return False
            return torch.allclose(features, adapter.encode_image(pixels), rtol=1e-5, atol=1e-6)


def _of_blocks(adapter: ClipAdapter, trained: list[torch.nn.Parameter]) -> FrozenFront | None:
    """In front of the first block with a trained parameter, in open_clip's vision transformers."""
    visual: Any = plain_vision(adapter)
    if visual is None or not all(hasattr(visual, name) for name in ("_embeds", "_pool", "proj")):
        return None
    if visual.transformer.grad_checkpointing:  # which is the transformer's business, not the blocks'
        return None
    left = {id(parameter) for parameter in trained}
    blocks = list(visual.transformer.resblocks)
    count = 0  # of frozen blocks
    while count < len(blocks) and not any(id(parameter) in left for parameter in blocks[count].parameters()):
        count += 1
    behind = [*blocks[count:], visual.ln_post, *(part for part in (visual.attn_pool,) if part is not None)]
    left -= {id(parameter) for part in behind for parameter in part.parameters()} | {id(visual.proj)}
    if count == 0 or left:
        return None

    def first(pixels: Tensor) -> Tensor:
        x = visual._embeds(pixels)
        for block in blocks[:count]:
            x = block(x)
        return x

    def rest(x: Tensor) -> Tensor:
        for block in blocks[count:]:
            x = block(x)
        pooled = visual._pool(x)[0]
        return normalise(pooled if visual.proj is None else pooled @ visual.proj)

    return FrozenFront(first, rest)


def _random_states(like: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(like.device)] if like.is_cuda else states
