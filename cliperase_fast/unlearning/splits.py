"""Turn datasets, source strings and selectors into the checked splits of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import (
    PairDataset,
    Source,
    as_pairs,
    caption_key,
    concat,
    open_source,
    overlap,
    parse_reference,
    select,
    select_holdouts,
    split,
)
from cliperase_fast.data.checks import find_bad_images
from cliperase_fast.data.intake import Intake
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable_data


@dataclass
class Split:
    """Forget pairs followed by retain pairs, in one class space."""

    pairs: PairDataset
    n_forget: int

    @property
    def forget_mask(self) -> np.ndarray:
        return np.arange(len(self.pairs)) < self.n_forget

    @classmethod
    def of(cls, forget: PairDataset, retain: PairDataset) -> Split:
        return cls(concat([forget, retain]), len(forget))


@dataclass
class PreparedData:
    train: Split
    validation: Split
    test: Split
    intake: Intake  # what was left out or ignored
    names: dict[str, str]  # of each set, as the caller gave it
    holdouts: dict[str, PairDataset] = field(default_factory=dict)  # see `PairSets`

    def fingerprint(self) -> str:
        parts = [f"{part.pairs.fingerprint()}:{part.n_forget}" for part in (self.train, self.validation, self.test)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


@dataclass
class PairSets:
    """The pairs as the caller named them, before any image is read."""

    forget: PairDataset
    retain: PairDataset
    test: tuple[PairDataset, PairDataset] | None  # (forget, retain), None if they are still to be held out
    names: dict[str, str]
    holdouts: dict[str, PairDataset] = field(default_factory=dict)  # test pairs that neither set may see, for the audit

    def fingerprint(self) -> str:
        parts = [self.forget, self.retain, *(self.test or ())]
        return hashlib.sha256("|".join(part.fingerprint() for part in parts).encode()).hexdigest()


def open_sets(
    forget: Any, retain: Any, test: Any, config: UnlearnConfig, *, templates: Sequence[str] | None
) -> PairSets:
    """Open the sources and select the pairs.

    forget: a map-style dataset of (image, caption) pairs, or "SOURCE#SELECTOR".
    retain: a dataset, "SOURCE#SELECTOR", or "rest" for all that `forget` does not select from its source, without the
    holdouts if the source has some (`Source.hold_out`).
    test: None (the source's own test split, else `test_fraction` of the pairs), a dataset or "SOURCE" of both
    kinds, or a pair (forget test, retain test).
    """
    opener = _Opener(templates, config.seed, config.on_error)
    forget_pairs, selector, source = _forget_set(forget, opener)
    if source is not None and not (isinstance(retain, str) and retain == "rest"):
        source = replace(source, hold_out=None)  # the caller says what is kept
    retain_pairs = _retain_set(retain, forget, selector, source, opener)
    for pairs, name in ((forget_pairs, "forget"), (retain_pairs, "retain")):
        if len(pairs) == 0:
            raise InputError(f"the {name} set is empty: give at least one (image, caption) pair")
    retain_pairs = _without_overlap(forget_pairs, retain_pairs, config.overlap)
    test_sets = _test_sets(test, forget_pairs, retain_pairs, selector, source, opener)
    holdouts = select_holdouts(source, selector)
    names = {
        "forget": forget if isinstance(forget, str) else forget_pairs.name,
        "retain": (retain if isinstance(retain, str) else retain_pairs.name) + _without(holdouts),
        "test": test if isinstance(test, str) else _test_name(test, test_sets, config),
    }
    return PairSets(forget_pairs, retain_pairs, test_sets, printable_data(names), holdouts)


def prepare_data(
    sets: PairSets, config: UnlearnConfig, *, progress: bool, ranks: Ranks = SINGLE_PROCESS
) -> PreparedData:
    """Read every image once, skip or refuse unreadable ones, and hold out validation and test pairs.

    On several ranks each reads a share of the images.
    """
    intake = Intake.merged(part.intake for part in (sets.forget, sets.retain, *(sets.test or ())))
    forget_train = _readable(sets.forget, "forget", config, intake, progress, ranks)
    retain_train = _readable(sets.retain, "retain", config, intake, progress, ranks)
    _require_one_kind(forget_train, retain_train)
    if sets.test is None:
        forget_train, forget_test = _hold_out(forget_train, config.test_fraction, config.seed + 1)
        retain_train, retain_test = _hold_out(retain_train, config.test_fraction, config.seed + 1)
    else:
        forget_test = _readable(sets.test[0], "forget test", config, intake, progress, ranks)
        retain_test = _readable(sets.test[1], "retain test", config, intake, progress, ranks)
        _require_one_kind(forget_test, retain_test)
    forget_train, forget_val = _hold_out(forget_train, config.val_fraction, config.seed)
    retain_train, retain_val = _hold_out(retain_train, config.val_fraction, config.seed)
    return PreparedData(
        train=Split.of(forget_train, retain_train),
        validation=Split.of(forget_val, retain_val),
        test=Split.of(forget_test, retain_test),
        intake=intake,
        names=sets.names,
        holdouts=sets.holdouts,
    )


class _Opener:
    """Opens each source once."""

    def __init__(self, templates: Sequence[str] | None, seed: int, on_error: str) -> None:
        self.templates, self.seed, self.on_error = templates, seed, on_error
        self.opened: dict[str, Source] = {}

    def __call__(self, spec: str) -> Source:
        if spec not in self.opened:
            self.opened[spec] = open_source(spec, templates=self.templates, seed=self.seed, on_error=self.on_error)
        return self.opened[spec]

    def pairs(self, dataset: Any, name: str) -> PairDataset:
        return as_pairs(dataset, name, on_error=self.on_error)


def _forget_set(forget: Any, opener: _Opener) -> tuple[PairDataset, str | None, Source | None]:
    if not isinstance(forget, str):
        return opener.pairs(forget, "forget"), None, None
    spec, selector = parse_reference(forget)
    if selector is None:
        raise InputError(f"forget={forget!r} selects nothing: add what to forget, for example '{forget}#class:apple'")
    source = opener(spec)
    chosen = select(source.train, selector, other=source.test)
    return source.train.subset(np.flatnonzero(chosen)), selector, source


def _retain_set(retain: Any, forget: Any, selector: str | None, source: Source | None, opener: _Opener) -> PairDataset:
    if not isinstance(retain, str):
        return opener.pairs(retain, "retain")
    if retain == "rest":
        if source is None or selector is None:
            raise InputError("retain='rest' needs forget as 'SOURCE#SELECTOR'; give the retain pairs as a dataset")
        return source.train.subset(source.rest(source.train, select(source.train, selector, other=source.test)))
    spec, retain_selector = parse_reference(retain)
    opened = opener(spec)
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
    opener: _Opener,
) -> tuple[PairDataset, PairDataset] | None:
    if test is None:
        if source is None or source.test is None:
            return None
        pairs = source.test
    elif isinstance(test, tuple) and len(test) == 2 and not isinstance(test[0], (tuple, str)):
        return opener.pairs(test[0], "forget test"), opener.pairs(test[1], "retain test")
    elif isinstance(test, str):
        spec, test_selector = parse_reference(test)
        opened = opener(spec)
        pairs = opened.test or opened.train
        if test_selector is not None:
            pairs = pairs.subset(np.flatnonzero(select(pairs, test_selector)))
    else:
        pairs = opener.pairs(test, "test")
    if selector is None:
        mask = _by_captions(pairs, forget, retain)
    else:
        mask = select(pairs, selector, other=source.train if source is not None else None)
    kept = source.rest(pairs, mask) if source is not None and source.has(pairs) else ~mask
    return pairs.subset(np.flatnonzero(mask)), pairs.subset(np.flatnonzero(kept))


def _without(holdouts: Mapping[str, PairDataset]) -> str:
    return f" without the holdouts ({' and '.join(holdouts)})" if holdouts else ""


def _by_captions(pairs: PairDataset, forget: PairDataset, retain: PairDataset) -> np.ndarray:
    """Return which test pairs are forget pairs if only datasets were given: by captions that only forget pairs have."""
    wanted = _captions(forget) - _captions(retain)
    mask = np.array(
        [any(caption_key(caption) in wanted for caption in captions) for captions in pairs.captions], dtype=bool
    )
    if mask.all() or not mask.any():
        raise InputError(
            f"{int(mask.sum())} of the {len(pairs)} test pairs share a caption with the forget pairs, so the test set "
            "cannot be split: pass test=(forget_test, retain_test)"
        )
    return mask


def _captions(pairs: PairDataset) -> set[Any]:
    return {caption_key(caption) for captions in pairs.captions for caption in captions}


def _readable(
    pairs: PairDataset, name: str, config: UnlearnConfig, intake: Intake, progress: bool, ranks: Ranks
) -> PairDataset:
    own = np.arange(len(pairs))[ranks.share(len(pairs))]
    found = ranks.gather_results(
        lambda: find_bad_images(pairs.subset(own), on_error=config.on_error, progress=progress)
    )
    firsts = [share.start for share in ranks.shares(len(pairs))]
    good = np.concatenate([first + of_rank for first, (of_rank, _) in zip(firsts, found, strict=True)])
    bad = [image for _, of_rank in found for image in of_rank]
    for image in bad:
        intake.skipped.add(image.reason, image.message)
    if len(good) == 0:
        raise InputError(f"none of the {len(pairs)} images of the {name} set can be read (first: {bad[0].message})")
    return pairs if len(good) == len(pairs) else pairs.subset(good)


def _require_one_kind(forget: PairDataset, retain: PairDataset) -> None:
    """Raise `InputError` if pairs of one batch have images or captions of different types."""
    for what, kind, remedy in (
        ("images", _image_kind, "PIL images in both, or tensors of one shape"),
        ("captions", _caption_kind, "texts in both, or token ids of one length"),
    ):
        first, second = kind(forget), kind(retain)
        if first != second:
            raise InputError(
                f"the {what} of {forget.name} are {first} and those of {retain.name} are {second}: give {remedy}"
            )


def _image_kind(pairs: PairDataset) -> str:
    return "tensors" if isinstance(pairs.image(0), Tensor) else "PIL images"


def _caption_kind(pairs: PairDataset) -> str:
    caption = pairs.captions[0][0]
    return "texts" if isinstance(caption, str) else f"{len(caption)} token ids"


def _hold_out(pairs: PairDataset, fraction: float, seed: int) -> tuple[PairDataset, PairDataset]:
    """Return (rest, held out). A single pair is in both."""
    if len(pairs) < 2:
        return pairs, pairs
    rest, held_out = split(pairs, fraction, seed)
    return pairs.subset(rest), pairs.subset(held_out)


def _test_name(test: Any, sets: tuple[PairDataset, PairDataset] | None, config: UnlearnConfig) -> str:
    if sets is None:
        return f"{config.test_fraction:.0%} of the pairs, held out"
    return sets[1].name if test is None else "given datasets"
