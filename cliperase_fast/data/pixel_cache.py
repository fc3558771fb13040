"""Transformed images kept in memory, so that a run that sees each many times reads and transforms it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cliperase_fast.data.images import ImageStore
from cliperase_fast.data.pairs import PairDataset


class PixelCache:
    """Images of any number of data sets under one deterministic transform, as many as fit into `budget` bytes.

    For one process: a copy in each loader process would multiply the memory and miss most of the time.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._kept: dict[tuple[ImageStore, int], Tensor] = {}

    def pixels(self, pairs: PairDataset, index: int, transform: Callable[[Any], Tensor]) -> Tensor:
        """Image `index` transformed, [3, H, W]; not to be written to. The caller's tensors pass as they are."""
        key = pairs.store, int(pairs.positions[index])
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        image = pairs.image(index)
        if isinstance(image, Tensor):
            return image
        pixels = transform(image)
        size = pixels.numel() * pixels.element_size()
        if size <= self.left:
            self._kept[key] = pixels
            self.left -= size
        return pixels
