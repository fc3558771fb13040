"""Webdataset shards with random access: an index of where each image lies, instead of a stream."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cliperase_fast.data.classes import derive_classes
from cliperase_fast.data.images import TarStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError

_IMAGES = ("jpg", "jpeg", "png", "webp")


def open_shards(pattern: str, name: str) -> PairDataset:
    """Local tar shards, named with webdataset's braces, holding KEY.jpg/.jpeg/.png/.webp and KEY.txt.

    One pass over the shards reads keys, captions and the place of each image; images stay on disk. Other
    members, such as .cls or .json, are left alone: classes are read off the captions. An id is the sample's
    key, with the shard's name before it when keys repeat between shards.
    """
    shardlists, tariterators = _webdataset()
    shards = _expand(pattern, shardlists)
    captions: list[tuple[str, ...]] = []
    keys: list[str] = []
    members: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        for sample in _samples(shard, tariterators):
            key = sample["__key__"]
            kind = next((suffix for suffix in _IMAGES if suffix in sample), None)
            if kind is None or "txt" not in sample:
                missing = "caption (.txt)" if kind else f"image ({', '.join('.' + suffix for suffix in _IMAGES)})"
                raise InputError(f"sample {key!r} in {shard} has no {missing}: complete or remove it")
            if not sample["txt"]:
                raise InputError(f"the caption of sample {key!r} in {shard} is empty: complete or remove it")
            captions.append((sample["txt"],))
            keys.append(key)
            members.append(f"{key}.{kind}")
            places.append((number, *sample[kind]))
    if not keys:
        raise InputError(f"there are no samples in {name}")
    shard_of, offsets, sizes = np.array(places, dtype=np.int64).T
    labels, space = derive_classes(captions) or (None, None)
    store = TarStore(shards, shard_of, offsets, sizes, members)
    return PairDataset(name, store, captions, _ids(keys, shards, shard_of), labels=labels, space=space)


def _webdataset() -> tuple[ModuleType, ModuleType]:
    try:
        from webdataset import shardlists, tariterators
    except ImportError as error:
        raise InputError(
            f"'wds:' needs the webdataset library ({error}): pip install \"cliperase_fast[webdataset]\""
        ) from error
    return shardlists, tariterators


def _expand(pattern: str, shardlists: ModuleType) -> list[str]:
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
                f"{url} is not a local file: 'wds:' reads single images out of shards, so download them first"
            )
    shards = [os.path.expanduser(url.removeprefix("file:")) for url in urls]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(shards)} shards of {pattern!r} do not exist, the first is "
            f"{missing[0]}; shards "
            "are named with braces, for example wds:/data/{00000..00099}.tar"
        )
    return shards


def _samples(shard: str, tariterators: ModuleType) -> Iterator[dict[str, Any]]:
    """Samples as webdataset groups them; images are (offset, size) in the shard, captions text."""
    try:
        yield from tariterators.group_by_keys(_members(shard))
    except tarfile.TarError as error:
        raise InputError(f"the shard {shard} is damaged or not an uncompressed tar file: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the shard {shard} cannot be read: {error.args[0]}") from error


def _members(shard: str) -> Iterator[dict[str, Any]]:
    end = 0
    with tarfile.open(shard, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):  # webdataset's own names for metadata
                suffix = member.name.rpartition(".")[2].lower()
                content: Any = (member.offset_data, member.size)
                if suffix == "txt":
                    content = _caption(tar, member, shard)
                yield {"fname": member.name, "data": content, "__url__": shard}
            tar.members = []  # type: ignore[attr-defined]  # or it keeps every header of the shard
        # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros, or no
        # more bytes.
        assert tar.fileobj is not None
        tar.fileobj.seek(end)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"unreadable header at byte {end}")


def _caption(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> str:
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{member.name} in {shard} is not UTF-8 text: {error}") from error


def _ids(keys: list[str], shards: list[str], shard_of: np.ndarray) -> list[str]:
    if len(set(keys)) == len(keys):
        return keys
    stems = [os.path.splitext(os.path.basename(shard))[0] for shard in shards]
    ids = [f"{stems[number]}/{key}" for number, key in zip(shard_of, keys, strict=True)]
    double, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise InputError(f"the sample {double!r} occurs {count} times in the shards: give each shard once")
    return ids
