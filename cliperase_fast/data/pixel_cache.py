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
        size = _size(pixels)
        if size <= self.left:
            self._kept[key] = pixels
            self.left -= size
        return pixels

    def room_without(self, pairs: PairDataset) -> int:
        """Bytes left if the images of `pairs` were dropped."""
        return self.left + sum(_size(self._kept[key]) for key in self._keys(pairs))

    def drop(self, pairs: PairDataset, reserve: int) -> None:
        """Drop the images of `pairs` for something else of `reserve` bytes."""
        for key in self._keys(pairs):
            self.left += _size(self._kept.pop(key))
        self.left -= reserve

    def _keys(self, pairs: PairDataset) -> set[tuple[ImageStore, int]]:
        return {key for position in pairs.positions if (key := (pairs.store, int(position))) in self._kept}


def _size(pixels: Tensor) -> int:
    return pixels.numel() * pixels.element_size()
