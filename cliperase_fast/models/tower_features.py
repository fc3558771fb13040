"""Encode with a tower's own features beside the projected ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from cliperase_fast.defaults import torch_defaults
from cliperase_fast.models.adapters.base import ClipAdapter, Projection, normalise


def with_tower_features(adapter: ClipAdapter, pixels: Tensor, tokens: Tensor) -> ClipAdapter:
    """Return an adapter of the same module whose encoders return [B, D + W]: after D features W of the tower itself.

    The latter are those before the tower's projection, not normalised. A tower without a known projection has its
    unnormalised features in their place. pixels [1, 3, H, W], tokens [1, L]: tried, to see that the projection gives
    the tower's features.
    """
    twin = copy.copy(adapter)
    for method, encode, raw, projection, probe in (
        ("encode_image", adapter.encode_image, adapter.image_output, adapter.projection("image"), pixels),
        ("encode_text", adapter.encode_text, adapter.text_output, adapter.projection("text"), tokens),
    ):
        wide = _encoder(raw, projection)
        if projection is not None:
            expected = encode(probe)
            if not torch.allclose(wide(probe)[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5):
                wide = _encoder(raw, None)
        setattr(twin, method, wide)
    return twin


def _encoder(raw: Callable[[Tensor], Tensor], projection: Projection | None) -> Callable[[Tensor], Tensor]:
    @torch_defaults()
    def encode(rows: Tensor) -> Tensor:  # -> [B, D + W]
        if projection is None:
            own = features = raw(rows)
        else:
            with projection.left_out():
                own = raw(rows)
            features = projection(own)
        return torch.cat([normalise(features), own], dim=1)

    return encode
