"""The source `stream`: webdataset shards read one after another, as retain pairs without an index.

Shards may be anything that webdataset opens: local files, "pipe:COMMAND" and URLs. Each pass takes the shards in an
order of its own, drawn by the seed, and shuffles samples in a buffer. Readers (processes of a run, and loader processes
of each) share the shards, or the samples where there are fewer shards than readers. The order depends on the seed, the
pass and the reader, so a position is a number of samples, and a stream is taken up again by reading up to it.
"""

from __future__ import annotations

import io
import itertools
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from cliperase_fast.data.classes import derive_classes
from cliperase_fast.data.decoding import MAX_IMAGE_BYTES, decode, image_suffixes
from cliperase_fast.data.images import ImageStore
from cliperase_fast.data.intake import MAX_CAPTION, Intake, Tally, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.shard_bytes import TIMEOUT, ShardBytes, open_shard
from cliperase_fast.data.shards import count_braces
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.reading import decode_text, printable

_BUFFER, _HEAD = 1000, 2000
_MAX_SHARDS = 100_000
_MOST = {"head": 10**9, "buffer": 10**9, "timeout": 10**6}  # the system takes no longer timeout


class StreamedPair(NamedTuple):
    """An encoded image with its caption. name: the key in its shard."""

    name: str
    shard: str
    data: bytes
    caption: str

    def image(self) -> Image.Image:
        """Decode the image; an `ItemError` names it."""
        return decode(io.BytesIO(self.data), f"{self.name} in the shard {self.shard}")


class HeadStore(ImageStore):
    """The pairs at the head of a stream, encoded in memory."""

    def __init__(self, pairs: Sequence[StreamedPair], origin: str) -> None:
        self.pairs, self._origin = list(pairs), origin

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, position: int) -> Image.Image:
        return self.pairs[position].image()

    def origin(self, position: int) -> str:
        return self._origin

    def identity(self, position: int) -> tuple[str, str]:
        return self.pairs[position].shard, self.pairs[position].name


@dataclass(frozen=True)
class PairStream:
    """The pairs of a stream behind its head, in passes without end.

    shards: their URLs. head: (shard, key) of the pairs that the stream leaves out. buffer: pairs held for shuffling.
    on_error: whether a pair or shard that cannot be used is an error ("raise") or left out ("skip"). timeout: seconds
    without a byte after which the program that reads a shard is stopped.
    """

    name: str
    shards: tuple[str, ...]
    seed: int
    buffer: int = _BUFFER
    on_error: str = "raise"
    timeout: float = TIMEOUT
    head: frozenset[tuple[str, str]] = field(default=frozenset(), repr=False)

    def fingerprint(self) -> str:
        """Return a text that is equal for streams with the same order of pairs."""
        return repr((self.shards, self.seed, self.buffer))

    def pairs(
        self, reader: int = 0, readers: int = 1, start: int = 0, skipped: Tally | None = None
    ) -> Iterator[StreamedPair]:
        """Yield the pairs of one of `readers` readers from position `start` on, without end.

        skipped: counts what is left out. Raises `InputError` for a shard that breaks off or cannot be read, and for a
        pass without a usable pair.
        """
        return itertools.islice(self._passes(reader, readers, Tally() if skipped is None else skipped), start, None)

    def _passes(self, reader: int, readers: int, skipped: Tally) -> Iterator[StreamedPair]:
        by_shard = len(self.shards) >= readers
        barren: set[str] = set()  # shards read since the last pair
        passes = 0  # since the last pair
        for number in itertools.count():
            intake, found = Intake(self.on_error, skipped), False
            order = np.random.default_rng([self.seed, number]).permutation(len(self.shards))
            mine = [self.shards[at] for at in (order[reader::readers] if by_shard else order)]
            samples = (pair for shard in mine for pair in read_shard(shard, intake, self.timeout))
            behind: Iterator[StreamedPair] = (pair for pair in samples if (pair.shard, pair.name) not in self.head)
            if not by_shard:  # in turn, so that each reader has some of fewer pairs than readers
                behind = itertools.islice(behind, (reader + number) % readers, None, readers)
            for pair in _shuffled(behind, self.buffer, random.Random(f"{self.seed} {number} {reader}")):
                found = True
                yield pair
            if found:
                barren, passes = set(), 0
                continue
            barren.update(mine)
            passes += 1
            if len(barren) == len(set(self.shards)) and (by_shard or passes >= readers):
                but = f" but the {len(self.head)} that are held for evaluation" if self.head else ""
                intake.require_some(0, f"the stream {self.name}", f"holds no usable pair{but}")


def _shuffled(pairs: Iterator[StreamedPair], size: int, generator: random.Random) -> Iterator[StreamedPair]:
    """Yield the pairs in an order drawn from a buffer of `size` of them."""
    buffer: list[StreamedPair] = []
    for pair in pairs:
        if len(buffer) < size:
            buffer.append(pair)
            continue
        at = generator.randrange(size)
        buffer[at], pair = pair, buffer[at]
        yield pair
    generator.shuffle(buffer)
    yield from buffer


