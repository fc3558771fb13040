"""The source `wds`: webdataset shards with random access, from an index of the position of each image."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import BinaryIO

import numpy as np

from cliperase_fast.data.classes import derive_classes
from cliperase_fast.data.decoding import MAX_IMAGE_BYTES, image_suffixes, is_other_image
from cliperase_fast.data.folders import is_system_file
from cliperase_fast.data.images import TarStore
from cliperase_fast.data.intake import MAX_CAPTION, Intake, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.reading import decode_text, in_bytes, open_regular, printable

_MAX_SHARDS = 100_000
_SHOWN = "(.jpg, .jpeg, .png, .webp or another format that Pillow reads)"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


@dataclass
class _Sample:
    """The members of one key: the position of its image, and its caption."""

    key: str
    where: str  # for messages
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # suffix: (offset, size)
    caption: str | None = None
    others: list[str] = field(default_factory=list)  # suffixes that are not read
    fault: tuple[str, str] | None = None  # (reason, message) of one of its members


def open_shards(pattern: str, name: str, intake: Intake) -> PairDataset:
    """Open local tar shards, named with webdataset's braces, that hold KEY.jpg/.jpeg/.png/.webp and KEY.txt.

    One pass over the shards reads keys, captions and the position of each image; images stay on disk. As in webdataset,
    a key ends at the first dot of a file's name; unlike there, the members of a key may be anywhere in their shard.
    Other members, such as .cls or .json, are ignored: classes are derived from the captions. An id is the sample's key,
    after the shard's name if keys repeat between shards.
    """
    shards = _expand(pattern, _shardlists())
    captions: list[tuple[str, ...]] = []
    keys: list[str] = []
    members: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        for sample in _samples(shard, intake):
            if not _is_pair(sample):
                continue
            fault = sample.fault or _incomplete(sample)
            if fault is not None:
                intake.fault(*fault, count=max(1, _dotted_images(sample)))
                continue
            ((suffix, place),) = sample.images.items()
            assert sample.caption is not None
            captions.append((sample.caption,))
            keys.append(printable(sample.key))
            members.append(f"{printable(sample.key)}.{suffix}")
            places.append((number, *place))
    if not keys:
        intake.require_some(0, f"there are no samples in {name}", "that can be used")
    shard_of, offsets, sizes = np.array(places, dtype=np.int64).T
    labels, space = derive_classes(captions) or (None, None)
    store = TarStore(shards, shard_of, offsets, sizes, members)
    ids = _ids(keys, shards, shard_of)
    return PairDataset(name, store, captions, ids, labels=labels, space=space, intake=intake)


def _shardlists() -> ModuleType:
    return import_extra("webdataset", "'wds:'", "webdataset.shardlists")


def _expand(pattern: str, shardlists: ModuleType) -> list[str]:
    count = count_braces(os.path.expandvars(pattern))
    if count > _MAX_SHARDS:
        raise InputError(f"the braces in {pattern[:200]!r} name {count} shards, more than {_MAX_SHARDS}; name fewer")
    try:
        urls = shardlists.expand_urls(pattern)
    except (
        ValueError,
        AssertionError,
    ) as error:  # unbalanced braces; an environment variable that is not set
        raise InputError(f"cannot expand the shards {pattern!r}: {error}") from error
    for url in urls:
        if re.match(r"(?!file:)[a-z0-9+]{2,}:", url):
            raise InputError(
                f"{url} is not a local file; 'wds:' reads single images from shards, so download them first"
            )
    shards = [os.path.expanduser(url.removeprefix("file:")) for url in urls]
    missing = [shard for shard in shards if not os.path.lexists(shard)]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(shards)} shards of {pattern!r} do not exist, the first is "
            f"{missing[0]}; name shards with braces, for example "
            "wds:/data/{00000..00099}.tar"
        )
    return shards


def count_braces(pattern: str) -> int:
    """Return the most names that the braces can give: nested lists count as a product."""
    count = 1
    for inner in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?", inner)
        if ends:
            step = max(1, abs(int(ends[3] or 1)))
            count *= abs(int(ends[2]) - int(ends[1])) // step + 1
        elif re.fullmatch(r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?", inner):  # numbers longer than any count of shards
            return 10**18
        else:
            count *= inner.count(",") + 1
    return count


def _samples(shard: str, intake: Intake) -> list[_Sample]:
    """Return the samples of a shard, in the order of their first members."""
    samples: dict[str, _Sample] = {}
    try:
        with open_regular(shard) as file:
            _refuse_compressed(file, shard)
            for member, data in _members(file):
                _take(member, data, samples, shard, intake)
    except tarfile.TarError as error:
        raise InputError(f"the shard {shard} is damaged or not an uncompressed tar file: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    except (ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the shard {shard} is damaged: {type(error).__name__}: {error}") from error
    return list(samples.values())


def _refuse_compressed(file: BinaryIO, shard: str) -> None:
    start = file.read(8)
    file.seek(0)
    kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise InputError(
            f"the shard {shard} is damaged or not an uncompressed tar file: it is compressed with {kind}, so "
            "single images cannot be read from it; decompress it first"
        )


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            yield member, tar
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header of the shard
        # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros or of the file.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"unreadable header at byte {end}")


def _take(
    member: tarfile.TarInfo, tar: tarfile.TarFile, samples: dict[str, _Sample], shard: str, intake: Intake
) -> None:
    name = re.sub(r"^(?:\./+)+", "", member.name)
    parts = name.split("/")
    if member.isdir() or re.match(r"__[^/]*__($|/)", name):  # webdataset's own names for metadata
        return
    if is_system_file(parts[-1]) or any(is_system_file(part) and not part.startswith(".") for part in parts):
        intake.ignored.add("hidden or system file", f"{printable(name)} in {shard}")
        return
    stem, dot, suffix = parts[-1].partition(".")
    if not dot:
        intake.ignored.add("member without a suffix", f"{printable(name)} in {shard}")
        return
    key, suffix = "/".join([*parts[:-1], stem]), suffix.lower()
    where = f"sample {printable(key)!r} in {shard}"
    sample = samples.setdefault(key, _Sample(key, where))
    if suffix == "txt":
        if sample.caption is not None:
            sample.fault = "key that occurs twice", f"{where} has two captions (.txt); keys must be unique in a shard"
        elif sample.fault is None:
            sample.caption, sample.fault = _caption(member, tar, where)
    elif f".{suffix}" in image_suffixes():
        fault = _image_fault(member, where)
        if suffix in sample.images:
            fault = "key that occurs twice", f"{where} has two images (.{suffix}); keys must be unique in a shard"
        sample.images[suffix] = (member.offset_data, member.size)
        sample.fault = sample.fault or fault
    else:
        sample.others.append(suffix)
        if not is_other_image(f".{suffix}"):
            intake.ignored.add(f"member .{suffix}, which is not read", f"{printable(name)} in {shard}")


def _irregular(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "a link"
    if member.issparse() or not member.isreg():
        return "a sparse file" if member.issparse() else "a device or pipe"
    return None


def _image_fault(member: tarfile.TarInfo, where: str) -> tuple[str, str] | None:
    kind = _irregular(member)
    if kind is not None:
        return "member is not a plain file", f"{where} has an image that is {kind}; pack plain files"
    if member.size > MAX_IMAGE_BYTES:
        limit = in_bytes(MAX_IMAGE_BYTES)
        return "image too large", f"{where} has an image of {in_bytes(member.size)}, more than {limit}; make it smaller"
    return None


def _caption(member: tarfile.TarInfo, tar: tarfile.TarFile, where: str) -> tuple[str | None, tuple[str, str] | None]:
    """Return the caption in a member, or (reason, message) if it is unusable."""
    kind = _irregular(member)
    if kind is not None:
        return None, ("member is not a plain file", f"{where} has a caption that is {kind}; pack plain files")
    if member.size > MAX_CAPTION:
        said = f"{where} has a caption of {in_bytes(member.size)}, more than {in_bytes(MAX_CAPTION)}; shorten it"
        return None, ("caption too long", said)
    file = tar.extractfile(member)
    assert file is not None
    try:
        text = decode_text(file.read()).strip()
    except ValueError as error:
        said = f"the caption of {where} ({printable(member.name)}) is unusable: {error}"
        return None, ("caption is not Unicode", said)
    fault = caption_fault(text)
    if fault is not None:
        return None, (fault[0], f"the caption of {where} {fault[1]}; complete or remove it")
    return text, None


def _is_pair(sample: _Sample) -> bool:
    """Return whether a sample is meant to be a pair, and not other data in the shard."""
    images = any(is_other_image(f".{suffix}") for suffix in sample.others) or _dotted_images(sample)
    return bool(sample.images or sample.fault or images or sample.caption is not None)


def _incomplete(sample: _Sample) -> tuple[str, str] | None:
    if len(sample.images) > 1:
        which = ", ".join(f".{suffix}" for suffix in sample.images)
        return "sample with several images", f"{sample.where} has {len(sample.images)} images ({which}); keep one"
    if sample.images and sample.caption is not None:
        return None
    dotted = [suffix for suffix in sample.others if "." in suffix]
    if dotted and _dotted_images(sample):
        name = f"{printable(sample.key)}.{dotted[0]}"
        return (
            "name with dots",
            f"{sample.where} has members such as {name}: webdataset ends a key at the first dot, so rename files with "
            "more than one dot",
        )
    unread = next((suffix for suffix in sample.others if is_other_image(f".{suffix}")), None)
    if unread is not None and not sample.images:
        return (
            f".{unread} images are not read",
            f"{sample.where} has an image (.{unread}) that Pillow does not read; convert it",
        )
    there = f"; it has .{', .'.join(sample.others)}, which is not read" if sample.others else ""
    if sample.images:
        text = next((suffix for suffix in sample.others if suffix in ("caption", "text", "cap", "captions")), None)
        if text is not None:
            there = f"; it has .{text}: name such members .txt"
        return "image without a caption", f"{sample.where} has no caption (.txt{there}); complete or remove it"
    return "caption without an image", f"{sample.where} has no image {_SHOWN[:-1]}{there}); complete or remove it"


def _dotted_images(sample: _Sample) -> int:
    """Return how many members with more dots in their names are images; 0 if the sample has its own image."""
    if sample.images:
        return 0
    return sum("." in suffix and f".{suffix.rpartition('.')[2]}" in image_suffixes() for suffix in sample.others)


def _ids(keys: list[str], shards: list[str], shard_of: np.ndarray) -> list[str]:
    if len(set(keys)) == len(keys):
        return keys
    stems = [os.path.splitext(os.path.basename(shard))[0] for shard in shards]
    ids = [f"{stems[number]}/{key}" for number, key in zip(shard_of, keys, strict=True)]
    double, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise InputError(f"the sample {double!r} occurs {count} times in the shards; name each shard once")
    return ids


def _open(request: Request) -> Source:
    pairs = open_shards(request.path, request.name, request.intake)
    return Source(request.name, request.prompted(pairs), None)


SOURCE = SourceType(
    "wds:SHARDS", "local webdataset shards with images and .txt captions: 'wds:/data/{00000..00099}.tar'", _open
)
