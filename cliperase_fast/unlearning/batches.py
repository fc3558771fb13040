"""Which pairs are in which batch, and loading them: a pure function of (seed, step), so a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.loading import PixelCache, load_batches
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks

_FORGET, _RETAIN = 0, 1


@dataclass(frozen=True)
class BatchPlan:
    """The order of forget and retain pairs over a whole run.

    Each set is walked in full batches of a fresh permutation per pass (the incomplete last batch of a pass is dropped,
    another one each time), so every batch holds exactly `forget_pairs` + `retain_pairs` different pairs. An epoch is
    one pass over the set named by `epoch_over`; the other set is cycled.

    with_forget: whether batches hold forget pairs. Without them epochs are as long, with the same retain pairs.
    """

    n_forget: int
    n_retain: int
    forget_pairs: int  # M, already at most n_forget
    retain_pairs: int  # N, already at most n_retain
    epoch_over: str
    seed: int
    with_forget: bool = True

    @property
    def sizes(self) -> tuple[int, int]:
        """How many forget pairs and how many retain pairs a batch holds."""
        return self.forget_pairs if self.with_forget else 0, self.retain_pairs

    @property
    def batches_per_epoch(self) -> int:
        if self.epoch_over == "forget":
            return self.n_forget // self.forget_pairs
        return self.n_retain // self.retain_pairs

    def steps_per_epoch(self, accumulate: int) -> int:
        """Optimizer steps, of `accumulate` batches each."""
        return max(1, self.batches_per_epoch // accumulate)

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return indices into the forget set [M] and the retain set [N] of the batch with this number, from 0."""
        forget = self._draw(_FORGET, self.n_forget, self.forget_pairs, number)
        return forget[: self.sizes[0]], self._draw(_RETAIN, self.n_retain, self.retain_pairs, number)

    def retain_used(self, batches: int) -> np.ndarray:
        """Return the sorted retain indices that the first `batches` batches visit."""
        per_pass = self.n_retain // self.retain_pairs
        if batches >= 8 * per_pass:  # practically all of them: not worth enumerating
            return np.arange(self.n_retain)
        drawn = [self._draw(_RETAIN, self.n_retain, self.retain_pairs, number) for number in range(batches)]
        return np.unique(np.concatenate(drawn))

    def _draw(self, which: int, size: int, count: int, number: int) -> np.ndarray:
        per_pass = size // count
        order = _permutation(size, self.seed, which, number // per_pass)
        start = (number % per_pass) * count
        return order[start : start + count]


# The permutation of a pass serves all its batches; two sets are walked at a time.
_PERMUTATIONS: dict[tuple[int, int, int, int], np.ndarray] = {}


def _permutation(size: int, seed: int, which: int, passed: int) -> np.ndarray:
    key = (size, seed, which, passed)
    if key not in _PERMUTATIONS:
        while len(_PERMUTATIONS) >= 8:
            _PERMUTATIONS.pop(next(iter(_PERMUTATIONS)))
        _PERMUTATIONS[key] = np.random.default_rng([seed, which, passed]).permutation(size)
    return _PERMUTATIONS[key]


@dataclass
class Batch:
    """A rank's share of a batch: M forget and N retain pairs, all of them on a single process."""

    pixels: Tensor  # [M + N, 3, H, W], or the frozen layers' activations; forget pairs first
    tokens: Tensor  # [U, L], the distinct captions of the batch
    text_of_pair: Tensor  # [M + N], row of `tokens` for each pair
    caption_of_pair: np.ndarray  # [M + N], index into the caption table
    pairs: np.ndarray  # [M + N], index into the training pairs
    n_forget: int  # M
    group_ids: Tensor | None  # [M + N]

    def count(self, joint: bool) -> int:
        """Return M + N, or N unless `joint`."""
        return len(self.pairs) if joint else len(self.pairs) - self.n_forget


class CaptionTable:
    """The distinct captions of some pairs, tokenised once.

    tokens [U, L] are kept in the smallest integer type that holds the ids; `of_pair[i]` lists the rows of pair i.
    """

    def __init__(self, pairs: PairDataset, token_ids: Callable[[Sequence[Any]], Tensor]) -> None:
        captions, self.of_pair = pairs.different_captions()
        parts = [captions[start : start + 4096] for start in range(0, len(captions), 4096)]
        self.tokens = torch.cat([token_ids(part).to(torch.int32) for part in parts])  # [U, L]
        if int(self.tokens.max()) < 2**15:
            self.tokens = self.tokens.to(torch.int16)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def highest(self) -> int:
        """The row with the highest token id, which a model with a smaller vocabulary cannot encode."""
        return int(self.tokens.amax(1).argmax())

    def rows(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        return self.tokens[torch.as_tensor(indices, dtype=torch.int64, device="cpu")].long()


class PixelDataset(Dataset):
    """Transformed images by (index, draw): `draw` seeds what is random, so the result depends on nothing else.

    seed: None if neither the transform nor the dataset is random.
    """

    def __init__(
        self,
        pairs: PairDataset,
        transform: Callable[[Any], Tensor] | None,
        seed: int | None,
        cache: PixelCache | None = None,
    ) -> None:
        self.pairs, self.transform, self.seed = pairs, transform, seed
        self.cache = cache if seed is None and transform is not None else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, draw = key
        if self.cache is not None and self.transform is not None:
            return self.cache.pixels(self.pairs, index, self.transform)
        if self.seed is None:
            return self._transformed(self.pairs.image(index))
        with seeded(self.seed, index, draw, gpus=False):
            return self._transformed(self.pairs.image(index, fixed=False))

    def _transformed(self, image: Any) -> Tensor:
        if isinstance(image, Tensor):
            return image
        assert self.transform is not None, "checked before training"
        return self.transform(image)


class BatchLoader:
    """Loads batches in the plan's order, with `num_workers` processes.

    On several ranks each loads its contiguous share of the forget pairs and of the retain pairs of a batch.
    """

    def __init__(
        self,
        pairs: PairDataset,
        plan: BatchPlan,
        captions: CaptionTable,
        *,
        transform: Callable[[Any], Tensor] | None,
        random_transform: bool,
        group_ids: np.ndarray | None,
        num_workers: int = 0,
        ranks: Ranks = SINGLE_PROCESS,
        cache: PixelCache | None = None,
    ) -> None:
        self.ranks = ranks
        self.plan, self.captions, self.group_ids, self.num_workers = plan, captions, group_ids, num_workers
        self.pixels = PixelDataset(pairs, transform, plan.seed if random_transform else None, cache)
        self.images: Dataset = self.pixels  # or the activations of frozen layers

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.images,
            batch_sampler=[self._keys(number) for number in range(start, stop)],
            num_workers=self.num_workers,
            collate_fn=torch.stack,
            generator=torch.Generator("cpu"),  # its own, so that starting it leaves the global random state unchanged
        )
        for number, pixels in zip(range(start, stop), load_batches(loader), strict=True):
            yield self._batch(number, pixels)

    def pairs_of_ranks(self) -> list[int]:
        """Return how many pairs of a batch each rank has."""
        sides = [self.ranks.shares(count) for count in self.plan.sizes]
        return [sum(part.stop - part.start for part in of_rank) for of_rank in zip(*sides, strict=True)]

    def _pairs_of(self, number: int) -> tuple[np.ndarray, int]:
        """Return this rank's pairs of a batch, and how many of them are forget pairs."""
        forget, retain = (pairs[self.ranks.share(len(pairs))] for pairs in self.plan.batch(number))
        return np.concatenate([forget, self.plan.n_forget + retain]), len(forget)

    def _keys(self, number: int) -> list[tuple[int, int]]:
        return [(int(index), number) for index in self._pairs_of(number)[0]]

    def _batch(self, number: int, pixels: Tensor) -> Batch:
        pairs, n_forget = self._pairs_of(number)
        # The captions of an image take turns, one for each pass.
        turn = number // self.plan.batches_per_epoch
        rows = np.array([self.captions.of_pair[i][(i + turn) % len(self.captions.of_pair[i])] for i in pairs])
        unique, inverse = np.unique(rows, return_inverse=True)
        return Batch(
            pixels=pixels,
            tokens=self.captions.rows(unique),
            text_of_pair=torch.as_tensor(inverse, dtype=torch.int64, device="cpu"),
            caption_of_pair=rows,
            pairs=pairs,
            n_forget=n_forget,
            group_ids=self._groups(pairs, rows),
        )

    def _groups(self, pairs: np.ndarray, captions: np.ndarray) -> Tensor | None:
        if self.group_ids is None:
            return None
        if self.group_ids.size == 0:  # no classes: the same caption means the same group
            return torch.as_tensor(captions, dtype=torch.int64, device="cpu")
        return torch.as_tensor(self.group_ids[pairs], dtype=torch.int64, device="cpu")
