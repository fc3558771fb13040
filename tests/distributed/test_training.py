"""Training over ranks with DistributedDataParallel follows one process with the whole batch; dead ranks are noticed."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import COLLECTIVE_TIMEOUT, Ranks
from shared_batches import UNEVEN, part, sharded_step, whole_batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cliperase_fast.losses import CLIPEraseLoss

STEPS = 3


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.text_tower = nn.Linear(12, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.image_tower(image), self.text_tower(text)
        return F.normalize(image, dim=1), F.normalize(text, dim=1), self.logit_scale.exp()


def trained(model: nn.Module, loss: CLIPEraseLoss, batch: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    """Losses of a few steps, and the parameters after them with the last gradients."""
    values = []
    for _ in range(STEPS):
        model.zero_grad()
        forget = len(batch["forget_image"])
        image, text, scale = model(
            torch.cat((batch["forget_image"], batch["retain_image"])),
            torch.cat((batch["forget_text"], batch["retain_text"])),
        )
        terms = loss(
            image[:forget], text[:forget], image[forget:], text[forget:], batch["teacher_image"],
            batch["teacher_text"], scale, 9.0, group_ids=batch["group_ids"],
        )  # fmt: skip
        terms.total.backward()
        values.append(terms.total.item())
        with torch.no_grad():  # torch.optim would import the compiler, for seconds on every rank
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    parameters = list(model.parameters())
    return values, [tensor.detach().clone() for p in parameters for tensor in (p, p.grad)]


def _train_a_part(rank: int, batch: dict[str, Any], sizes: tuple, options: dict) -> tuple[list[float], list[Tensor]]:
    model = DistributedDataParallel(TwoTowers().double())
    return trained(model, CLIPEraseLoss(**options, process_group=dist.group.WORLD), part(batch, rank, *sizes))


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize(
    ("forget", "consistency"), [("contrastive", "logits"), ("hinge", "intra"), ("cosine", "features")]
)
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_parameters_and_gradients_are_those_of_one_process(request, ranks, forget, consistency, gather):
    ranks = request.getfixturevalue(ranks)
    sizes = UNEVEN[ranks.size]
    batch = whole_batch(sum(sizes[0]), sum(sizes[1]), torch.float64, teacher_width=8)
    batch["group_ids"] = torch.arange(sum(sizes[1])) // 2
    options = {"forget": forget, "consistency": consistency}
    losses, tensors = trained(TwoTowers().double(), CLIPEraseLoss(**options, backend="eager"), batch)
    assert losses[-1] < losses[0]
    for found_losses, found in ranks.run(_train_a_part, batch, sizes, {**options, "gather": gather}):
        assert found_losses == pytest.approx(losses, rel=1e-10)
        for ours, exact in zip(found, tensors, strict=True):
            assert (ours - exact).norm() <= 1e-10 * exact.norm()


def _dies(rank: int, arguments: tuple) -> None:
    if rank == 1:
        os._exit(1)
    sharded_step(rank, *arguments)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_the_others_notice_a_rank_that_dies(tmp_path, gather):
    ranks = Ranks(2, tmp_path)
    try:
        batch = whole_batch(6, 16, torch.float32)
        started = time.monotonic()
        fine, (kind, _, trace) = ranks.ask(0, _dies, (batch, *UNEVEN[2], (1.0, 0.0, 0.0, 0.0), {"gather": gather}))
        assert not fine and kind in ("RuntimeError", "DistBackendError"), trace
        assert time.monotonic() - started < COLLECTIVE_TIMEOUT.total_seconds() + 5
    finally:
        ranks.stop(kill=True)
