"""Batches whose retain pairs come from a stream, in place of training pairs with an index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.intake import ItemError, Tally
from cliperase_fast.data.loading import load_batches, stack_images
from cliperase_fast.data.streams import PairStream, StreamedPair
from cliperase_fast.errors import InputError
from cliperase_fast.progress import say
from cliperase_fast.unlearning.batches import IN_A_ROW, Batch, BatchLoader, Numbered


class StreamLoader(BatchLoader):
    """Loads batches of planned forget pairs and streamed retain pairs.

    Every rank, and every loader process of it, is a reader of the stream. A batch depends on its number, the seed and
    the number of readers. The plan's retain pairs, which are the head of the stream, are not in the batches.
    """

    def __init__(
        self, *arguments: Any, stream: PairStream, token_ids: Callable[[Sequence[Any]], Tensor], skipped: Tally,
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **settings)
        self.stream, self.token_ids, self.skipped = stream, token_ids, skipped

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        forget_pixels = self._forget_pixels(start, stop)
        own = self.ranks.share(self.plan.sizes[1])
        count = own.stop - own.start
        streamed = self._streamed(start * count)
        for number in range(start, stop):
            pixels, captions = zip(*islice(streamed, count), strict=True)
            yield self._joint(number, next(forget_pixels), stack_images(pixels), captions)

    def _forget_pixels(self, start: int, stop: int) -> Iterator[Tensor | None]:
        if self.plan.sizes[0] == 0:
            return (None for _ in range(start, stop))
        loader = DataLoader(
            self.images,
            batch_sampler=Numbered(range(start, stop), self._forget_keys),
            num_workers=self.num_workers,
            collate_fn=stack_images,
            generator=torch.Generator("cpu"),
        )
        return load_batches(loader)

    def _forget_keys(self, number: int) -> list[tuple[int, int]]:
        return [(int(row), number) for row in self._forget_of(number)]

    def _forget_of(self, number: int) -> np.ndarray:
        forget = self.plan.batch(number)[0]
        return self.readable(forget[self.ranks.share(len(forget))])

    def _streamed(self, start: int) -> Iterator[tuple[Tensor, str]]:
        """Yield this rank's pairs from a position on, from the loader processes in turn."""
        pairs = _Streamed(
            self.stream, self.pixels._transformed, self.pixels.seed, start, self.ranks.rank, self.ranks.size
        )
        loader = DataLoader(pairs, batch_size=None, num_workers=self.num_workers, generator=torch.Generator("cpu"))
        for pixels, caption, skipped in load_batches(loader):
            self.skipped.update(skipped)
            yield pixels, caption

    def _joint(self, number: int, forget_pixels: Tensor | None, pixels: Tensor, captions: Sequence[str]) -> Batch:
        forget = self._forget_of(number) if forget_pixels is not None else np.empty(0, dtype=np.int64)
        turn = number // self.plan.batches_per_epoch
        own = [self.captions.of_pair[row] for row in forget]
        texts = [self.captions.captions[rows[(row + turn) % len(rows)]] for row, rows in zip(forget, own, strict=True)]
        texts += captions
        unique = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(unique)}
        rows = np.array([place[text] for text in texts], dtype=np.int64)
        return Batch(
            pixels=pixels if forget_pixels is None else torch.cat([forget_pixels, pixels]),
            tokens=self.token_ids(unique),
            text_of_pair=torch.as_tensor(rows, dtype=torch.int64, device="cpu"),
            caption_of_pair=rows,
            pairs=np.concatenate([forget, np.full(len(captions), -1, dtype=np.int64)]),
            n_forget=len(forget),
            group_ids=None if self.group_ids is None else _groups_of(texts),
        )


class _Streamed(IterableDataset):
    """Transformed images and captions of the stream, with what was left out before each; a share in each process."""

    def __init__(
        self, stream: PairStream, transformed: Callable[[Any], Tensor], seed: int | None, start: int, rank: int,
        ranks: int,
    ) -> None:  # fmt: skip
        self.stream, self.transformed, self.seed, self.start = stream, transformed, seed, start
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[tuple[Tensor, str, Tally]]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        worker = (worker + self.start) % workers  # the loader begins with its first process
        first = (self.start - worker + workers - 1) // workers
        reader = self.rank * workers + worker
        skipped = Tally()
        pairs = self.stream.pairs(reader, self.ranks * workers, first, skipped)
        for position, (image, caption) in enumerate(self._decoded(pairs, skipped), first):
            if self.seed is None:
                pixels = self.transformed(image)
            else:
                with seeded(self.seed, position, reader, gpus=False):
                    pixels = self.transformed(image)
            yield pixels, caption, skipped.take()

    def _decoded(self, pairs: Iterable[StreamedPair], skipped: Tally) -> Iterator[tuple[Any, str]]:
        """Yield images and captions. The next readable pair takes the place of an unreadable one, so that positions
        stay as they are."""
        missing = 0
        for pair in pairs:
            try:
                image = pair.image()
            except ItemError as error:
                if self.stream.on_error == "raise":
                    raise
                skipped.add(error.reason, str(error))
                say("left out %s: %s", pair.name, error)
                missing += 1
                if missing == IN_A_ROW:
                    raise InputError(f"{missing} images in a row cannot be read in the stream {self.stream.name}, the "
                                     f"last one: {error}") from error  # fmt: skip
                continue
            for _ in range(missing + 1):
                yield image, pair.caption
            missing = 0


def _groups_of(texts: Sequence[str]) -> Tensor:
    """Return a number for each caption, equal for equal ones on all ranks; int64."""
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    numbers = [int.from_bytes(digest, "big") >> 1 for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
