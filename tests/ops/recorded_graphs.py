"""A stand-in for CUDA graphs on the CPU: what is captured is a function, and a replay calls it again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recorder:
    """Captures like `graphs.GpuCapture`, for any device; counts captures and replays, and notes the pools asked for."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.pools: list[object] = []

    def __call__(self, device: torch.device) -> Callable[..., tuple[Recording, tuple[Tensor, ...]]]:
        return self.capture

    def capture(self, run: Callable[[], tuple[Tensor, ...]], pool: object) -> tuple[Recording, tuple[Tensor, ...]]:
        self.captures += 1
        self.pools.append(pool)
        results = run()
        for result in results:  # a capture computes nothing
            result.fill_(torch.nan if result.is_floating_point() else 0)
        return Recording(self, run, results, object() if pool is None else pool), results


class Recording:
    def __init__(self, recorder: Recorder, run: Callable[[], tuple[Tensor, ...]], results, pool: object) -> None:
        self._recorder, self._run, self._results, self._pool = recorder, run, results, pool

    def replay(self) -> None:
        self._recorder.replays += 1
        for result, new in zip(self._results, self._run(), strict=True):
            result.copy_(new)

    def pool(self) -> object:
        return self._pool
