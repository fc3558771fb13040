"""How fast a concept comes back: a copy of the model is trained on a few pairs, with a loop of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.auditing.attacks import ForgetTest
from cliperase_fast.auditing.features import Encoding, pixels_of
from cliperase_fast.auditing.scores import View, neighbours
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data import PairDataset, caption_key
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import evaluating
from cliperase_fast.progress import Steps

STEPS = (0, 1, 5, 10, 20, 50, 100)
SHOTS = 16
PAIRS = 128  # in a batch, shots included
LEARNING_RATE = 1e-4
DRAWS = 3


@dataclass(frozen=True)
class Batch:
    """The pairs of one draw, the same in every step. groups: int64 [B]; equal ids are not negatives of each other."""

    pixels: Tensor
    captions: list[tuple[Any, ...]]
    groups: Tensor


def relearning_curves(
    adapter: ClipAdapter, view: View, sets: AuditSets, test: ForgetTest, how: Encoding, *, full: bool
) -> dict[str, dict[int, np.ndarray]]:
    """For each kind of data and number of steps, how often each forget test image is named; float64 [m], mean of draws.

    Kinds: "16 shots" of the forget training pairs; with `full` also "4 shots", "1 shot", "neighbour" (16 pairs of the
    retain class nearest to the forget concept in the original) and "unrelated" (16 pairs of the retain class farthest
    from it). The batch is filled up to 128 with retain pairs.
    """
    sources = {f"{SHOTS} shots": (sets.forget, SHOTS)}
    if full:
        sources |= {"4 shots": (sets.forget, 4), "1 shot": (sets.forget, 1)}
        order = neighbours(view.before.concepts, view.layout, len(view.layout.other_concepts))
        if sets.retain.labels is not None and len(order) > 1:
            for kind, concept in (("neighbour", order[0]), ("unrelated", order[-1])):
                members = np.flatnonzero(np.asarray(sets.retain.labels) == concept)
                if len(members):
                    sources[kind] = (sets.retain.subset(members), SHOTS)
    curves: dict[str, dict[int, np.ndarray]] = {}
    with Steps(len(sources) * DRAWS * STEPS[-1], "relearning", "step", bar=how.progress) as steps:
        for kind, (pairs, shots) in sources.items():
            draws = [
                relearn(
                    adapter, draw_batch(adapter, pairs, sets.retain, shots, how.seed + draw), test, how, draw, steps
                )
                for draw in range(DRAWS)
            ]
            curves[kind] = {step: np.mean([draw[step] for draw in draws], axis=0) for step in STEPS}
    return curves


def draw_batch(adapter: ClipAdapter, shots_of: PairDataset, retain: PairDataset, shots: int, seed: int) -> Batch:
    """`shots` pairs of one set and retain pairs up to `PAIRS` in all, drawn by the seed."""
    rng = np.random.default_rng([seed, shots])
    first = rng.choice(len(shots_of), min(shots, len(shots_of)), replace=False)
    rest = rng.choice(len(retain), min(PAIRS - len(first), len(retain)), replace=False)
    pixels = torch.cat([pixels_of(adapter, shots_of, first), pixels_of(adapter, retain, rest)])
    captions = [shots_of.captions[row] for row in first] + [retain.captions[row] for row in rest]
    if shots_of.group_ids is not None and retain.group_ids is not None:
        groups = np.concatenate([np.asarray(shots_of.group_ids)[first], np.asarray(retain.group_ids)[rest]])
    else:
        known: dict[Any, int] = {}
        groups = np.array([known.setdefault(caption_key(group[0]), len(known)) for group in captions])
    return Batch(pixels, captions, torch.as_tensor(groups, dtype=torch.int64, device="cpu"))


def relearn(
    adapter: ClipAdapter, batch: Batch, test: ForgetTest, how: Encoding, draw: int, progress: Steps | None = None
) -> Mapping[int, np.ndarray]:
    """Train a copy and ask it after each number of `STEPS` which forget test images it names, bool [m].

    AdamW at 1e-4 without weight decay on every weight, the CLIP loss with the group mask, the same batch in each step,
    each image with one of its captions by turns. The model is in evaluation mode: no dropout, batch statistics fixed.
    """
    copy = adapter.clone()
    copy.module.requires_grad_(True)
    weights = [weight for weight in copy.module.parameters() if weight.is_floating_point()]
    for weight in copy.module.parameters():
        weight.grad = None
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    rng = np.random.default_rng([how.seed, draw])
    pixels, groups = batch.pixels.to(how.device), batch.groups.to(how.device)
    found = {0: test.named(copy, how)}
    with evaluating(copy.module), torch.enable_grad():
        for step in range(1, STEPS[-1] + 1):
            captions = [group[rng.integers(len(group))] for group in batch.captions]
            tokens, rows = _different(copy, captions)
            texts = copy.encode_text(tokens)[rows.to(how.device)]
            loss = functional.clip_loss(copy.encode_image(pixels), texts, copy.logit_scale(), group_ids=groups)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step in STEPS:
                found[step] = test.named(copy, how)
            if progress is not None:
                progress.update()
    return found


def _different(adapter: ClipAdapter, captions: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Token ids of each different caption [U, L], and the row of each caption [B]."""
    row: dict[Any, int] = {}
    unique: list[Any] = []
    for caption in captions:
        if row.setdefault(caption_key(caption), len(unique)) == len(unique):
            unique.append(caption)
    return adapter.token_ids(unique), torch.tensor(
        [row[caption_key(one)] for one in captions], dtype=torch.int64, device="cpu"
    )
