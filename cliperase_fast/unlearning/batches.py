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
from cliperase_fast.data.checks import BadImage
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.intake import ItemError
from cliperase_fast.data.loading import PixelCache, load_batches, name_of, stack_images, transformed
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.progress import say

_FORGET, _RETAIN = 0, 1
_ALL_CAPTIONS = 16_384  # different captions that are all tokenised before training starts
_LONGEST = 256  # captions of more that are checked then, as they may not fit the model's context
IN_A_ROW = 100  # unreadable images after which nothing replaces a pair


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
    """The distinct captions of some pairs, tokenised once, all together in batches if they are not too many.

    Of more than `_ALL_CAPTIONS` only some are tokenised here, the longest among them, and the others when `rows` first
    returns them. `of_pair[i]` lists the rows of pair i.
    """

    def __init__(self, pairs: PairDataset, token_ids: Callable[[Sequence[Any]], Tensor]) -> None:
        self.captions, self.of_pair = pairs.different_captions()
        self._token_ids, self._ids, self._name = token_ids, pairs.ids, pairs.name
        self.complete = len(self.captions) <= _ALL_CAPTIONS
        self._first = np.arange(len(self.captions)) if self.complete else self._some()
        tokens = self._tokenised(self._first)  # [U, L]
        if self.complete:
            self._tokens = tokens.to(torch.int16) if int(tokens.max()) < 2**15 else tokens
            return
        # Pages that are never written cost no memory.
        self._tokens = torch.zeros(len(self.captions), tokens.shape[1], dtype=torch.int32, device="cpu")
        self._known = np.zeros(len(self.captions), dtype=bool)
        self._tokens[torch.from_numpy(self._first)] = tokens
        self._known[self._first] = True

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def first_tokens(self) -> Tensor:
        """The tokens of the captions that were tokenised first: all of them, or some of many."""
        return self._tokens if self.complete else self._tokens[torch.from_numpy(self._first)]

    @property
    def highest(self) -> int:
        """The row with the highest token id of these, which a model with a smaller vocabulary cannot encode."""
        return int(self._first[int(self.first_tokens.amax(1).argmax())])

    def rows(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        wanted = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if not self.complete:
            unknown = np.unique(wanted.numpy())
            unknown = unknown[~self._known[unknown]]
            if len(unknown):
                self._tokens[torch.from_numpy(unknown)] = self._tokenised(unknown)
                self._known[unknown] = True
        return self._tokens[wanted].long()

    def _some(self) -> np.ndarray:
        """Return the rows to begin with: spread evenly, and the longest captions."""
        lengths = np.array([len(caption) for caption in self.captions])
        longest = np.argpartition(lengths, -_LONGEST)[-_LONGEST:]
        spread = np.linspace(0, len(lengths) - 1, _ALL_CAPTIONS // 4).astype(np.int64)
        return np.unique(np.concatenate([longest, spread]))

    def _tokenised(self, rows: np.ndarray) -> Tensor:  # [U] -> [U, L] int32
        try:
            parts = np.split(rows, range(4096, len(rows), 4096))
            return torch.cat([self._token_ids([self.captions[row] for row in part]).to(torch.int32) for part in parts])
        except InputError as error:
            if self.complete:
                raise
            raise InputError(f"{error} (a caption of {self._pair_of(rows)})") from error

    def _pair_of(self, rows: np.ndarray) -> str:
        """Name the first pair with a caption that cannot be tokenised."""
        for row in map(int, rows):
            try:
                self._token_ids([self.captions[row]])
            except InputError:
                pair = next(index for index, own in enumerate(self.of_pair) if row in own)
                return f"{self._ids[pair]!r} of {self._name}"
        return self._name


class Substitutes:
    """Replaces training pairs whose images cannot be read by the next readable pair of the same set, in its order.

    Which pair replaces which depends on the files alone, so that a run can be resumed. Images are read when they are
    first asked about, into `cache` where that keeps them. found: the bad images by the row of their pair.
    """

    def __init__(self, pairs: PairDataset, n_forget: int, read: Callable[[int], object]) -> None:
        self.pairs, self.n_forget, self.read = pairs, n_forget, read
        self.found: dict[int, BadImage] = {}
        self._good = np.zeros(len(pairs), dtype=bool)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows to use in place of these; int64, of the same length."""
        if self._good[rows].all():
            return rows
        return np.array([self._replaced(int(row)) for row in rows], dtype=np.int64)

    def _replaced(self, row: int) -> int:
        first, stop = (0, self.n_forget) if row < self.n_forget else (self.n_forget, len(self.pairs))
        for step in range(min(stop - first, IN_A_ROW)):
            other = first + (row - first + step) % (stop - first)
            if self._readable(other):
                return other
        raise UnlearningError(
            f"{IN_A_ROW} images of {self.pairs.name} in a row cannot be read, from {self.pairs.ids[row]!r} on (the "
            f"first: {self.found[row].message})"
        )

    def _readable(self, row: int) -> bool:
        if not self._good[row] and row not in self.found:
            try:
                self.read(row)
                self._good[row] = True
            except InputError as error:
                reason = error.reason if isinstance(error, ItemError) else "image cannot be read"
                self.found[row] = BadImage(reason, str(error))
                say("left out %s: %s", self.pairs.ids[row], error)
        return bool(self._good[row])


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
            return self._transformed(self.pairs.image(index), name_of(self.pairs, index))
        with seeded(self.seed, index, draw, gpus=False):
            return self._transformed(self.pairs.image(index, fixed=False), name_of(self.pairs, index))

    def _transformed(self, image: Any, name: str = "an image of the stream") -> Tensor:
        return image if isinstance(image, Tensor) else transformed(self.transform, image, name)


class Numbered:
    """The keys of batches, each list made when it is asked for."""

    def __init__(self, numbers: range, keys: Callable[[int], list[tuple[int, int]]]) -> None:
        self.numbers, self.keys = numbers, keys

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.keys, self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class BatchLoader:
    """Loads batches in the plan's order, with `num_workers` processes.

    On several ranks each loads its contiguous share of the forget pairs and of the retain pairs of a batch.
    substitutes: replaces pairs whose images cannot be read; None if all are known to be readable, or if one that is not
    is an error.
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
        substitutes: Substitutes | None = None,
    ) -> None:
        self.ranks, self.substitutes = ranks, substitutes
        self.plan, self.captions, self.group_ids, self.num_workers = plan, captions, group_ids, num_workers
        self.pixels = PixelDataset(pairs, transform, plan.seed if random_transform else None, cache)
        self.images: Dataset = self.pixels  # or the activations of frozen layers

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        loader = DataLoader(
            self.images,
            batch_sampler=Numbered(range(start, stop), self._keys),
            num_workers=self.num_workers,
            collate_fn=stack_images,
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
        return self.readable(np.concatenate([forget, self.plan.n_forget + retain])), len(forget)

    def readable(self, pairs: np.ndarray) -> np.ndarray:
        """Return the training pairs to use in place of these."""
        return pairs if self.substitutes is None else self.substitutes(pairs)

    def drawn(self, batches: int, *, forget: bool, whole: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what the first `batches` batches read: the sorted training pairs, and the rows of their captions.

        forget: with the forget pairs, all of them. whole: all training pairs and captions. Rows are None for all.
        """
        retain = np.arange(self.plan.n_retain) if whole else self.plan.retain_used(batches)
        pairs = np.concatenate([np.arange(self.plan.n_forget if forget or whole else 0), self.plan.n_forget + retain])
        pairs = np.unique(self.readable(pairs)) if self.substitutes is not None else pairs
        if self.captions.complete or whole:
            return pairs, None
        turns = 1 + (batches - 1) // self.plan.batches_per_epoch
        rows = [own[(index + np.arange(min(turns, len(own)))) % len(own)]
                for index in map(int, pairs) for own in (self.captions.of_pair[index],)]  # fmt: skip
        return pairs, np.unique(np.concatenate(rows))

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
