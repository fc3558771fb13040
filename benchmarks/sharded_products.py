"""Count the matrix products of a step over several processes: ours, and open_clip's local_loss + gather_with_grad.

python -m benchmarks.sharded_products        writes benchmarks/results/sharded-products.json; gloo, no GPU, two minutes

Every product that a rank forms, forward and backward, is seen by a TorchDispatchMode and counted in units of one
product of its rows with all texts, 2 n N D floating-point operations. Both take the same pairs and have the same
gradients, which is checked in float64 before anything is counted.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cliperase_fast.functional import cliperase_loss
from cliperase_fast.ops.streaming import strip_height
from cliperase_fast.planning.cost_model import Sweep

from .machine import RESULTS, describe

PAIRS, WIDTH, RANKS = 2048, 64, (1, 2, 4)  # pairs a rank
LOSSES = ("contrastive", "contrastive + distillation")
WAYS = ("open_clip", "gathered", "ring")
_SCALE, _TEACHER_SCALE = 14.0, 9.0


class Products(TorchDispatchMode):
    """What a rank does: its matrix products, what it receives, and the memory it takes.

    operations: floating-point operations of products. moved: bytes that products read and write. received: bytes from
    other ranks. largest: entries of the largest result of any operation. peak: bytes alive at once, of those that were
    made under this mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved = self.received = self.largest = self.alive = self.peak = 0
        self._seen: set[int] = set()
        self._given: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor) and (storage := given.untyped_storage())._cdata not in self._seen:
                self._given[storage._cdata] = storage
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            self.moved += sum(t.numel() * t.itemsize for t in (*args, result))
        elif name in ("bmm", "baddbmm", "matmul", "linear"):
            raise NotImplementedError(f"{name} is not counted")
        elif func.namespace == "c10d":
            self.received += received_bytes(name, args)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            self._hold(result.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen and key not in self._given:
            self._seen.add(key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def received_bytes(name: str, args: tuple[Any, ...]) -> int:
    """From other ranks, by a collective as c10d dispatches it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        whole = max(args[:2], key=Tensor.numel)
        return whole.numel() * whole.itemsize * (ranks - 1) // ranks
    if name == "alltoall_base_":
        received, sizes = args[0], args[3]
        return received.numel() * received.itemsize * (sum(sizes) - sizes[rank]) // sum(sizes)
    if name == "allgather_":
        return (ranks - 1) * sum(t.numel() * t.itemsize for t in args[1])
    if name == "scatter_":
        from_oneself = bool(args[1])  # only the root has something to hand out
        return 0 if from_oneself else sum(t.numel() * t.itemsize for t in args[0])
    if name == "recv_":
        return sum(t.numel() * t.itemsize for t in args[0])
    if name == "send":
        return 0
    raise NotImplementedError(f"{name} is not counted")


def features(rank: int, pairs: int, dtype: torch.dtype) -> list[Tensor]:
    """Student image and text, teacher image and text."""
    generator = torch.Generator().manual_seed(rank)
    return [F.normalize(torch.randn(pairs, WIDTH, generator=generator, dtype=dtype), dim=1) for _ in range(4)]


def loss_of(way: str, loss: str, leaves: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    image, text, scale = leaves
    distil = loss != LOSSES[0]
    if way == "open_clip":
        options = {
            "local_loss": True, "gather_with_grad": True, "rank": dist.get_rank(), "world_size": dist.get_world_size(),
        }  # fmt: skip
        if not distil:
            return ClipLoss(**options)(image, text, scale)
        return sum(DistillClipLoss(**options)(image, text, scale, *teacher, torch.tensor(_TEACHER_SCALE).to(scale)))
    nothing = image[:0]
    # open_clip's distillation is the cross entropy, halved: the gradients of half our divergence
    teacher_image, teacher_text = teacher if distil else (None, None)
    return cliperase_loss(
        nothing, nothing, image, text, teacher_image, teacher_text, scale, _TEACHER_SCALE,
        lambda_forget=0.0, lambda_consistency=0.5 if distil else 0.0, process_group=dist.group.WORLD,
        gather="ring" if way == "ring" else "all", backend="torch",
    ).total  # fmt: skip


def counted(rank: int, way: str, loss: str, pairs: int = PAIRS) -> dict[str, Any]:
    """Products forward and backward on this rank, and the largest tensor in units of n N entries."""
    image, text, *teacher = features(rank, pairs, torch.float32)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(_SCALE, requires_grad=True)]
    product = 2 * pairs * pairs * dist.get_world_size() * WIDTH
    with Products() as seen, Products() as forward:
        value = loss_of(way, loss, leaves, teacher)
    with seen, Products() as backward:
        value.backward()
    return {
        "forward": forward.operations / product,
        "backward": backward.operations / product,
        "largest": max(forward.largest, backward.largest) / (pairs * pairs * dist.get_world_size()),
        "operations": seen.operations,
        "moved": seen.moved,
        "received": seen.received,
        "peak": seen.peak,
    }


def sweep_of(ranks: int, loss: str, way: str, pairs: int = PAIRS) -> Sweep:
    """The same for the cost model."""
    columns = pairs if way == "ring" else pairs * ranks
    return Sweep(
        pairs * ranks, ranks, WIDTH, WIDTH, 4, consistency=loss != LOSSES[0], gather="ring" if way == "ring" else "all",
        block_rows=strip_height(pairs, columns, 0, torch.empty(0)), fused=False,
    )  # fmt: skip


def strips_of(sweep: Sweep) -> int:
    """Bytes of the strips of the "torch" backend in the backward pass, and of their products with the texts."""
    columns = sweep.own if sweep.gather == "ring" else sweep.pairs
    return 4 * sweep.block_rows * ((3 + sweep.consistency) * columns + 2 * sweep.width)


def gradients(rank: int, way: str, loss: str, pairs: int = 128) -> list[Tensor]:
    """Of this rank's image, text and scale, in float64."""
    image, text, *teacher = features(rank, pairs, torch.float64)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(_SCALE, dtype=torch.float64).requires_grad_()]
    loss_of(way, loss, leaves, teacher).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def check_same_gradients(rank: int, loss: str) -> None:
    """Raise unless every way has open_clip's gradients, the scale's after the mean over the ranks."""
    found = {way: gradients(rank, way, loss) for way in WAYS}
    for of_way in found.values():
        dist.all_reduce(of_way[2])
    for way, of_way in found.items():
        for ours, theirs in zip(of_way, found["open_clip"], strict=True):
            if (ours - theirs).norm() > 1e-10 * theirs.norm():
                raise ArithmeticError(f"{way}, {loss}: gradients are not open_clip's")


def _rank(rank: int, size: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=size, init_method=f"file://{store}", timeout=timedelta(minutes=2)
    )
    for loss in LOSSES:
        check_same_gradients(rank, loss)
        for way in WAYS:
            run = counted(rank, way, loss)
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, run)
            assert all(math.isclose(other["forward"], run["forward"]) for other in everyone)
            if rank == 0:
                answers.put({"ranks": size, "loss": loss, "way": way, **run})
    dist.destroy_process_group()


def main() -> int:
    runs = []
    for size in RANKS:
        answers = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            processes = mp.spawn(_rank, (size, f"{folder}/store", answers), size, join=False)
            for _ in LOSSES:
                for _ in WAYS:
                    while answers.empty():
                        processes.join(0.1)  # raises what a rank has raised
                    runs.append(answers.get())
                    print(runs[-1], flush=True)
            while not processes.join():
                pass
    record = {
        "command": "python -m benchmarks.sharded_products", **describe(), "pairs": PAIRS, "width": WIDTH, "runs": runs,
    }  # fmt: skip
    (RESULTS / "sharded-products.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
