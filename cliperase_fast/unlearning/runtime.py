"""The part of the settings that says where and how the encoders run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import autocast, check_precision, inference, pick_device


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    batch_size: int  # where no gradient is needed
    num_workers: int
    progress: bool

    @classmethod
    def from_config(cls, config: UnlearnConfig, progress: bool) -> Runtime:
        device = pick_device(config.device)
        check_precision(config.precision, device)
        return cls(device, config.precision, config.eval_batch_size, config.num_workers, progress)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def inference(self, adapter: ClipAdapter) -> AbstractContextManager[None]:
        return inference(adapter.module, self.device, self.precision)
