"""The processes of a run: join them, divide work, exchange results, and propagate errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cliperase_fast.distributed.collectives import as_bytes, gather_rows
from cliperase_fast.distributed.process_group import Group, Shards, gather_equal
from cliperase_fast.errors import InputError, UnlearningError

T = TypeVar("T")
AnyTensor = TypeVar("AnyTensor", bound=Tensor)

BUCKET = 25 * 2**20  # bytes of one all-reduce, as in DistributedDataParallel
_FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all: rank `rank` of `size`, and `local_rank` on its machine. A single process has no group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Group | None = None

    @property
    def first(self) -> bool:
        """Whether this rank shows progress and writes files."""
        return self.rank == 0

    @property
    def process_group(self) -> Any:
        """The process group for a loss, None for a single process."""
        return self.group.process_group if self.group is not None and self.size > 1 else None

    def share(self, count: int) -> slice:
        """Return this rank's contiguous part of `count` items. The first ranks may have one more."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[slice]:
        """Return every rank's part, in rank order."""
        each, more = divmod(count, self.size)
        starts = [rank * each + min(rank, more) for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(starts)]

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; return this rank's result. An error on any rank is raised on all."""
        found: list[T] = []
        self.gather_results(lambda: found.append(work()))
        return found[0]

    def gather_results(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; return all results on every rank. An error on any rank is raised on all."""
        if self.size == 1:
            return [work()]
        own: Exception | None = None
        mine: tuple[str, Any]
        try:
            mine = ("", work())
        except Exception as error:  # of any kind, as the other ranks wait
            own, mine = error, _describe_error(error)
        found = self._all_gather_objects(mine)
        if own is not None:
            raise own
        _raise_remote_errors({rank: told for rank, told in enumerate(found) if told[0]})
        return [value for _, value in found]

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank only; return its result on every rank. An error there is raised on all."""
        if self.size == 1:
            return work()
        own: Exception | None = None
        mine: tuple[str, Any] = ("", None)
        if self.first:
            try:
                mine = ("", work())
            except Exception as error:  # of any kind, as the other ranks wait
                own, mine = error, _describe_error(error)
        told = self._all_gather_objects(mine)[0]
        if own is not None:
            raise own
        _raise_remote_errors({0: told} if told[0] else {})
        return told[1]

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise InputError on every rank unless all ranks have the same values. The message names what differs."""
        if self.group is not None and self.size > 1:
            self.group.agree(settings, (0, 0))

    def all_gather_rows(self, work: Callable[[], Sequence[Tensor]], counts: Sequence[int]) -> Tensor:
        """Return the rows of all ranks in rank order, on the CPU of every rank.

        work: returns tensors [n, D] with counts[rank] rows in all. D and the dtype are the same everywhere; a rank may
        have none. An error on any rank is raised on all.
        """
        parts: list[Tensor] = []

        def form() -> tuple[torch.Size, torch.dtype] | None:
            parts.extend(work())
            return (parts[0].shape[1:], parts[0].dtype) if parts else None

        forms = self.gather_results(form)
        if self.group is None or self.size == 1:
            return torch.cat(parts)
        shape, dtype = next(form for form in forms if form is not None)
        rows = torch.cat(parts) if parts else torch.empty(0, *shape, dtype=dtype, device="cpu")
        shards = Shards(self.group, tuple(counts), "all")
        (gathered,) = gather_rows(shards, rows.to(self._exchange_device))
        assert gathered is not None
        return gathered.cpu()

    def all_gather_with_gradient(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return all ranks' rows in rank order; only this rank's own carry a gradient, times the number of ranks.

        counts: rows of each rank. A loss of the result that every rank computes then has a gradient whose mean over the
        ranks is that of the whole loss.
        """
        if self.group is None or self.size == 1:
            return rows
        (gathered,) = gather_rows(Shards(self.group, tuple(counts), "all"), rows.detach().contiguous())
        assert gathered is not None
        parts = list(gathered.split(list(counts)))
        own = rows.view_as(rows)
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * self.size)
        parts[self.rank] = own
        return torch.cat(parts)

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place and bitwise equal on all ranks."""
        if self.size == 1:
            return
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.process_group)
            flat /= self.size
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the maximum over the ranks of each value."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64, device=self._exchange_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.process_group)
        return found.tolist()

    def all_gather_numbers(self, value: float) -> list[float]:
        """Return every rank's number, in rank order."""
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self._exchange_device)
        found = mine.new_empty(self.size)
        gather_equal(found, mine, self.process_group)
        return found.tolist()

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Return the first rank's tensors by name, on the CPU of every rank. The other ranks pass None."""
        return dict(self.broadcast_each(tensors))

    def broadcast_each(self, tensors: Mapping[str, Tensor] | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the first rank's tensors one after another, each on the CPU of every rank."""
        if self.size == 1:
            assert tensors is not None
            yield from tensors.items()
            return
        mine = tensors or {}
        forms = self.run_on_first(lambda: [(name, tensor.shape, tensor.dtype) for name, tensor in mine.items()])
        for name, shape, dtype in forms:
            tensor = mine[name] if self.first else torch.empty(shape, dtype=dtype, device="cpu")
            sent = tensor.to(self._exchange_device).contiguous()
            if sent.numel():
                dist.broadcast(as_bytes(sent.view(-1)), group=self.process_group, group_src=0)
            yield name, sent.cpu().view(shape)

    @property
    def _exchange_device(self) -> torch.device:
        assert self.group is not None
        return torch.device("cpu" if "cpu" in self.group.backend_of else torch.cuda.current_device())

    def _all_gather_objects(self, mine: object) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.process_group)
        return found


