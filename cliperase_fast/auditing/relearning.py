"""Measure how fast a concept comes back when a copy of the model is trained on a few pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast import functional
from cliperase_fast.auditing.attacks import ForgetTest
from cliperase_fast.auditing.features import Encoding, pixels_of
from cliperase_fast.auditing.scores import View, neighbours
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data import PairDataset, caption_key
from cliperase_fast.data.loading import PixelCache
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.fast_paths.embedding import train_rows
from cliperase_fast.models.runtime import evaluating
from cliperase_fast.progress import Steps

STEPS = (0, 1, 5, 10, 20, 50, 100)
SHOTS = 16
PAIRS = 128  # in a batch, shots included
LEARNING_RATE = 1e-4
DRAWS = 3


@dataclass(frozen=True)
class Batch:
    """Hold the pairs of one draw, used in every step. groups: int64 [B]; equal ids are not negatives of each other."""

    pixels: Tensor
    captions: list[tuple[Any, ...]]
    groups: Tensor


def shot_sources(view: View, sets: AuditSets, *, full: bool) -> dict[str, tuple[PairDataset, int]]:
    """Return, by kind of data, the pairs to train on and how many of them are drawn.

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
    return sources


def draw_batch(
    adapter: ClipAdapter,
    shots_of: PairDataset,
    retain: PairDataset,
    shots: int,
    seed: int,
    cache: PixelCache | None = None,
) -> Batch:
    """Draw `shots` pairs of one set, and retain pairs up to `PAIRS` in all."""
    rng = np.random.default_rng([seed, shots])
    first = rng.choice(len(shots_of), min(shots, len(shots_of)), replace=False)
    rest = rng.choice(len(retain), min(PAIRS - len(first), len(retain)), replace=False)
    pixels = torch.cat([pixels_of(adapter, shots_of, first, cache), pixels_of(adapter, retain, rest, cache)])
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
    """Train a copy; return which forget test images it names after each number of steps in `STEPS`, bool [m].

    AdamW with a learning rate of 1e-4 and no weight decay trains every weight with the CLIP loss and group masks. Each
    step uses the same images, each with a random one of its captions. The model is in evaluation mode, so there is no
    dropout and batch statistics are fixed.
    """
    copy = adapter.clone()
    captions = _TokenTable(copy, batch.captions)
    optimizer = torch.optim.AdamW(_weights(copy, captions.tokens), lr=LEARNING_RATE, weight_decay=0.0)
    rng = np.random.default_rng([how.seed, draw])
    pixels, groups = batch.pixels.to(how.device), batch.groups.to(how.device)
    found = {0: test.named(copy, how)}
    with evaluating(copy.module), torch.enable_grad():
        for step in range(1, STEPS[-1] + 1):
            tokens, rows = captions.different([int(rng.integers(len(group))) for group in batch.captions])
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


def _weights(copy: ClipAdapter, tokens: Tensor) -> list[nn.Parameter]:
    """Return the weights to train: all of the copy's, but of the token embedding only the rows of these ids [U, L]."""
    copy.module.requires_grad_(True)
    for weight in copy.module.parameters():
        weight.grad = None
    named = [(name, weight) for name, weight in copy.module.named_parameters() if weight.is_floating_point()]
    return [weight for _, weight in train_rows(copy, named, tokens)]


class _TokenTable:
    """Hold the token ids of the captions of a batch, each different caption once. tokens: [U, L]."""

    def __init__(self, adapter: ClipAdapter, captions: Sequence[tuple[Any, ...]]) -> None:
        row: dict[Any, int] = {}
        unique: list[Any] = []
        for caption in (one for group in captions for one in group):
            if row.setdefault(caption_key(caption), len(unique)) == len(unique):
                unique.append(caption)
        self.tokens = adapter.token_ids(unique)
        self.rows = [[row[caption_key(one)] for one in group] for group in captions]

    def different(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the token ids of each different caption [U', L], and the row of each pair's caption [B].

        chosen: which of its captions each pair takes.
        """
        place: dict[int, int] = {}
        rows = [place.setdefault(group[number], len(place)) for group, number in zip(self.rows, chosen, strict=True)]
        return self.tokens[list(place)], torch.tensor(rows, dtype=torch.int64, device="cpu")
