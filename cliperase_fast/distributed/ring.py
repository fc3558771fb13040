"""Blocks of rows that go round the ranks: from each to the next, while the block at hand is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from cliperase_fast.distributed.collectives import as_bytes
from cliperase_fast.distributed.group import Group, Shards


class Passing:
    """Tensors on their way to the next rank, and others on their way here from the rank before."""

    def __init__(self, group: Group, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        pairs = [(dist.isend, tensor, after) for tensor in sent] + [(dist.irecv, tensor, before) for tensor in received]
        operations = [
            dist.P2POp(operation, as_bytes(tensor), group=group.process_group, group_peer=peer)
            for operation, tensor, peer in pairs
            if tensor.numel()  # both ends know the sizes
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._held = (sent, received)

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class Homeward:
    """Sums of rows that follow the blocks of a ring a step behind: every rank adds its part, the last hop is home.

    At each step `receive(rows of the block)`, then, when the part is known, `add(part)`; at the end `arrive()`.
    """

    def __init__(self, shards: Shards, like: Tensor, width: int) -> None:
        self._shards, self._like, self._width = shards, like, width
        self._total: Tensor | None = None
        self._arriving: tuple[Passing, Tensor] | None = None

    def receive(self, rows: int) -> None:
        if self._total is not None:
            arriving = self._like.new_empty(rows, self._width)
            self._arriving = Passing(self._shards.group, [self._total], [arriving]), arriving

    def add(self, part: Tensor) -> None:
        if self._arriving is not None:
            passing, total = self._arriving
            passing.wait()
            part = total.add_(part)
        self._total = part

    def arrive(self) -> Tensor:
        """One's own rows, with everyone's parts."""
        assert self._total is not None
        if self._shards.group.size > 1:
            self.receive(self._shards.own)
            assert self._arriving is not None
            passing, self._total = self._arriving
            passing.wait()
        return self._total


def owners(group: Group) -> list[int]:
    """Whose block is here at each step."""
    return [(group.rank - step) % group.size for step in range(group.size)]


def blocks(shards: Shards, *own: Tensor | None) -> Iterator[tuple[int, list[Tensor | None]]]:
    """(owner, its rows) of every rank in turn, one's own first; the next block travels while one is used."""
    held = [None if tensor is None else tensor.detach().contiguous() for tensor in own]
    turns = owners(shards.group)
    for step, owner in enumerate(turns):
        arriving, passing = held, None
        if step + 1 < len(turns):
            rows = shards.sizes[turns[step + 1]]
            arriving = [None if tensor is None else tensor.new_empty(rows, *tensor.shape[1:]) for tensor in held]
            passing = Passing(shards.group, *([t for t in side if t is not None] for side in (held, arriving)))
        yield owner, held
        if passing is not None:
            passing.wait()
        held = arriving