def read_shard(shard: str, intake: Intake, timeout: float = TIMEOUT) -> Iterator[StreamedPair]:
    """Yield the pairs of a shard, in order. `intake` decides about pairs and shards that cannot be used.

    timeout: seconds without a byte after which the program that reads a shard is stopped.
    """
    count, last, started = 0, "", False
    try:
        with open_shard(shard, timeout) as raw:
            data = ShardBytes(raw)
            started = data.started
            with data.tar() as tar:
                for last, sample in _samples(tar, data):
                    if sample is not None and (pair := _pair(last, shard, sample, intake)) is not None:
                        count += 1
                        yield pair
    except InputError:
        raise
    except Exception as error:  # of tarfile, of webdataset's openers, of decompression
        said = printable(" ".join(str(error).split())[:300]) or type(error).__name__
        if started:
            place = f", in or behind the sample {printable(last)!r}" if last else ""
            reason, fault = "shard that breaks off", f"breaks off after {count} pairs{place} ({said}); make it whole"
        else:
            reason, fault = "shard that cannot be opened", f"cannot be opened ({said}); check its name"
        intake.fault(reason, f"the shard {printable(shard)} {fault}")


def _samples(tar: tarfile.TarFile, data: ShardBytes) -> Iterator[tuple[str, dict[str, bytes] | None]]:
    """Yield the key of each sample before its members are read, with None, and then with the members by suffix."""
    last = ""
    sample: dict[str, bytes] = {}
    for member in tar:
        key, suffix = _split(member)
        if not suffix:
            continue
        if key != last:
            if sample:
                yield last, sample
            last, sample = key, {}
            yield key, None
        file = tar.extractfile(member)
        assert file is not None
        sample[suffix] = file.read()
        tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header of the shard
    data.require_end(tar)
    if sample:
        yield last, sample


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return the key and the suffix, which begins at the first dot of the file's name; no suffix for other members."""
    folder, _, name = re.sub(r"^(?:\./+)+", "", member.name).rpartition("/")
    stem, _, suffix = name.partition(".")
    usable = member.isreg() and stem and not re.match(r"__[^/]*__$", name)
    if usable and suffix.lower() != "txt" and f".{suffix.lower()}" not in image_suffixes():
        usable = False
    if usable and member.size > (MAX_CAPTION if suffix.lower() == "txt" else MAX_IMAGE_BYTES):
        raise tarfile.ReadError(f"{member.name} is too large")
    return f"{folder}/{stem}" if folder else stem, suffix.lower() if usable else ""


def _pair(key: str, shard: str, sample: dict[str, bytes], intake: Intake) -> StreamedPair | None:
    where = f"sample {printable(key)!r} in the shard {printable(shard)}"
    images = [data for suffix, data in sample.items() if suffix != "txt"]
    fault = None
    if len(images) != 1 or "txt" not in sample:
        fault = "incomplete sample", f"{where} has {len(images)} images and {int('txt' in sample)} captions (.txt)"
    else:
        try:
            caption = decode_text(sample["txt"]).strip()
            found = caption_fault(caption)
            fault = None if found is None else (found[0], f"the caption of {where} {found[1]}")
        except ValueError as error:
            fault = "caption is not Unicode", f"the caption of {where} is unusable: {error}"
    if fault is not None:
        intake.fault(fault[0], f"{fault[1]}; complete or remove it")
        return None
    return StreamedPair(printable(key), printable(shard), images[0], caption)


def open_stream(request: Request) -> Source:
    """Read the head of a stream into memory; the rest follows while training."""
    numbers = request.numbers({"head": _HEAD, "buffer": _BUFFER, "timeout": TIMEOUT}, {"head": 10}, _MOST)
    count = count_braces(request.path)
    if count > _MAX_SHARDS:
        raise InputError(f"the braces in {request.name[:200]!r} name {count} shards, more than {_MAX_SHARDS}")
    try:
        shards = tuple(import_extra("webdataset", "'stream:'", "webdataset.shardlists").expand_urls(request.path))
    except (ValueError, AssertionError) as error:
        raise InputError(f"cannot expand the shards {request.path!r}: {error}") from error
    stream = PairStream(
        request.name, shards, request.seed, numbers["buffer"], request.intake.on_error, numbers["timeout"]
    )
    head = list(itertools.islice(_one_pass(stream, request.intake), numbers["head"] + 1))
    if len(head) <= numbers["head"]:
        skipped = request.intake.skipped
        first = next(iter(skipped.examples.values()), "")
        left_out = f" ({len(skipped)} left out, the first: {first})" if first else ""
        raise InputError(
            f"the stream {request.name} ends after {len(head)} pairs, and its first {numbers['head']} are held for "
            f"evaluation: give more shards or a smaller '?head=', or use 'wds:' for few pairs{left_out}"
        )
    head = head[: numbers["head"]]
    captions = [(pair.caption,) for pair in head]
    labels, space = derive_classes(captions) or (None, None)
    ids = [f"{pair.shard}/{pair.name}" for pair in head]
    pairs = PairDataset(
        request.name, HeadStore(head, request.name), captions, ids, labels=labels, space=space, intake=request.intake
    )
    behind = replace(stream, head=frozenset((pair.shard, pair.name) for pair in head))
    return Source(request.name, pairs, None, stream=behind)


def _one_pass(stream: PairStream, intake: Intake) -> Iterator[StreamedPair]:
    order = np.random.default_rng([stream.seed]).permutation(len(stream.shards))
    samples = (pair for at in order for pair in read_shard(stream.shards[at], intake, stream.timeout))
    return _shuffled(samples, stream.buffer, random.Random(stream.seed))


SOURCE = SourceType(
    "stream:SHARDS",
    "webdataset shards read one after another, local, 'pipe:COMMAND' or by URL; only as retain",
    open_stream,
    (
        Option("head", f"pairs held for evaluation ({_HEAD})"),
        Option("buffer", f"pairs held for shuffling ({_BUFFER})"),
        Option("timeout", f"seconds without data after which the program that reads a shard is stopped ({TIMEOUT})"),
    ),
)
