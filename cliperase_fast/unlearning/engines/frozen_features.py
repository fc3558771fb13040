"""Train from the activations of the frozen first layers of the image tower, computed once for each image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cliperase_fast.data.loading import stack_images
from cliperase_fast.models.runtime import encoding_fits
from cliperase_fast.unlearning.batches import BatchLoader
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.runtime import Runtime

_PASSES = 2  # over the images; below this, computing all of them first gains nothing


def keep_front(engine: Engine, loader: BatchLoader, batches: int, budget: int, runtime: Runtime) -> None:
    """Let `loader` yield kept activations in place of images, and `engine` train from them, where possible.

    The transform must be deterministic and nothing else may need the images. batches: of the whole run. budget: bytes
    for images on each rank, including those that the loader keeps already. The ranks share the work, and each keeps the
    activations of all images.
    """
    pairs, cache, ranks = loader.pixels.pairs, loader.pixels.cache, runtime.ranks
    if batches * sum(loader.pairs_of_ranks()) < _PASSES * len(pairs):
        return
    probe = ranks.run_on_all(lambda: stack_images([loader.pixels[0, 0]]))
    with encoding_fits():
        if not engine.find_front(probe):
            return
        kept = engine.front_of(probe.to(runtime.device))
        size = len(pairs) * kept.numel() * kept.element_size()
        too_large = size > (budget if cache is None else cache.room_without(pairs))
        if any(ranks.all_reduce_max(int(too_large))):
            return
        activations = torch.empty(len(pairs), *kept.shape[1:], dtype=kept.dtype, device="cpu")

        def keep(start: int, rows: Tensor) -> None:
            activations[start : start + len(rows)] = rows

        numbers, generator = np.arange(len(pairs)), torch.Generator("cpu")
        runtime.encode_images(loader.pixels, numbers, engine.front_of, keep, "frozen layers", generator)
    if cache is not None:
        cache.drop(pairs, reserve=size)
    loader.images = _Activations(activations)
    engine.train_from_front()


class _Activations(Dataset):
    """Activations of each image, by (index, draw) as the images themselves."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self.kept[key[0]]
