"""Describe the processes that share a batch: who they are, what each holds, and whether their options agree."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from cliperase_fast.errors import InputError

GATHER_MODES = ("all", "ring")
LOCAL, WORLD = "local", "world"  # values of process_group that are not a group
_FAILED = -1  # sent instead of a digest
_RENAMED = hasattr(dist, "all_gather_single")  # torch 2.14 deprecates the older names


def gather_equal(gathered: Tensor, own: Tensor, group: Any, async_op: bool = False) -> Any:
    """Gather all ranks' `own` [n, ...], in rank order, into `gathered` [ranks * n, ...]."""
    gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
    return gather(gathered, own, group=group, async_op=async_op)


def sum_scattered(own: Tensor, summands: Tensor, group: Any) -> None:
    """Sum `summands` [ranks * n, ...] over all ranks, and write this rank's part into `own` [n, ...]."""
    scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor
    scatter(own, summands, group=group)


def check_process_group(process_group: Any) -> None:
    """Raise InputError for a process_group that will still be wrong when the loss is called.

    torch.distributed.group.WORLD is None before init_process_group(). So None is accepted in a single process, and
    refused among several, where it would give the loss of this process's own pairs.
    """
    if process_group is None and _ranks() > 1:
        raise InputError(
            f"process_group=None among {_ranks()} processes: torch.distributed.group.WORLD is None until "
            "init_process_group() has been called; pass process_group='world' for the batch of all processes, or "
            "'local' for a loss of each process's own pairs"
        )
    if isinstance(process_group, str) and process_group not in (LOCAL, WORLD):
        raise InputError(
            f"process_group={process_group!r} is not known; use 'local' (this process's own pairs), 'world' (the pairs "
            "of all processes) or a torch.distributed.ProcessGroup, not another str"
        )


def resolve_group(process_group: Any) -> Any:
    """Return the torch.distributed group whose ranks share the batch; None if the batch is this process's own."""
    if isinstance(process_group, str) and process_group == LOCAL:
        return None
    check_process_group(process_group)
    if not isinstance(process_group, str):
        return process_group
    if not dist.is_available() or not dist.is_initialized():
        _not_initialised("process_group='world'")
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def _not_initialised(what: str) -> NoReturn:
    raise InputError(
        f"{what}: torch.distributed is not initialised; call torch.distributed.init_process_group() "
        "first (under torchrun without arguments), or leave process_group out"
    )


def _ranks() -> int:
    """Return the number of processes, even if they have not been joined yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


class Group:
    """Wrap a process group that this process can use. Raises InputError if it cannot."""

    def __init__(self, process_group: Any) -> None:
        if not dist.is_available():
            raise InputError("process_group: this build of torch has no torch.distributed; leave process_group out")
        if not dist.is_initialized():
            _not_initialised("process_group")
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError(
                "process_group: this process is not a member of the group; call the loss only on its members"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise InputError(
                f"process_group must be a torch.distributed.ProcessGroup, not {type(process_group).__name__}; "
                "for all processes pass process_group='world'"
            )
        self.process_group = process_group
        try:
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        except (RuntimeError, ValueError) as error:  # destroyed, or of another run
            raise InputError(f"process_group is not one of the groups of this process: {error}") from error
        config = str(dist.get_backend_config(process_group))  # "cpu:gloo,cuda:nccl"
        self.backend_of = dict(entry.split(":") for entry in config.split(","))  # device type -> its backend

    def check_device(self, device: torch.device) -> None:
        """Raise InputError unless the group has a backend for this device."""
        if device.type not in self.backend_of:
            kinds = ", ".join(f"{backend} for {kind}" for kind, backend in self.backend_of.items())
            raise InputError(f"process_group ({kinds}) has no backend for tensors on {device}; make a group with one")

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Raise an InputError from inside on the other ranks too, which wait in `agree`."""
        try:
            yield
        except InputError as error:
            self._exchange(_FAILED, (0, 0))
            self._objects(str(error))
            raise

    def agree(self, options: Mapping[str, object], counts: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the two counts of every rank. If the options differ, raise InputError on all ranks with what differs.

        This is one all-gather of three numbers. If the group has no CPU backend, the host waits for the GPU.
        """
        digest = hashlib.blake2b(repr(sorted(options.items())).encode(), digest_size=7).digest()
        found = self._exchange(int.from_bytes(digest, "little"), counts)
        digests = {row[0] for row in found}
        if len(digests) > 1:
            said = self._objects(dict(options))
            stopped = {rank: text for rank, text in enumerate(said) if isinstance(text, str)}
            if stopped:
                raise InputError("; ".join(f"rank {rank} stopped: {text}" for rank, text in stopped.items()))
            raise InputError(f"process_group: ranks differ in {_differences(said)}; give the same on every rank")
        return tuple(row[1] for row in found), tuple(row[2] for row in found)

    def _exchange(self, digest: int, counts: tuple[int, int]) -> list[list[int]]:
        device = "cpu" if "cpu" in self.backend_of else next(iter(self.backend_of))
        mine = torch.tensor([[digest, *counts]], dtype=torch.int64, device=device)
        found = mine.new_empty(self.size, mine.shape[1])
        gather_equal(found, mine, self.process_group)
        return found.tolist()

    def _objects(self, mine: object) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.process_group)
        return found


def _differences(said: Sequence[Mapping[str, object]]) -> str:
    parts = []
    for name in sorted({name for options in said for name in options}):
        by_value: dict[object, list[int]] = {}
        for rank, options in enumerate(said):
            by_value.setdefault(options.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on rank {' '.join(map(str, ranks))}" for value, ranks in by_value.items())
            parts.append(f"{name} ({values})")
    return "; ".join(parts)


@dataclass(frozen=True)
class Shards:
    """Describe how the pairs of one batch are spread over the ranks, in rank order."""

    group: Group
    sizes: tuple[int, ...]  # pairs on each rank
    gather: str
    own_values: bool = False  # whether a loss's value is the mean over this rank's pairs, not over the batch

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> int:
        return self.sizes[self.group.rank]

    @property
    def firsts(self) -> list[int]:
        """The index of each rank's first pair in the whole batch."""
        return [0, *accumulate(self.sizes)][:-1]

    @property
    def even(self) -> bool:
        return len(set(self.sizes)) == 1