SINGLE_PROCESS = Ranks()


def buckets(tensors: Iterable[AnyTensor]) -> Iterator[list[AnyTensor]]:
    """Divide tensors, in their order, into buckets of one dtype. Each has `BUCKET` bytes or a little more."""
    bucket: list[AnyTensor] = []
    for tensor in tensors:
        size = sum(t.numel() * t.element_size() for t in bucket)
        if bucket and (size >= BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def init_distributed(device: str, seconds: float) -> Iterator[Ranks]:
    """Yield the ranks of this run: those of torch.distributed if it is initialised, of a launcher, or a single process.

    device: the setting `device`, which decides the backend. seconds: the timeout of collectives. A rank that is lost
    inside raises UnlearningError. Raises InputError if only some of a launcher's variables are set.
    """
    ours = False
    if not (dist.is_available() and dist.is_initialized()):
        if not _launched():
            yield SINGLE_PROCESS
            return
        ours = True
        _start(device, seconds)
    group = Group(dist.group.WORLD)
    local = os.environ.get("LOCAL_RANK", str(group.rank))
    ranks = Ranks(group.rank, group.size, int(local), group)
    try:
        yield ranks
    except RuntimeError as error:
        if isinstance(error, UnlearningError) or ranks.size == 1 or not _is_lost_connection(error):
            raise
        raise UnlearningError(
            f"rank {ranks.rank} of {ranks.size} lost contact with another: that one was killed, stopped with an error "
            f"of its own, or did not answer for rank_timeout={seconds:g} seconds ({_first_line(error)}). What was "
            "saved stays: start again with resume"
        ) from error
    finally:
        if ours:
            dist.destroy_process_group()


def _describe_error(error: Exception) -> tuple[str, str]:
    """Return the kind and the text of an error, to send to the other ranks."""
    if isinstance(error, (InputError, UnlearningError)):
        return type(error).__name__, str(error)
    return type(error).__name__, f"{type(error).__name__}: {error}"


def _raise_remote_errors(stopped: Mapping[int, tuple[str, str]]) -> None:
    """Raise an error for those that other ranks reported, if any."""
    if stopped:
        kinds = {kind for kind, _ in stopped.values()}
        text = "; ".join(f"rank {rank} stopped: {text}" for rank, (_, text) in stopped.items())
        raise InputError(text) if kinds == {"InputError"} else UnlearningError(text)


def _launched() -> bool:
    given = [name for name in _FROM_LAUNCHER if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return False
    missing = [name for name in _FROM_LAUNCHER if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment has {' and '.join(given)} but no {' and no '.join(missing)}, so the ranks cannot find "
            "each other: start them with torchrun or deepspeed, or unset these for a single process"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdigit():
            raise InputError(f"the environment has {name}={os.environ[name]!r}, which is not a number")
    return True


def _start(device: str, seconds: float) -> None:
    gpu = str(device).startswith("cuda") or (str(device) == "auto" and torch.cuda.is_available())
    if gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"this is process {local + 1} of its machine and torch sees {torch.cuda.device_count()} GPUs: start "
                "one process for each GPU (--nproc_per_node), or use device='cpu'"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    timeout = timedelta(seconds=seconds)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store for all its restarts, which still holds the addresses of ranks that have ended.
            # (On several machines each counts its own restarts; there c10d makes a store for each attempt.)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        others, address = int(os.environ["WORLD_SIZE"]) - 1, f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UnlearningError(
            f"rank {os.environ['RANK']} did not find the other {others} ranks at {address} within "
            f"rank_timeout={seconds:g} seconds: {_first_line(error)}"
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a rank was lost, which gloo reports as a plain RuntimeError."""
    words = ("gloo", "Connection closed", "Connection reset", "Timed out", "timed out", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
