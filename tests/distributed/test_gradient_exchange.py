"""The exchange of gradients on two ranks: their mean, while the backward pass runs, whatever the graph."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cliperase_fast.distributed import GradientExchange, Ranks, world
from cliperase_fast.distributed.process_group import Group

WIDTH = 6


class Chain(nn.Module):
    """Layers in a row; the first is used twice, and the last only on the second rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.of_second_rank = nn.Parameter(torch.ones(WIDTH))
        self.unused = nn.Parameter(torch.ones(WIDTH))

    def forward(self, rows: Tensor, rank: int) -> Tensor:
        rows = self.layers[0](rows)
        for layer in self.layers:
            rows = layer(rows).tanh()
        return (rows * self.of_second_rank if rank else rows).square().sum()


def _inputs(rank: int, step: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def _exchanged(rank: int, late: bool, steps: int) -> tuple[list[list[Tensor | None]], int]:
    """Return the gradients of each step, and how many all-reduces had begun when the last backward pass ended.

    late: another pass adds gradients after the one that was said to be the last.
    """
    model, begun = Chain(), [0]
    ranks = Ranks(rank, 2, rank, Group(dist.group.WORLD))
    all_reduce = dist.all_reduce

    def counting(*arguments, **options):
        begun[0] += 1
        return all_reduce(*arguments, **options)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "BUCKET", 4 * WIDTH * WIDTH)  # bytes of a layer's weight
        exchange = GradientExchange(ranks, [list(model.parameters())])
        for step in range(steps):
            model(_inputs(rank, step), rank).backward()  # accumulated
            exchange.start(model.parameters())
            begun[0] = 0
            with patch.context() as inner:
                inner.setattr(dist, "all_reduce", counting)
                model(_inputs(rank, step + 1), rank).backward()
            if late:
                model(_inputs(rank, step + 2), rank).backward()
            exchange.finish()
            found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            model.zero_grad()
    return found, begun[0]


def _expected(late: bool, step: int) -> list[Tensor | None]:
    model = Chain()
    for rank in range(2):
        for more in range(3 if late else 2):
            (model(_inputs(rank, step + more), rank) / 2).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("late", [False, True], ids=["", "gradients after the last pass"])
def test_gradients_become_their_mean_while_the_backward_pass_runs(two, late):
    (first, begun), (second, _) = two.run(_exchanged, late, 3)
    assert begun >= 3, "most buckets are sent before the backward pass has ended"
    for step, (found, other) in enumerate(zip(first, second, strict=True)):
        for ours, theirs, exact in zip(found, other, _expected(late, step), strict=True):
            if exact is None:
                assert ours is theirs is None
            else:
                assert torch.equal(ours, theirs), "equal on both ranks to the last bit"
                torch.testing.assert_close(ours, exact)
