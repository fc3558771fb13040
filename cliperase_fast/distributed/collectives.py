"""Move rows between ranks, all at once or in blocks round a ring.

Results are always combined in rank order, so two runs are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cliperase_fast.distributed.process_group import Group, Shards, gather_equal, sum_scattered


def as_bytes(rows: Tensor) -> Tensor:
    """View the memory as uint8, which every backend can send whatever the dtype."""
    return rows.view(torch.uint8)


def gather_rows(shards: Shards, *tensors: Tensor | None) -> list[Tensor | None]:
    """Gather all ranks' rows [N, ...] of each tensor [n, ...], in rank order; None stays None."""
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


def to_owners(shards: Shards, stats: Tensor) -> Tensor:
    """Send stats of all pairs [stats, N] to their owners; return all ranks' stats of own pairs [ranks, stats, n]."""
    found = stats.T.contiguous()  # [N, stats]
    received = found.new_empty(shards.group.size * shards.own, found.shape[1])
    _all_to_all(shards, received, found)
    return received.view(shards.group.size, shards.own, received.shape[1]).transpose(1, 2)


def sum_to_owners(shards: Shards, summands: Tensor) -> Tensor:
    """Sum `summands` [N, D] over all ranks, and return this rank's own rows [n, D]."""
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
    """Sum `value` over all ranks."""
    shares = value.new_empty(group.size, *value.shape)
    gather_equal(shares, value.contiguous()[None], group.process_group)
    return shares.sum(0)


def over_ranks(value: Tensor, shards: Shards | None) -> Tensor:
    """Sum `value`, which has no gradient, over the ranks of `shards`; None: return it as it is."""
    return value if shards is None else total_over_ranks(shards.group, value)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.ranks = group.size
        return total_over_ranks(group, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks * grad, None


def sum_over_ranks(shards: Shards, value: Tensor) -> Tensor:
    """Sum `value` over all ranks; the gradient is multiplied by the number of ranks, see `functional`."""
    return _Sum.apply(value, shards.group)


class RingExchange:
    """Send tensors to the next rank while receiving others from the previous rank."""

    def __init__(self, group: Group, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        pairs = [(dist.isend, tensor, after) for tensor in sent] + [(dist.irecv, tensor, before) for tensor in received]
        operations = [
            dist.P2POp(operation, as_bytes(tensor), group=group.process_group, group_peer=peer)
            for operation, tensor, peer in pairs
            if tensor.numel()  # both ranks know the sizes
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._held = (sent, received)

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class RingReducer:
    """Sum rows along a ring, one step behind its blocks: every rank adds its part, the last hop reaches the owner.

    At each step call `receive(rows of the block)` and, once the part is known, `add(part)`; at the end `arrive()`.
    """

    def __init__(self, shards: Shards, like: Tensor, width: int) -> None:
        self._shards, self._like, self._width = shards, like, width
        self._total: Tensor | None = None
        self._arriving: tuple[RingExchange, Tensor] | None = None

    def receive(self, rows: int) -> None:
        if self._total is not None:
            arriving = self._like.new_empty(rows, self._width)
            self._arriving = RingExchange(self._shards.group, [self._total], [arriving]), arriving

    def add(self, part: Tensor) -> None:
        if self._arriving is not None:
            passing, total = self._arriving
            passing.wait()
            part = total.add_(part)
        self._total = part

    def arrive(self) -> Tensor:
        """Return this rank's own rows, summed over all ranks."""
        assert self._total is not None
        if self._shards.group.size > 1:
            self.receive(self._shards.own)
            assert self._arriving is not None
            passing, self._total = self._arriving
            passing.wait()
        return self._total


def owners(group: Group) -> list[int]:
    """Return the rank whose block is here, for each step."""
    return [(group.rank - step) % group.size for step in range(group.size)]


def blocks(shards: Shards, *own: Tensor | None) -> Iterator[tuple[int, list[Tensor | None]]]:
    """Yield (owner, its rows) for every rank, this one first; the next block travels while one is used."""
    held = [None if tensor is None else tensor.detach().contiguous() for tensor in own]
    turns = owners(shards.group)
    for step, owner in enumerate(turns):
        arriving, passing = held, None
        if step + 1 < len(turns):
            rows = shards.sizes[turns[step + 1]]
            arriving = [None if tensor is None else tensor.new_empty(rows, *tensor.shape[1:]) for tensor in held]
            passing = RingExchange(shards.group, *([t for t in side if t is not None] for side in (held, arriving)))
        yield owner, held
        if passing is not None:
            passing.wait()
        held = arriving
