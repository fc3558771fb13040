"""Load images for many epochs: batches from loader processes, and a cache of transformed images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from cliperase_fast.data.images import ImageStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError


def load_batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the loader's batches; raise an `InputError` of a loader process without torch's copy of the traceback."""
    try:
        yield from loader
    except InputError as error:
        text = str(error).rstrip()
        if "Original Traceback" not in text:
            raise
        raise InputError(text.rpartition("\n")[2].partition(": ")[2]) from error


class PixelCache:
    """Keep images of any data sets under one deterministic transform, up to `budget` bytes.

    For one process: a cache in each loader process would multiply the memory and rarely hit.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._kept: dict[tuple[ImageStore, int], Tensor] = {}

    def pixels(self, pairs: PairDataset, index: int, transform: Callable[[Any], Tensor]) -> Tensor:
        """Return image `index` transformed, [3, H, W]; do not write to it. The caller's tensors are returned as is."""
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
        """Return the bytes that would be left without the images of `pairs`."""
        return self.left + sum(_size(self._kept[key]) for key in self._keys(pairs))

    def make_room(self, wanted: PairDataset, unwanted: PairDataset) -> None:
        """Drop the images of `unwanted` unless all those of `wanted` fit beside them."""
        size = max((_size(pixels) for pixels in self._kept.values()), default=0)
        if (len(wanted) - len(self._keys(wanted))) * size > self.left:
            self.drop(unwanted, reserve=0)

    def drop(self, pairs: PairDataset, reserve: int) -> None:
        """Drop the images of `pairs` and reserve bytes for something else."""
        for key in self._keys(pairs):
            self.left += _size(self._kept.pop(key))
        self.left -= reserve

    def _keys(self, pairs: PairDataset) -> set[tuple[ImageStore, int]]:
        return {key for position in pairs.positions if (key := (pairs.store, int(position))) in self._kept}


def _size(pixels: Tensor) -> int:
    return pixels.numel() * pixels.element_size()
