"""The processes that share a batch: who they are, what each holds, and that they all mean the same."""

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
LOCAL, WORLD = "local", "world"  # words for a process_group
_FAILED = -1  # in the place of a digest
_RENAMED = hasattr(dist, "all_gather_single")  # by torch 2.14, which warns of the older names


def gather_equal(gathered: Tensor, own: Tensor, group: Any, async_op: bool = False) -> Any:
    """Everyone's `own` [n, ...], in rank order, into `gathered` [ranks * n, ...]."""
    gather = dist.all_gather_single if _RENAMED else dist.all_gather_into_tensor
    return gather(gathered, own, group=group, async_op=async_op)


def sum_scattered(own: Tensor, summands: Tensor, group: Any) -> None:
    """This rank's part of the sum over all ranks of `summands` [ranks * n, ...], into `own` [n, ...]."""
    scatter = dist.reduce_scatter_single if _RENAMED else dist.reduce_scatter_tensor
    scatter(own, summands, group=group)


def check_process_group(process_group: Any) -> None:
    """Raise InputError for a process_group that is wrong whatever happens until the loss is called.

    torch.distributed.group.WORLD is None before init_process_group(), so None is accepted where there is one process,
    and refused where there are several: it would be the loss of this process's pairs alone.
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
    """The torch.distributed group whose ranks share the batch, as of now; None where it is this process's own."""
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
        "first (under torchrun it needs no more), or leave process_group out"
    )


def _ranks() -> int:
    """How many processes there are, also where they have not been joined yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


class Group:
    """A process group that has been looked at. Raises InputError when it cannot be used from this process."""

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
        """Raise InputError unless the group carries tensors of this device."""
        if device.type not in self.backend_of:
            kinds = ", ".join(f"{backend} for {kind}" for kind, backend in self.backend_of.items())
            raise InputError(
                f"process_group ({kinds}) does not carry tensors on {device}; make a group with a backend for it"
            )

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """An InputError inside is raised on the other ranks as well, where they wait in `agree`."""
        try:
            yield
        except InputError as error:
            self._exchange(_FAILED, (0, 0))
            self._objects(str(error))
            raise

    def agree(self, options: Mapping[str, object], counts: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The two counts of every rank. Raises InputError on all of them, naming what differs, if the options do.

        One all-gather of three numbers; on a GPU without a CPU backend in the group the host waits for it.
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
    """How the pairs of one batch lie on the ranks, in rank order."""

    group: Group
    sizes: tuple[int, ...]  # pairs on each rank
    gather: str
    own_values: bool = False  # a loss's value is the mean over this rank's pairs, not over the batch

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> int:
        return self.sizes[self.group.rank]

    @property
    def firsts(self) -> list[int]:
        """The place of each rank's first pair in the whole batch."""
        return [0, *accumulate(self.sizes)][:-1]

    @property
    def even(self) -> bool:
        return len(set(self.sizes)) == 1
