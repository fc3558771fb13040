"""`PairDataset`, the dataset of the library: images, each with one or more captions and maybe a class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

from cliperase_fast.data.classes import GENERAL, ClassSpace, derive_classes, folded, merge_classes
from cliperase_fast.data.drawing import is_redrawn, seeded
from cliperase_fast.data.images import ImageStore, ItemStore, JoinedStore, content_key
from cliperase_fast.data.intake import Intake, caption_fault
from cliperase_fast.errors import InputError


def caption_key(caption: Any) -> Any:
    """Return a key that is equal for equal captions: the text, or the token ids."""
    return caption if isinstance(caption, str) else tuple(caption.tolist())


def wording(caption: Any) -> Any:
    """Return a key that is equal for captions that say the same: texts in any case and spacing, or token ids."""
    return " ".join(folded(caption).split()) if isinstance(caption, str) else caption_key(caption)


class PairDataset(Dataset):
    """Images with their captions. Indexing returns (image, first caption); `captions[i]` has all captions of image i.

    name: for messages.
    captions: for each image a tuple of str or of token ids (int64 [L], all of one length).
    ids: the stable id of each image, which `ids:FILE` selects by.
    labels: int64 [n], indices into `classes`; None without classes.
    entities: int64 [n], the person or thing that each pair is about, where pairs of several classes can be about the
        same one; equal ids mean the same entity in all data sets that are used together. None if the data names none.
    intake: counts what else the source holds; subsets share it.
    """

    def __init__(
        self,
        name: str,
        store: ImageStore,
        captions: Sequence[tuple[Any, ...]],
        ids: Sequence[str],
        *,
        labels: np.ndarray | None = None,
        entities: np.ndarray | None = None,
        space: ClassSpace | None = None,
        positions: np.ndarray | None = None,
        intake: Intake | None = None,
    ) -> None:
        self.name, self.store = name, store
        self.intake = Intake() if intake is None else intake
        self.captions, self.ids = list(captions), list(ids)
        self.positions = np.arange(len(store)) if positions is None else positions  # [n], into the store
        self.labels, self.space, self.entities = labels, space, entities
        optional = [len(values) for values in (labels, entities) if values is not None]
        if len({len(self.captions), len(self.ids), len(self.positions), *optional}) > 1:
            raise ValueError("captions, ids, labels, entities and positions must have one entry for each image")
        if (labels is None) != (space is None):
            raise ValueError("labels and classes come together")

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if self.space is None else self.space.names

    @property
    def group_ids(self) -> np.ndarray | None:
        """The entities, else the classes, else None: pairs with equal ids are not negatives of each other."""
        return self.labels if self.entities is None else self.entities

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...] | None:
        """The captions that stand for each class: from templates, else the captions that occur."""
        return None if self.space is None else self.space.prompts

    @property
    def class_kinds(self) -> np.ndarray | None:
        """The kind of each class, int64 [K] (see `ClassSpace`); None if all are of one kind."""
        return None if self.space is None else self.space.kind_ids

    @property
    def general(self) -> np.ndarray | None:
        """Which pairs are of a class of the kind `GENERAL`, not facts about somebody; bool [n]. None without kinds."""
        if self.space is None or self.labels is None or self.space.kinds is None:
            return None
        return np.array([kind == GENERAL for kind in self.space.kinds])[self.labels]

    def class_prompts(self, which: str | int) -> list[str]:
        """Return the captions that stand for a class, given by its name or number."""
        if self.space is None:
            raise InputError(f"{self.name} has no classes")
        return list(self.space.prompts[self.space.names.index(which) if isinstance(which, str) else which])

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int, *, fixed: bool = True) -> Image.Image | Tensor:
        """Return image `index`, decoded but not transformed: PIL in RGB, or the caller's own tensor.

        fixed: if the dataset draws its images anew each time, return the same one every time; otherwise one that
        follows the global generators.
        """
        position = int(self.positions[index])
        if fixed and self.store.redrawn():
            with seeded(position, gpus=False):
                return self.store.image(position)
        return self.store.image(position)

    def first_image(self) -> Image.Image | Tensor:
        """Return the first image that can be read, of at most 100; raise `InputError` of the first one otherwise."""
        fault: InputError | None = None
        for index in range(min(len(self), 100)):
            try:
                return self.image(index)
            except InputError as error:
                fault = fault or error
        raise fault or InputError(f"{self.name} is empty: give at least one (image, caption) pair")

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {self.name}, which has {len(self)} images")
        return self.image(index), self.captions[index][0]

    def different_captions(self) -> tuple[list[Any], list[np.ndarray]]:
        """Return the distinct captions [U], and for each image the rows of its own captions, int64."""
        rows: dict[Any, int] = {}
        captions: list[Any] = []
        of_image = []
        for mine in self.captions:
            own = []
            for caption in mine:
                row = rows.setdefault(caption if isinstance(caption, str) else caption_key(caption), len(captions))
                if row == len(captions):
                    captions.append(caption)
                own.append(row)
            of_image.append(np.array(own, dtype=np.int64))
        return captions, of_image

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> PairDataset:
        """Return the images at these indices in this order, or those where a bool mask [n] is true, without copying."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise InputError(
                    f"a mask of {len(chosen)} values does not fit {self.name}, which has {len(self)} images"
                )
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        return PairDataset(
            self.name,
            self.store,
            [self.captions[i] for i in chosen],
            [self.ids[i] for i in chosen],
            labels=None if self.labels is None else self.labels[chosen],
            entities=None if self.entities is None else self.entities[chosen],
            space=self.space,
            positions=self.positions[chosen],
            intake=self.intake,
        )

    def without(self, indices: Sequence[int] | np.ndarray) -> PairDataset:
        """Return the images that are not at these indices, in order."""
        return self.subset(np.setdiff1d(np.arange(len(self)), indices))

    def fingerprint(self) -> str:
        """Return a hex digest of ids, captions, labels and entities, in order, without pixels."""
        digest = hashlib.sha256()
        for index, (name, captions) in enumerate(zip(self.ids, self.captions, strict=True)):
            label = "" if self.labels is None else int(self.labels[index])
            texts = [caption if isinstance(caption, str) else caption.tolist() for caption in captions]
            entity = () if self.entities is None else (int(self.entities[index]),)
            digest.update(repr((name, texts, label, *entity)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def concat(parts: Sequence[PairDataset]) -> PairDataset:
    """Concatenate the pairs of all parts, with one class space (see `merge_classes`).

    The result has entities if all parts have them.
    """
    if not parts:
        raise InputError("there is nothing to concatenate; pass at least one data set")
    labels, space = merge_classes([(part.captions, part.labels, part.space) for part in parts])
    entities = [part.entities for part in parts if part.entities is not None]
    stores = list({id(part.store): part.store for part in parts}.values())
    if len(stores) == 1:
        store, starts = stores[0], {id(stores[0]): 0}
    else:
        joined = JoinedStore(stores)
        store, starts = (
            joined,
            {id(inner): start for inner, start in zip(stores, joined.starts, strict=False)},
        )
    return PairDataset(
        " + ".join(dict.fromkeys(part.name for part in parts)),
        store,
        [captions for part in parts for captions in part.captions],
        [name for part in parts for name in part.ids],
        labels=labels,
        entities=np.concatenate(entities) if len(entities) == len(parts) else None,
        space=space,
        positions=np.concatenate([part.positions + starts[id(part.store)] for part in parts]),
        intake=Intake.merged(part.intake for part in parts),
    )


@seeded(0, gpus=False)  # a dataset that draws must not use the caller's generators
def as_pairs(dataset: Any, name: str, *, on_error: str = "raise") -> PairDataset:
    """Wrap a map-style dataset or sequence of (image, caption).

    image: a PIL image, a uint8 array [H, W, 3], or a float tensor [3, H, W] that is already transformed.
    caption: a str, a list of str, or token ids as an integer tensor [L] (or [k, L] for k captions).
    on_error: "raise" refuses the first item that cannot be used, "skip" leaves such items out and counts them in
    the result's `intake`.
    A `PairDataset` is returned as it is, and a torch `Subset` or `ConcatDataset` of some keeps all they know. Captions
    are read here once, through `dataset[i]` for every i, so a dataset that decodes images decodes all of them. One that
    augments its images gives different ones in every training step and the same one everywhere else. Few and repeated
    captions (at most 1000 different ones, and at most half as many as pairs) become classes.
    """
    base, indices = _unwrap(dataset, name)
    if _joins_pairs(base, name):
        base = concat([as_pairs(part, name) for part in base.datasets])  # whose items have one caption each
    if isinstance(base, PairDataset):
        return base if indices is None else base.subset(indices)
    if isinstance(base, IterableDataset) or not (hasattr(base, "__len__") and hasattr(base, "__getitem__")):
        raise InputError(
            f"{name} is a {type(base).__name__}; pass a map-style dataset (with __len__ and __getitem__) of "
            "(image, caption) pairs"
        )
    if hasattr(base, "itertuples") and hasattr(base, "columns"):  # pandas
        columns = _example_columns(list(base.columns))
        raise InputError(
            f"{name} is a table ({type(base).__name__}) with the columns {', '.join(map(repr, base.columns))}; pass a "
            f"list of (image, caption) pairs, for example list(zip({name}[{columns[0]!r}], {name}[{columns[1]!r}]))"
        )
    if isinstance(base, (str, bytes, dict, Tensor, np.ndarray)):
        raise InputError(f"{name} is a {type(base).__name__}; pass a dataset or list of (image, caption) pairs")
    intake = Intake(on_error)
    length = _length(base, name)
    wanted = np.arange(length) if indices is None else np.where(indices < 0, indices + length, indices)
    captions: list[tuple[Any, ...]] = []
    kept: list[int] = []
    store = ItemStore(base, name)
    for index in map(int, wanted):
        found = _read_captions(store, index, intake)
        if found is not None:
            captions.append(found)
            kept.append(index)
    if len(wanted):
        intake.require_some(len(kept), name, "has no item that can be used")
    positions = np.array(kept, dtype=np.int64)
    _check_one_kind(captions, positions, name)
    labels, space = derive_classes(captions) or (None, None)
    ids = [str(i) for i in positions]
    store.is_redrawn = is_redrawn(base, positions, name)
    if store.is_redrawn:
        store.contents.clear()
    return PairDataset(name, store, captions, ids, labels=labels, space=space, positions=positions, intake=intake)


def _length(base: Any, name: str) -> int:
    try:
        return len(base)
    except Exception as error:  # the caller's code may raise anything, and Python refuses a length below 0
        raise InputError(
            f"the length of {name} is unknown: len() raised {type(error).__name__}: {error}; __len__ must return "
            "the number of items, a whole number of at least 0"
        ) from error


def _read_captions(store: ItemStore, index: int, intake: Intake) -> tuple[Any, ...] | None:
    """Return the captions of an item, and tell the store what its image is; None if it was left out."""
    base, name = store.items, store.name
    try:
        item = base[index]
    except Exception as error:  # the caller's code may raise anything
        if isinstance(error, InputError) and intake.on_error == "raise":
            raise
        said = (
            str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
        )
        intake.fault("the dataset raised an error", f"item {index} of {name} cannot be read: {said}")
        return None
    if isinstance(item, Mapping):
        raise InputError(f"item {index} of {name} is a {type(item).__name__} {_rows(item)}")
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise InputError(f"item {index} of {name} is a {type(item).__name__}{size}; each item must be (image, caption)")
    content = content_key(item[0])
    if content is not None:
        store.contents[index] = content
    return _captions(item[1], base, f"the caption of item {index} of {name}", intake)


def _rows(item: Mapping[Any, Any]) -> str:
    """Return how to turn a row of named values into a pair."""
    image, caption = _example_columns(list(item))
    return (
        f"with the keys {', '.join(map(repr, item))}; each item must be (image, caption), for example "
        f"[(row[{image!r}], row[{caption!r}]) for row in dataset]"
    )


def _example_columns(names: list[Any]) -> tuple[Any, Any]:
    """Return the two names that seem to hold images and captions."""
    image = next((name for name in names if str(name).lower() in ("image", "img", "pixel_values")), "image")
    words = ("text", "caption", "captions", "sentence", "sentences", "title")
    return image, next((name for name in names if str(name).lower() in words), "caption")


def _unwrap(dataset: Any, name: str) -> tuple[Any, np.ndarray | None]:
    """Return the dataset inside any torch Subsets, and the indices into it (None: all)."""
    indices: np.ndarray | None = None
    # A subclass with items of its own, such as one that captions or augments them, is a dataset like any other.
    while isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        inner = np.asarray(dataset.indices).reshape(-1)
        if len(inner) and inner.dtype.kind not in "iu":
            kind = "a mask" if inner.dtype == bool else f"of the type {inner.dtype}"
            raise InputError(
                f"the indices of {name}, a torch Subset, are {kind}; give whole numbers, such as np.flatnonzero(mask)"
            )
        inner = inner.astype(np.int64)
        indices = inner if indices is None else inner[indices]
        dataset = dataset.dataset
    return dataset, indices


def _joins_pairs(dataset: Any, name: str) -> bool:
    """Return whether this is a torch ConcatDataset of `PairDataset`s only."""
    if not isinstance(dataset, ConcatDataset) or type(dataset).__getitem__ is not ConcatDataset.__getitem__:
        return False
    parts = [_unwrap(part, name)[0] for part in dataset.datasets]
    return all(isinstance(part, PairDataset) or _joins_pairs(part, name) for part in parts)


def _captions(caption: Any, base: Any, where: str, intake: Intake) -> tuple[Any, ...] | None:
    if isinstance(caption, (int, np.integer)) or (isinstance(caption, Tensor) and caption.ndim == 0):
        known = "dataset.classes[label]" if hasattr(base, "classes") else "class_names[label]"
        number = "" if isinstance(caption, Tensor) and caption.is_meta else f" {int(caption)}"
        raise InputError(
            f"{where} is the number{number}, a class label; pass captions, for example "
            f"[(image, f'a photo of a {{{known}}}') for image, label in dataset]"
        )
    if isinstance(caption, np.ndarray) and caption.dtype.kind in "OUT":  # texts
        caption = caption.reshape(-1).tolist()
    if isinstance(caption, (Tensor, np.ndarray)):
        return _token_captions(caption, where, intake)
    texts = caption if isinstance(caption, (list, tuple)) else (caption,)
    if not texts:
        intake.fault("empty caption", f"{where} is an empty list; give at least one caption")
        return None
    for text in texts:
        fault = caption_fault(text)
        if fault is not None:
            remedy = "give a text" if isinstance(text, str) else "give a str, a list of str, or token ids as a tensor"
            intake.fault(fault[0], f"{where} {fault[1]}; {remedy}")
            return None
    return tuple(str.__str__(text).strip() for text in texts)  # str() of an enum would be its name


def _token_captions(caption: Tensor | np.ndarray, where: str, intake: Intake) -> tuple[Tensor, ...] | None:
    if isinstance(caption, np.ndarray) and caption.dtype.kind not in "iu":
        raise InputError(f"{where} is a {caption.dtype} array {list(caption.shape)}; token ids must be integers [L]")
    if isinstance(caption, Tensor) and (caption.is_nested or caption.layout != torch.strided or caption.is_meta):
        kind = "nested" if caption.is_nested else "meta" if caption.is_meta else "sparse"
        raise InputError(f"{where} is a {kind} tensor; token ids must be a dense integer tensor [L] in memory")
    tokens = torch.as_tensor(caption, device="cpu")
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool or tokens.ndim > 2 or tokens.numel() == 0:
        raise InputError(f"{where} is a {tokens.dtype} tensor {list(tokens.shape)}; token ids must be integers [L]")
    tokens = tokens.long()
    if int(tokens.min()) < 0:
        intake.fault("token ids out of range", f"{where} has the token id {int(tokens.min())}; ids must be at least 0")
        return None
    return tuple(tokens.reshape(-1, tokens.shape[-1]))


def _check_one_kind(captions: list[tuple[Any, ...]], positions: np.ndarray, name: str) -> None:
    """Raise `InputError` unless all captions are texts, or all are token ids of one length."""
    kinds: dict[str, int] = {}
    for group, index in zip(captions, positions, strict=True):
        for caption in group:
            kinds.setdefault("text" if isinstance(caption, str) else f"{len(caption)} token ids", int(index))
    if len(kinds) > 1:
        (kind, index), (other, other_index) = list(kinds.items())[:2]
        raise InputError(
            f"captions of {name} differ in kind: item {index} has {kind}, item {other_index} has {other}; "
            "use only texts, or only token ids of one length"
        )
