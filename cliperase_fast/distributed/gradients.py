"""Average gradients over the ranks while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliperase_fast.distributed.world import Ranks, buckets


class GradientExchange:
    """Averages the gradients of `groups` of parameters over the ranks, bucket by bucket.

    In the last backward pass of a step, `start` lets every bucket be exchanged as soon as its gradients are there, in
    an order that is the same on all ranks: group after group, the last parameters of each first. `finish` exchanges
    the rest and waits. Gradients that are added after their bucket has gone (a parameter that the pass reaches twice)
    are exchanged once more, so the result is exact. It is bitwise equal on all ranks.
    """

    def __init__(self, ranks: Ranks, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.ranks = ranks
        self.buckets = [_Bucket(ranks, part) for group in groups for part in buckets(reversed(group))]
        self.parameters = [parameter for bucket in self.buckets for parameter in bucket.parameters]
        self._reached: set[nn.Parameter] = set()  # in this step
        self._expected = set(self.parameters)  # those that a gradient reached in the last step
        self._hooks: list[Any] = []

    @property
    def started(self) -> bool:
        """Whether `start` was called since the last `finish`."""
        return bool(self._hooks)

    def start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say that the next backward pass is the last one of the step for these parameters."""
        for parameter in parameters:
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._reach))

    def finish(self) -> None:
        """Replace every gradient by its mean over the ranks. A parameter that no rank has a gradient for gets None."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for bucket in self.buckets:
            bucket.launch()
        late = [parameter.grad for parameter in self.parameters]
        for bucket in self.buckets:
            bucket.wait()
        if any(self.ranks.all_reduce_max(sum(gradient is not None for gradient in late))):
            self._add_late(late)
        self._expected = {parameter for parameter in self.parameters if parameter.grad is not None}
        self._reached = set()

    def _reach(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._reached.add(parameter)
        for bucket in self.buckets:
            if bucket.launched:
                continue
            if any(p in self._expected and p not in self._reached for p in bucket.parameters):
                return
            bucket.launch()

    def _add_late(self, late: list[Tensor | None]) -> None:
        with torch.no_grad():
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, late, strict=True)]
            self.ranks.all_reduce_mean(parts)
            for parameter, part in zip(self.parameters, parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad += part
                elif part.any():
                    parameter.grad = part


class _Bucket:
    """Parameters whose gradients are exchanged in one all-reduce, with a flag for each of them that is there."""

    def __init__(self, ranks: Ranks, parameters: list[nn.Parameter]) -> None:
        self.ranks, self.parameters = ranks, parameters
        self._flat: Tensor | None = None
        self._work: Any = None

    @property
    def launched(self) -> bool:
        return self._flat is not None

    def launch(self) -> None:
        """Take the gradients out of the parameters and start their exchange, unless that has been done."""
        if self._flat is not None:
            return
        with torch.no_grad():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flags = gradients[0].new_tensor([float(p.grad is not None) for p in self.parameters])
            self._flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), flags])
        for parameter in self.parameters:
            parameter.grad = None
        self._work = dist.all_reduce(self._flat, group=self.ranks.process_group, async_op=True)

    def wait(self) -> None:
        """Put the mean gradients back, as views of one tensor."""
        assert self._flat is not None
        self._work.wait()
        sizes = [parameter.numel() for parameter in self.parameters]
        *parts, flags = self._flat.split([*sizes, len(sizes)])
        self._flat[: sum(sizes)] /= self.ranks.size
        for parameter, part, there in zip(self.parameters, parts, flags.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if there else None
        self._flat = self._work = None
