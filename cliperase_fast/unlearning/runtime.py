"""Where and how the encoders run: device, precision, batch size, ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import autocast, check_precision, device_of_rank, inference


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
        device = device_of_rank(config.device, ranks)
        check_precision(config.precision, device)
        return cls(
            device, config.precision, config.eval_batch_size, config.num_workers, progress and ranks.first, ranks
        )

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def inference(self, adapter: ClipAdapter) -> AbstractContextManager[None]:
        return inference(adapter.module, self.device, self.precision)
