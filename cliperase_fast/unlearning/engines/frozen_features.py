"""Train from the activations of the frozen first layers of the image tower, computed once for each image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.models.runtime import encoding_fits
from cliperase_fast.progress import Steps
from cliperase_fast.unlearning.batches import BatchLoader
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.runtime import Runtime

_PASSES = 2  # over the images; below this, computing all of them first gains nothing


def keep_front(engine: LocalEngine, loader: BatchLoader, batches: int, budget: int, runtime: Runtime) -> None:
    """Let `loader` yield kept activations in place of images, and `engine` train from them, where possible.

    The transform must be deterministic and nothing else may need the images. batches: of the whole run. budget: bytes
    for images, including those that the loader keeps already.
    """
    pairs, cache = loader.pixels.pairs, loader.pixels.cache
    if batches * sum(loader.pairs_of_ranks()) < _PASSES * len(pairs):
        return
    engine.train_mode()  # the mode of the steps, in which the front must not be random
    probe = loader.pixels[0, 0][None].to(runtime.device)
    with encoding_fits(), torch.no_grad(), runtime.autocast():
        front = FrozenFront.of(engine.student, probe)
        if front is None:
            return
        kept = front.first(probe)
        size = len(pairs) * kept.numel() * kept.element_size()
        if size > (budget if cache is None else cache.room_without(pairs)):
            return
        numbers = torch.arange(len(pairs), dtype=torch.int64, device="cpu").split(runtime.batch_size)
        images = DataLoader(
            loader.pixels,
            batch_sampler=[[(int(index), 0) for index in part] for part in numbers],
            num_workers=runtime.num_workers,
            collate_fn=torch.stack,
            generator=torch.Generator("cpu"),
        )
        activations = torch.empty(len(pairs), *kept.shape[1:], dtype=kept.dtype, device="cpu")
        with Steps(len(numbers), "frozen layers", "batch", bar=runtime.progress) as steps:
            for part, pixels in zip(numbers, images, strict=True):
                activations[part] = front.first(pixels.to(runtime.device)).cpu()
                steps.update()
    if cache is not None:
        cache.drop(pairs, reserve=size)
    loader.images = _Activations(activations)
    engine.encode_image = front.rest


class _Activations(Dataset):
    """Activations of each image, by (index, draw) as the images themselves."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self.kept[key[0]]
