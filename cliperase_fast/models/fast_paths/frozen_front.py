"""Split off the frozen front of an image tower: from the pixels to the input of the first trained block.

If an image is the same in every epoch, so is the output of the front, and computing it once is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import ClipAdapter, normalise
from cliperase_fast.models.fast_paths.blocks import own_vision, plain_vision
from cliperase_fast.models.runtime import in_fast_layout

# Of timm's convolutional towers: the layers before the stages, the stages, and the layers between them and the head.
_TIMM_TOWERS = {
    "EfficientNet": (("conv_stem", "bn1"), "blocks", ("conv_head", "bn2")),
    "ConvNeXt": (("stem",), "stages", ("norm_pre",)),
}


@dataclass(frozen=True)
class FrozenFront:
    """Image features in two parts: `rest(first(pixels))` is `encode_image(pixels)`.

    owners: modules whose parameters the parts use without calling the modules' own forward passes.
    """

    first: Callable[[Tensor], Tensor]  # [B, 3, H, W] -> [B, ...], without a trained parameter
    rest: Callable[[Tensor], Tensor]  # -> [B, D]
    owners: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, adapter: ClipAdapter, pixels: Tensor) -> FrozenFront | None:
        """Return the longest frozen front of the image tower that is known; None if there is none.

        pixels: [B, 3, H, W] on the model's device, to try it with in the model's current mode: both parts together must
        give the same features as the tower, without drawing random numbers.
        """
        for front in (cls(adapter.encode_image, lambda features: features), _of_blocks(adapter), _of_timm(adapter)):
            if front is not None and front._holds(adapter, pixels):
                return front
        return None

    def _holds(self, adapter: ClipAdapter, pixels: Tensor) -> bool:
        before = _random_states(pixels)
        with torch.enable_grad():
            made = self.first(pixels)
        unchanged = all(torch.equal(*states) for states in zip(before, _random_states(pixels), strict=True))
        if made.requires_grad or not unchanged:  # a gradient would reach a trained parameter
            return False
        with torch.no_grad():
            found, expected = self.rest(made), adapter.encode_image(pixels)
            return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def _of_blocks(adapter: ClipAdapter) -> FrozenFront | None:
    """Split open_clip's vision transformer before the first block with a trained parameter."""
    visual: Any = plain_vision(adapter)
    if visual is None or not all(hasattr(visual, name) for name in ("_embeds", "_pool", "proj")):
        return None
    if visual.transformer.grad_checkpointing:  # done by the transformer, not by its blocks
        return None
    blocks = list(visual.transformer.resblocks)
    count = _count_frozen(blocks)
    if count == 0:
        return None

    def first(pixels: Tensor) -> Tensor:
        return _through(blocks[:count], visual._embeds(pixels))

    def rest(x: Tensor) -> Tensor:
        pooled = visual._pool(_through(blocks[count:], x))[0]
        return normalise(pooled if visual.proj is None else pooled @ visual.proj)

    return FrozenFront(first, rest, (visual, visual.transformer))


def _of_timm(adapter: ClipAdapter) -> FrozenFront | None:
    """Split a convolutional tower of timm's before the first stage with a trained parameter."""
    visual: Any = own_vision(adapter)
    timm = sys.modules.get("timm")
    if visual is None or timm is None or not hasattr(visual, "trunk"):
        return None
    trunk = visual.trunk
    kind = type(trunk)
    if kind.__name__ not in _TIMM_TOWERS or kind is not getattr(timm.models, kind.__name__, None):
        return None
    before, stages, after = _TIMM_TOWERS[kind.__name__]
    if getattr(trunk, "grad_checkpointing", False):  # done by the trunk, not by its stages
        return None
    blocks = list(getattr(trunk, stages))
    count = _count_frozen(blocks)
    if count == 0:
        return None
    front = [*(getattr(trunk, name) for name in before), *blocks[:count]]
    back = [*blocks[count:], *(getattr(trunk, name) for name in after)]

    def first(pixels: Tensor) -> Tensor:
        return _through(front, in_fast_layout(visual, pixels))

    def rest(x: Tensor) -> Tensor:
        return normalise(visual.head(trunk.forward_head(_through(back, in_fast_layout(visual, x)))))

    return FrozenFront(first, rest, (visual, trunk))


def _count_frozen(blocks: list[nn.Module]) -> int:
    """Return how many of the first blocks have no trained parameter."""
    trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return trained.index(True) if True in trained else len(blocks)


def _through(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _random_states(like: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(like.device)] if like.is_cuda else states
