"""Open, select and check the pairs to forget, to retain and to test on."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from cliperase_fast.data.checks import check_images, overlap, same_pairs, split
from cliperase_fast.data.intake import Intake, Tally
from cliperase_fast.data.pairs import PairDataset, as_pairs, wording
from cliperase_fast.data.selectors import parse_reference, select, select_holdouts
from cliperase_fast.data.source_types import Source
from cliperase_fast.data.sources import open_source, require_indexed
from cliperase_fast.data.streams import PairStream
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.plurals import counted
from cliperase_fast.reading import printable_data

SampleCounts = dict[str, dict[str, int]]  # {"retain": {"pairs": 50000, "of": 120000}, "forget test": ...}

# Of larger sets of files only some images are read before work starts; the others are read when they are used.
READ_WHOLE, READ_SAMPLE = 5_000, 1_000


@dataclass(frozen=True)
class PairSets:
    """The pairs as the caller named them, before any image is read.

    test: (forget, retain), None if they are still to be held out. names: of each set, as the caller gave it.
    holdouts: test pairs of the source that neither set may see, for the audit (`Source.hold_out`). validation: as
    `test`. sampled: how many of how many pairs were drawn, of each set that was too large (`SampleCounts`).
    stream: what the retain pairs are the head of, if anything.
    """

    forget: PairDataset
    retain: PairDataset
    test: tuple[PairDataset, PairDataset] | None
    names: dict[str, str]
    holdouts: dict[str, PairDataset] = field(default_factory=dict)
    validation: tuple[PairDataset, PairDataset] | None = None
    sampled: SampleCounts = field(default_factory=dict)
    stream: PairStream | None = None

    def fingerprint(self) -> str:
        parts = [self.forget, self.retain, *(self.test or ()), *(self.validation or ())]
        stream = [] if self.stream is None else [self.stream.fingerprint()]
        return hashlib.sha256("|".join([*(part.fingerprint() for part in parts), *stream]).encode()).hexdigest()


@dataclass(frozen=True)
class ReadablePairs:
    """The pairs whose images can be read. test: (forget, retain). held_out: whether `test` was taken from the others.

    A single pair that is held out is in both sets. validation: (forget, retain) if the caller gave it. all_read:
    whether every image was read, and not only a sample of a large set.
    """

    forget: PairDataset
    retain: PairDataset
    test: tuple[PairDataset, PairDataset]
    held_out: bool
    intake: Intake  # what was left out or ignored
    validation: tuple[PairDataset, PairDataset] | None = None
    all_read: bool = True


class Opener:
    """Opens each source once."""

    def __init__(self, templates: Sequence[str] | None = None, seed: int = 0, on_error: str = "raise") -> None:
        self.templates, self.seed, self.on_error = templates, seed, on_error
        self.opened: dict[str, Source] = {}

    def __call__(self, spec: str) -> Source:
        if spec not in self.opened:
            self.opened[spec] = open_source(spec, templates=self.templates, seed=self.seed, on_error=self.on_error)
        return self.opened[spec]

    def indexed(self, spec: str) -> Source:
        """Open a source whose pairs can be chosen."""
        require_indexed(spec)
        return self(spec)

    def pairs(self, dataset: Any, name: str) -> PairDataset:
        return as_pairs(dataset, name, on_error=self.on_error)

    def test_pairs(self, data: Any, name: str) -> PairDataset:
        """Return the pairs of a dataset, or of "SOURCE" or "SOURCE#SELECTOR": of its test split, if it has one."""
        if not isinstance(data, str):
            return self.pairs(data, name)
        spec, selector = parse_reference(data)
        pairs, other = self.indexed(spec).measured
        return pairs if selector is None else pairs.subset(np.flatnonzero(select(pairs, selector, other=other)))


def open_pair_sets(
    forget: Any,
    retain: Any,
    test: Any,
    opener: Opener,
    *,
    overlap_policy: str,
    test_fraction: float,
    validation: Any = None,
) -> PairSets:
    """Open the sources and select the pairs.

    forget: a map-style dataset of (image, caption) pairs, or "SOURCE#SELECTOR".
    retain: a dataset, "SOURCE#SELECTOR", or "rest" for all that `forget` does not select from its source, without the
        holdouts if the source has some (`Source.hold_out`).
    test: None (the source's own test split, else `test_fraction` of the pairs, to be held out by `read_pair_sets`), a
        dataset or "SOURCE" of both kinds, or a pair (forget test, retain test).
    overlap_policy: for retain pairs that are also forget pairs: "error", or "drop" to leave them out.
    validation: as `test`, but None means none.
    """
    forget_pairs, selector, source = _forget_set(forget, opener)
    if source is not None and not (isinstance(retain, str) and retain == "rest"):
        source = replace(source, hold_out=None)  # the caller says what is kept
    retain_pairs = _retain_set(retain, selector, source, opener)
    _require_some(forget_pairs, "forget")
    _require_some(retain_pairs, "retain")
    retain_pairs = _without_overlap(forget_pairs, retain_pairs, overlap_policy)
    test_sets = _test_sets(test, forget_pairs, retain_pairs, selector, source, opener)
    validation_sets = None
    if validation is not None:
        validation_sets = _test_sets(validation, forget_pairs, retain_pairs, selector, source, opener, "validation")
        _require_other_pairs(validation_sets, test_sets)
    holdouts = select_holdouts(source, selector)
    names = {
        "forget": forget if isinstance(forget, str) else forget_pairs.name,
        "retain": (retain if isinstance(retain, str) else retain_pairs.name) + _without(holdouts),
        "test": test if isinstance(test, str) else _test_name(test, test_sets, test_fraction),
    }
    if validation is not None:
        names["validation"] = validation if isinstance(validation, str) else "given datasets"
    stream = opener.opened[retain].stream if isinstance(retain, str) and retain in opener.opened else None
    return PairSets(
        forget_pairs, retain_pairs, test_sets, printable_data(names), holdouts, validation_sets, stream=stream
    )


def read_pair_sets(
    sets: PairSets,
    *,
    on_error: str = "raise",
    test_fraction: float,
    seed: int,
    progress: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    sample: bool = False,
) -> ReadablePairs:
    """Read every image once, skip or refuse unreadable ones, and hold out test pairs where there are none.

    sample: read only a sample of the images of a large set. On several ranks each reads a share of the images.
    """
    intake = Intake.merged(
        part.intake for part in (sets.forget, sets.retain, *(sets.test or ()), *(sets.validation or ()))
    )

    all_read = True

    def read(pairs: PairDataset, name: str) -> PairDataset:
        nonlocal all_read
        rows = rows_to_read(pairs, seed) if sample else None
        all_read = all_read and rows is None
        return read_pairs(pairs, name, intake.skipped, on_error=on_error, progress=progress, ranks=ranks, rows=rows)

    forget, retain = read(sets.forget, "forget"), read(sets.retain, "retain")
    require_one_kind(forget, retain)
    validation = None
    if sets.validation is not None:
        validation = read(sets.validation[0], "forget validation"), read(sets.validation[1], "retain validation")
        require_one_kind(*validation)
    if sets.test is not None:
        test = read(sets.test[0], "forget test"), read(sets.test[1], "retain test")
        require_one_kind(*test)
        return ReadablePairs(forget, retain, test, False, intake, validation, all_read)
    forget, forget_test = hold_out(forget, test_fraction, seed)
    retain, retain_test = hold_out(retain, test_fraction, seed)
    return ReadablePairs(forget, retain, (forget_test, retain_test), True, intake, validation, all_read)


def rows_to_read(pairs: PairDataset, seed: int) -> np.ndarray | None:
    """Return a seeded sample of the rows whose images are still to be read, int64 and sorted; None for all of a few."""
    unread = [row for row, position in enumerate(pairs.positions) if not pairs.store.decoded(int(position))]
    if len(unread) <= READ_WHOLE:
        return None
    return np.sort(np.random.default_rng([seed, len(unread)]).permutation(unread)[:READ_SAMPLE])


def read_pairs(
    pairs: PairDataset,
    name: str,
    skipped: Tally,
    *,
    on_error: str = "raise",
    progress: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    rows: np.ndarray | None = None,
) -> PairDataset:
    """Return the pairs whose images can be read; `skipped` counts the others. On several ranks each reads a share.

    rows: read only these, and return the other pairs unread.
    """
    rows = np.arange(len(pairs)) if rows is None else rows
    read = pairs if len(rows) == len(pairs) else pairs.subset(rows)
    if read is not pairs:
        read.name = f"a sample of {pairs.name}"
    own = np.arange(len(read))[ranks.share(len(read))]
    found = ranks.gather_results(lambda: check_images(read.subset(own), on_error=on_error, progress=progress))
    firsts = [share.start for share in ranks.shares(len(read))]
    good = np.concatenate([first + of_rank for first, (of_rank, _) in zip(firsts, found, strict=True)])
    bad = [image for _, of_rank in found for image in of_rank]
    for image in bad:
        skipped.add(image.reason, image.message)
    if len(good) == 0:
        images = counted(len(read), "image")
        raise InputError(f"none of the {images} of the {name} set can be read (first: {bad[0].message})")
    return pairs if len(good) == len(read) else pairs.without(np.delete(rows, good))


def require_one_kind(first: PairDataset, second: PairDataset) -> None:
    """Raise `InputError` if pairs of one batch have images or captions of different types."""
    for what, kind, remedy in (
        ("images", _image_kind, "PIL images in both, or tensors of one shape"),
        ("captions", _caption_kind, "texts in both, or token ids of one length"),
    ):
        if kind(first) != kind(second):
            raise InputError(
                f"the {what} of {first.name} are {kind(first)} and those of {second.name} are {kind(second)}: give "
                f"{remedy}"
            )


def hold_out(pairs: PairDataset, fraction: float, seed: int) -> tuple[PairDataset, PairDataset]:
    """Return (rest, held out). A single pair is in both. Pairs of one image stay together, where that is known."""
    if len(pairs) < 2:
        return pairs, pairs
    images = _rows_of_images(pairs)
    _, chosen = split(pairs.subset([rows[0] for rows in images]), fraction, seed)
    held_out = np.sort(np.concatenate([images[image] for image in chosen]))
    return pairs.without(held_out), pairs.subset(held_out)


def _rows_of_images(pairs: PairDataset) -> list[list[int]]:
    """Return the rows of each image, in order; of a class with a single one, each row by itself."""
    contents = [pairs.store.content(at) or ("position", at) for at in pairs.positions.tolist()]
    labels = [0] * len(pairs) if pairs.labels is None else pairs.labels.tolist()
    of_class: dict[int, set[Hashable]] = {}
    for label, content in zip(labels, contents, strict=True):
        of_class.setdefault(label, set()).add(content)
    rows: dict[Hashable, list[int]] = {}
    for row, (label, content) in enumerate(zip(labels, contents, strict=True)):
        rows.setdefault(content if len(of_class[label]) > 1 else ("row", row), []).append(row)
    return list(rows.values())


def _require_some(pairs: PairDataset, name: str) -> None:
    if len(pairs) == 0:
        raise InputError(f"the {name} set is empty: give at least one (image, caption) pair")


def _forget_set(forget: Any, opener: Opener) -> tuple[PairDataset, str | None, Source | None]:
    if not isinstance(forget, str):
        return opener.pairs(forget, "forget"), None, None
    spec, selector = parse_reference(forget)
    if selector is None:
        raise InputError(f"forget={forget!r} has no selector: add what to forget, as in 'SOURCE#class:apple'")
    source = opener.indexed(spec)
    chosen = select(source.train, selector, other=source.test)
    return source.train.subset(np.flatnonzero(chosen)), selector, source


def _retain_set(retain: Any, selector: str | None, source: Source | None, opener: Opener) -> PairDataset:
    if not isinstance(retain, str):
        return opener.pairs(retain, "retain")
    if retain == "rest":
        if source is None or selector is None:
            raise InputError("retain='rest' needs forget as 'SOURCE#SELECTOR'; give the retain pairs as a dataset")
        return source.train.subset(source.rest(source.train, select(source.train, selector, other=source.test)))
    spec, retain_selector = parse_reference(retain)
    opened = opener(spec) if retain_selector is None else opener.indexed(spec)
    if retain_selector is None:
        return opened.train
    return opened.train.subset(np.flatnonzero(select(opened.train, retain_selector, other=opened.test)))


def _without_overlap(forget: PairDataset, retain: PairDataset, policy: str) -> PairDataset:
    shared = overlap(forget, retain)
    if len(shared) == 0:
        return retain
    if policy == "error":
        raise InputError(
            f"{len(shared)} of the {len(retain)} retain pairs are also forget pairs (for example "
            f"{retain.ids[int(shared[0])]!r}): pass overlap='drop' to leave them out of retain"
        )
    kept = np.setdiff1d(np.arange(len(retain)), shared)
    if len(kept) == 0:
        raise InputError("every retain pair is also a forget pair: nothing is left to retain")
    example = f"{retain.ids[int(shared[0])]} of {retain.name}"
    retain.intake.skipped.add("retain pair that is also a forget pair", example, len(shared))
    return retain.subset(kept)


def _test_sets(
    test: Any,
    forget: PairDataset,
    retain: PairDataset,
    selector: str | None,
    source: Source | None,
    opener: Opener,
    name: str = "test",
) -> tuple[PairDataset, PairDataset] | None:
    """Return the forget and the retain pairs of a set. name: what the set is called in errors."""
    if test is None:
        if source is None or source.test is None:
            return None
        pairs = source.test
    elif isinstance(test, tuple) and len(test) == 2 and not isinstance(test[0], (tuple, str)):
        parts = opener.pairs(test[0], f"forget {name}"), opener.pairs(test[1], f"retain {name}")
        for part, kind in zip(parts, ("forget", "retain"), strict=True):
            _require_some(part, f"{kind} {name}")
        return parts
    else:
        pairs = opener.test_pairs(test, name)
        _require_some(pairs, name)
    if selector is None:
        mask = _by_captions(pairs, forget, retain, name)
    else:
        mask = select(pairs, selector, other=source.train if source is not None else None)
    kept = source.rest(pairs, mask) if source is not None and source.has(pairs) else ~mask
    return pairs.subset(mask), pairs.subset(kept)


def _without(holdouts: Mapping[str, PairDataset]) -> str:
    return f" without the holdouts ({' and '.join(holdouts)})" if holdouts else ""


def _require_other_pairs(
    validation: tuple[PairDataset, PairDataset] | None, test: tuple[PairDataset, PairDataset] | None
) -> None:
    """Raise InputError if a checkpoint would be chosen on the pairs that the result is measured on."""
    if validation is None or test is None:
        return
    for own, others, kind in zip(validation, test, ("forget", "retain"), strict=True):
        _require_some(own, f"{kind} validation")
        if same_pairs(own, others):
            raise InputError(
                f"the {kind} validation pairs are the {kind} test pairs, so the result would be measured on what it "
                "was chosen on: give other pairs as validation="
            )


def _by_captions(pairs: PairDataset, forget: PairDataset, retain: PairDataset, name: str) -> np.ndarray:
    """Return which pairs are forget pairs if only datasets were given: by captions that only forget pairs have."""
    wanted = _captions(forget) - _captions(retain)
    mask = np.array(
        [any(wording(caption) in wanted for caption in captions) for captions in pairs.captions], dtype=bool
    )
    if mask.all() or not mask.any():
        raise InputError(
            f"{int(mask.sum())} of the {len(pairs)} {name} pairs share a caption with the forget pairs, so the {name} "
            f"set cannot be split: pass {name}=(forget_{name}, retain_{name})"
        )
    return mask


def _captions(pairs: PairDataset) -> set[Any]:
    return {wording(caption) for captions in pairs.captions for caption in captions}


def _image_kind(pairs: PairDataset) -> str:
    return "tensors" if isinstance(pairs.first_image(), Tensor) else "PIL images"


def _caption_kind(pairs: PairDataset) -> str:
    caption = pairs.captions[0][0]
    return "texts" if isinstance(caption, str) else f"{len(caption)} token ids"


def _test_name(test: Any, sets: tuple[PairDataset, PairDataset] | None, test_fraction: float) -> str:
    if sets is None:
        return f"{test_fraction:.0%} of the pairs, held out"
    return sets[1].name if test is None else "given datasets"
