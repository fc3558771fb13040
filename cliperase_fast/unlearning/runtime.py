"""Where and how the encoders run: device, arithmetic, evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    precision: torch.dtype | None  # of autocast; None: the parameters' own
    batch_size: int  # where no gradient is needed
    num_workers: int
    progress: bool

    @classmethod
    def from_config(cls, config: UnlearnConfig, progress: bool) -> Runtime:
        device = pick_device(config.device)
        if config.precision == "fp16" and device.type != "cuda":
            raise InputError(f"precision='fp16' needs a GPU and the device is {device}; use 'bf16' or 'fp32'")
        precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        return cls(device, precision, config.eval_batch_size, config.num_workers, progress)

    def autocast(self) -> torch.autocast:
        dtype = self.precision or torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision is not None)


class inference:  # noqa: N801 - used as a statement
    """No gradients, evaluation mode (put back afterwards), and the runtime's arithmetic."""

    def __init__(self, adapter: ClipAdapter, runtime: Runtime) -> None:
        self.module = adapter.module
        self.no_grad, self.autocast = torch.no_grad(), runtime.autocast()

    def __enter__(self) -> None:
        self.training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        self.no_grad.__enter__()
        self.autocast.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.autocast.__exit__(kind, error, trace)
        self.no_grad.__exit__(kind, error, trace)
        for module in self.training:
            module.training = True


def pick_device(name: str) -> torch.device:
    """The device by that name; "auto" is the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use cpu or auto")
    return device
