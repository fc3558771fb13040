"""Where and how the encoders run: device, precision, batch size, ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.loading import load_batches, stack_images
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import autocast, check_precision, device_of_rank, inference
from cliperase_fast.progress import Steps

Keep = Callable[[int, Tensor], None]  # takes the number of the first row, and rows [n, ...] on the CPU


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    batch_size: int  # without gradient
    num_workers: int
    progress: bool
    ranks: Ranks = SINGLE_PROCESS

    @classmethod
    def from_config(cls, config: UnlearnConfig, progress: bool, ranks: Ranks) -> Runtime:
        """Build it from the settings. `auto` is float32 here, until the model is known (`choose_precision`)."""
        device = device_of_rank(config.device, ranks)
        precision = "fp32" if config.precision == AUTO else config.precision
        check_precision(precision, device)
        return cls(device, precision, config.eval_batch_size, config.num_workers, progress and ranks.first, ranks)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def inference(self, adapter: ClipAdapter) -> AbstractContextManager[None]:
        return inference(adapter.module, self.device, self.precision)

    def encode_images(
        self,
        images: Dataset,
        used: np.ndarray,
        encode: Callable[[Tensor], Tensor],
        keep: Keep | None,
        what: str,
        generator: torch.Generator | None = None,
    ) -> None:
        """Encode the `used` images, each on one rank, and pass the results of all ranks to `keep`, part by part.

        images: by (index, draw), as `PixelDataset`. encode: takes [B, 3, H, W] on the device and returns rows [B, ...];
            every rank calls it equally often, so it may exchange data. keep: None on a rank that needs no results.
        what: the title of the progress bar. generator: of the loader, None for the global one.
        An error on any rank is raised on all.
        """
        parts = np.split(used, range(self.batch_size, len(used), self.batch_size))
        shares = self.ranks.shares(len(parts))
        loader = DataLoader(
            images,
            batch_sampler=[[(int(index), 0) for index in part] for part in parts[shares[self.ranks.rank]]],
            num_workers=self.num_workers,
            collate_fn=stack_images,
            generator=generator,
        )
        rounds = max(share.stop - share.start for share in shares)
        own = load_batches(loader)

        def next_pixels() -> tuple[Tensor, bool]:
            for pixels in islice(own, 1):
                return pixels, True
            return stack_images([images[int(used[0]), 0]]), False  # encoded only because the other ranks wait

        with Steps(rounds, what, "batch", bar=self.progress) as steps:
            for turn in range(rounds):
                parts_of_turn = [parts[share][turn : turn + 1] for share in shares]  # the last may have none
                counts = [sum(map(len, part)) for part in parts_of_turn]
                pixels, mine = self.ranks.run_on_all(next_pixels)

                def encoded(pixels: Tensor = pixels, mine: bool = mine) -> list[Tensor]:
                    return [encode(pixels.to(self.device)).cpu()][: int(mine)]

                found = self.ranks.all_gather_rows(encoded, counts)
                for share, of_rank in zip(shares, found.split(counts), strict=True):
                    if keep is not None and len(of_rank):
                        keep((share.start + turn) * self.batch_size, of_rank)
                steps.update()
