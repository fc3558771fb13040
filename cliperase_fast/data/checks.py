"""Check pairs before work starts (unreadable images, pairs in both sets), and hold out a part of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data.decoding import tensor_fault
from cliperase_fast.data.images import pixel_bytes
from cliperase_fast.data.intake import ON_ERROR, ItemError
from cliperase_fast.data.pairs import PairDataset, wording
from cliperase_fast.errors import InputError
from cliperase_fast.plurals import counted
from cliperase_fast.progress import Steps


def split(pairs: PairDataset, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the remaining and of the held-out pairs, int64, both sorted.

    Stratified by class if there are classes: each class gives its share, rounded so that the total is right. At least
    one pair is held out and at least one stays. The same arguments always give the same split.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the fraction to hold out is {fraction}; it must be between 0 and 1, both excluded")
    n = len(pairs)
    if n < 2:
        raise InputError(f"{pairs.name} has {counted(n, 'pair')}; splitting needs at least two")
    rng = np.random.default_rng(seed)
    wanted = min(max(round(n * fraction), 1), n - 1)
    labels = np.zeros(n, dtype=np.int64) if pairs.labels is None else pairs.labels
    order = rng.permutation(n)
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled inside each class
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    counts, remainders = np.divmod(sizes * wanted, n)
    # Round the largest remainders up, but avoid taking the last pair of a class. Draw among equals, or low labels
    # would always win.
    rounding_order = np.lexsort((rng.random(len(sizes)), -remainders, counts + 1 >= sizes))
    counts[rounding_order[: wanted - int(counts.sum())]] += 1
    held_out = np.concatenate([order[start : start + count] for start, count in zip(starts, counts, strict=True)])
    return np.setdiff1d(np.arange(n), held_out), np.sort(held_out)


class BadImage(NamedTuple):
    """An image that cannot be used: the kind of fault, and a message that names the image."""

    reason: str
    message: str


def check_images(
    pairs: PairDataset, *, on_error: str = "raise", progress: bool = False
) -> tuple[np.ndarray, list[BadImage]]:
    """Decode every image once; return the indices of the good ones (int64, sorted), and the bad ones.

    Images that are uint8 pixels in memory are not decoded again. Tensor images must be float [3, H, W], all of one
    shape, dtype and device, or an `InputError` names the one that is not. A tensor with a non-finite pixel is bad.
    on_error: "raise" turns bad images into an `InputError` with the first one and their number; "skip" leaves them to
    the caller.
    """
    if on_error not in ON_ERROR:
        raise InputError(f"on_error={on_error!r} is not one of raise, skip")
    todo = [index for index in range(len(pairs)) if not pairs.store.decoded(int(pairs.positions[index]))]
    good = np.ones(len(pairs), dtype=bool)
    bad: list[BadImage] = []
    forms: dict[str, int] = {}  # each form and the first index that has it
    with Steps(len(todo), f"checking {pairs.name}", "image", bar=progress, leave=True) as steps:
        for index, seen in zip(todo, _looked_at(pairs, todo), strict=True):
            if seen.fault is not None:
                good[index] = False
                bad.append(seen.fault)
            else:
                forms.setdefault(seen.form, index)
            steps.update()
    if len(todo) < len(pairs):
        forms.setdefault(_PIL, int(np.setdiff1d(np.arange(len(pairs)), todo)[0]))
    if len(forms) > 1:
        (form, index), (other, other_index) = list(forms.items())[:2]
        raise InputError(
            f"images of {pairs.name} differ in form: {pairs.ids[index]!r} is {form}, "
            f"{pairs.ids[other_index]!r} is {other}; "
            "use only PIL images, or only tensors of one shape, dtype and device"
        )
    if bad and on_error == "raise":
        raise InputError(
            f"{bad[0].message} ({len(bad)} of the {len(pairs)} images of {pairs.name} are bad); repair or remove "
            "them, or pass on_error='skip' to leave them out"
        )
    return np.flatnonzero(good), bad


_PIL = "a PIL image"


class _Seen(NamedTuple):
    form: str = ""  # the kind of image
    fault: BadImage | None = None  # why it cannot be used


def _look(pairs: PairDataset, index: int) -> _Seen:
    try:
        image = pairs.image(index)
    except ItemError as error:
        return _Seen(fault=BadImage(error.reason, str(error)))
    except InputError as error:
        return _Seen(fault=BadImage("image cannot be read", str(error)))
    if not isinstance(image, Tensor):
        return _Seen(_PIL)
    which = f"image {pairs.ids[index]!r} of {pairs.name}"
    fault = tensor_fault(image)
    if fault is not None:
        raise InputError(f"{which} {fault}")
    if not bool(torch.isfinite(image).all()):
        message = f"{which} has pixels that are not finite (NaN or infinite)"
        return _Seen(fault=BadImage("pixels are not finite", message))
    dtype = str(image.dtype).removeprefix("torch.")
    return _Seen(f"a {dtype} tensor {list(image.shape)} on {image.device}")


def _looked_at(pairs: PairDataset, todo: list[int]) -> Iterator[_Seen]:
    look = partial(_look, pairs)
    if not pairs.store.thread_safe():
        yield from map(look, todo)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the GIL
        for start in range(0, len(todo), 256):  # in parts, so that an interrupt need not wait for all of them
            yield from pool.map(look, todo[start : start + 256])


def overlap(first: PairDataset, second: PairDataset) -> np.ndarray:
    """Return the indices into `second`, int64 and sorted, of pairs that `first` has too: same image, a common caption.

    Captions that differ only in case and spaces are the same, as most tokenizers read them alike. So are images
    from the same place (file, shard member, position in one source or dataset), and equal images of one dataset of the
    caller (`ImageStore.content`). Between different collections pixels are compared: each image of either side whose
    caption also occurs on the other side is decoded once. Images that cannot be read overlap with nothing;
    `check_images` reports them.
    """
    mine = _by_identity(first)
    found = []
    unknown: dict[Any, list[int]] = {}  # caption: indices into `second` that only pixels can decide
    origins: dict[Any, set[str]] = {}  # caption: collections in `first` that have it
    for index, captions in enumerate(first.captions):
        for key in _keys(captions):
            origins.setdefault(key, set()).add(first.store.origin(int(first.positions[index])))
    for index, captions in enumerate(second.captions):
        keys = _keys(captions) & origins.keys()
        if not keys:
            continue
        position = int(second.positions[index])
        if any(keys & mine.get(key, set()) for key in _image_keys(second, position)):
            found.append(index)
            continue
        for key in keys:
            if origins[key] - {second.store.origin(position)}:
                unknown.setdefault(key, []).append(index)
    return np.unique(np.array(found + _same_pixels(first, second, unknown), dtype=np.int64))


def same_pairs(first: PairDataset, second: PairDataset) -> bool:
    """Return whether two sets hold the same pairs in the same order.

    Names and captions alone do not tell: the pairs of every list are numbered from 0, and a class has one caption.
    """
    return first.fingerprint() == second.fingerprint() and len(overlap(first, second)) == len(second)


def trained_on_notes(train: Sequence[PairDataset], test: Sequence[PairDataset]) -> list[str]:
    """Return a note if some test pairs show images of training pairs.

    Only what can be told without decoding counts: the same place, or equal images of datasets of the caller.
    """
    known = {key for pairs in train for position in pairs.positions.tolist() for key in _image_keys(pairs, position)}
    images = [_image_keys(pairs, position) for pairs in test for position in pairs.positions.tolist()]
    shared = sum(not known.isdisjoint(keys) for keys in images)
    if not shared:
        return []
    show = "shows an image" if shared == 1 else "show images"
    return [
        f"{shared} of the {counted(len(images), 'test pair')} {show} of the training data, so the scores say less "
        "about other images"
    ]


def _same_pixels(first: PairDataset, second: PairDataset, unknown: dict[Any, list[int]]) -> list[int]:
    if not unknown:
        return []
    seen: dict[Any, set[str]] = {}  # caption: digests in `first`
    for index, captions in enumerate(first.captions):
        shared = _keys(captions) & unknown.keys()
        digest = _digest(first, index) if shared else None
        if digest is not None:
            for key in shared:
                seen.setdefault(key, set()).add(digest)
    digests = {index: _digest(second, index) for indices in unknown.values() for index in indices}
    return [index for key, indices in unknown.items() for index in indices if digests[index] in seen.get(key, set())]


def _by_identity(pairs: PairDataset) -> dict[Any, set[Any]]:
    known: dict[Any, set[Any]] = {}
    for position, captions in zip(pairs.positions, pairs.captions, strict=True):
        for key in _image_keys(pairs, int(position)):
            known.setdefault(key, set()).update(_keys(captions))
    return known


def _image_keys(pairs: PairDataset, position: int) -> set[Hashable]:
    return {pairs.store.identity(position), pairs.store.content(position)} - {None}


def _keys(captions: tuple[Any, ...]) -> set[Any]:
    return set(map(wording, captions))


def _digest(pairs: PairDataset, index: int) -> str | None:
    try:
        image = pairs.image(index)
    except InputError:
        return None
    return hashlib.sha256(pixel_bytes(image)).hexdigest()
