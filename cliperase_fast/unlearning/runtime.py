"""Where and how the encoders run: device, precision, batch size, ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import autocast, check_precision, inference, pick_device


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
        device = pick_device(config.device)
        if ranks.group is not None:
            device = _of_rank(config.device, device, ranks)
            ranks.group.check_device(device)
        check_precision(config.precision, device)
        return cls(
            device, config.precision, config.eval_batch_size, config.num_workers, progress and ranks.first, ranks
        )

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def inference(self, adapter: ClipAdapter) -> AbstractContextManager[None]:
        return inference(adapter.module, self.device, self.precision)


def _of_rank(name: str, device: torch.device, ranks: Ranks) -> torch.device:
    """Return the GPU with this rank's local number."""
    if device.type != "cuda":
        return device
    if device.index is not None and ranks.size > 1:
        raise InputError(f"device={name!r} is one GPU and there are {ranks.size} ranks: use 'auto' or 'cuda'")
    if device.index is None:
        if ranks.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {ranks.rank} is process {ranks.local_rank + 1} of its machine and torch sees "
                f"{torch.cuda.device_count()} GPUs: start one process for each, or use device='cpu'"
            )
        device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device
