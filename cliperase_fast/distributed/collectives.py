"""Rows that move between ranks. Sums are always in rank order, so two runs are bitwise equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cliperase_fast.distributed.group import Group, Shards, gather_equal, sum_scattered


def as_bytes(rows: Tensor) -> Tensor:
    """The same memory as uint8, which every backend moves whatever the dtype."""
    return rows.view(torch.uint8)


def gather_rows(shards: Shards, *tensors: Tensor | None) -> list[Tensor | None]:
    """Everyone's rows [N, ...] for each of one's own [n, ...], in rank order; None stays None."""
    largest = max(shards.sizes)
    started: list[tuple[Any, Tensor] | None] = []
    for tensor in tensors:
        if tensor is None:
            started.append(None)
            continue
        rows = tensor.detach().contiguous()
        if len(rows) < largest:  # the collectives want equal shares
            rows = torch.cat((rows, rows.new_zeros(largest - len(rows), *rows.shape[1:])))
        gathered = rows.new_empty(shards.group.size * largest, *rows.shape[1:])
        work = gather_equal(as_bytes(gathered), as_bytes(rows), shards.group.process_group, async_op=True)
        started.append((work, gathered))
    results: list[Tensor | None] = []
    for start in started:
        if start is None:
            results.append(None)
            continue
        work, gathered = start
        work.wait()
        if not shards.even:
            gathered = torch.cat([share[:n] for share, n in zip(gathered.split(largest), shards.sizes, strict=True)])
        results.append(gathered)
    return results


def to_owners(shards: Shards, planes: Tensor) -> Tensor:
    """What every rank has found of one's own pairs, [ranks, planes, n], from what one has found of all, [planes, N]."""
    found = planes.T.contiguous()  # [N, planes]
    received = found.new_empty(shards.group.size * shards.own, found.shape[1])
    _all_to_all(shards, received, found)
    return received.view(shards.group.size, shards.own, received.shape[1]).transpose(1, 2)


def sum_to_owners(shards: Shards, summands: Tensor) -> Tensor:
    """The sum over all ranks of their [N, D], one's own rows [n, D] of it."""
    if shards.even:
        total = summands.new_empty(shards.own, summands.shape[1])
        sum_scattered(total, summands.contiguous(), shards.group.process_group)
        return total
    received = summands.new_empty(shards.group.size * shards.own, summands.shape[1])
    _all_to_all(shards, received, summands.contiguous())
    return received.view(shards.group.size, shards.own, received.shape[1]).sum(0)


def _all_to_all(shards: Shards, received: Tensor, sent: Tensor) -> None:
    dist.all_to_all_single(
        as_bytes(received), as_bytes(sent), [shards.own] * shards.group.size, list(shards.sizes),
        group=shards.group.process_group,
    )  # fmt: skip


def total_over_ranks(group: Group, value: Tensor) -> Tensor:
    """The sum of everyone's `value`."""
    shares = value.new_empty(group.size, *value.shape)
    gather_equal(shares, value.contiguous()[None], group.process_group)
    return shares.sum(0)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.ranks = group.size
        return total_over_ranks(group, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks * grad, None


def sum_over_ranks(shards: Shards, value: Tensor) -> Tensor:
    """The same, differentiable: a gradient grows by the number of ranks, over which the parameters' is averaged."""
    return _Sum.apply(value, shards.group)
