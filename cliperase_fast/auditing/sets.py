"""Open, read and check the pairs that are audited."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, concat, overlap, trained_on_notes
from cliperase_fast.data.classes import folded, readable
from cliperase_fast.data.intake import Tally
from cliperase_fast.data.pair_sets import (
    Opener,
    PairSets,
    open_pair_sets,
    read_pair_sets,
    read_pairs,
    require_one_kind,
)
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.plurals import counted

HOLDOUTS = ("association", "identity")


@dataclass(frozen=True)
class AuditSets:
    """Hold the pairs of an audit, training and test pairs in one class space.

    forget, retain: training pairs. test: forget pairs, then retain pairs; forget_mask: bool [n], which are which.
    other, holdouts: further data, scored by itself. names: of the sets, for the result.
    skipped: pairs that were left out. notes: what the reader of the result must know.
    """

    forget: PairDataset
    retain: PairDataset
    test: PairDataset
    forget_mask: np.ndarray
    other: Mapping[str, PairDataset] = field(default_factory=dict)
    holdouts: Mapping[str, PairDataset] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    skipped: Tally = field(default_factory=Tally)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        forget: PairDataset,
        retain: PairDataset,
        test: tuple[PairDataset, PairDataset],
        *,
        other: Mapping[str, PairDataset] | None = None,
        holdouts: Mapping[str, PairDataset] | None = None,
        names: Mapping[str, str] | None = None,
        skipped: Tally | None = None,
        notes: Sequence[str] = (),
    ) -> AuditSets:
        """Put training pairs and (forget test, retain test) pairs into one class space; each may have its own."""
        parts = [forget, retain, *test]
        everything = concat(parts)
        stops = np.cumsum([len(part) for part in parts])
        return cls(
            forget=everything.subset(np.arange(stops[0])),
            retain=everything.subset(np.arange(stops[0], stops[1])),
            test=everything.subset(np.arange(stops[1], stops[3])),
            forget_mask=np.arange(stops[3] - stops[1]) < len(test[0]),
            other=other or {},
            holdouts=holdouts or {},
            names=names or {"forget": forget.name, "retain": retain.name, "test": test[1].name},
            skipped=skipped or Tally(),
            notes=tuple(notes),
        )


@dataclass(frozen=True)
class OpenedSets:
    """Hold the pairs as the caller named them, before any image is read."""

    pairs: PairSets
    other: Mapping[str, PairDataset]
    holdouts: Mapping[str, PairDataset]

    def fingerprint(self) -> str:
        further = [f"{name}:{pairs.fingerprint()}" for name, pairs in [*self.other.items(), *self.holdouts.items()]]
        return hashlib.sha256("|".join([self.pairs.fingerprint(), *further]).encode()).hexdigest()


def open_sets(
    forget: Any,
    retain: Any,
    test: Any = None,
    *,
    other: Mapping[str, Any] | None = None,
    holdouts: Mapping[str, Any] | None = None,
    templates: Sequence[str] | None = None,
    on_error: str = "raise",
    seed: int = 0,
    test_fraction: float = UnlearnConfig.test_fraction,
) -> OpenedSets:
    """Open the sources and select the pairs.

    forget, retain, test, test_fraction: as in `open_pair_sets`. Retain pairs that are also forget pairs are left out.
    other: data sets with classes, by name. holdouts: data under "association" and "identity"; None for those of the
        source, which retain="rest" leaves out.

    Raises InputError for data that cannot be opened or selected, and for other or held-out data with forget pairs.
    """
    opener = Opener(templates, seed, on_error)
    unknown = sorted(set(holdouts or {}) - set(HOLDOUTS))
    if unknown:
        raise InputError(f"holdouts has {unknown[0]!r}; its keys are {' and '.join(map(repr, HOLDOUTS))}")
    sets = open_pair_sets(forget, retain, test, opener, overlap_policy="drop", test_fraction=test_fraction)
    given = {name: _held_out(data, f"holdouts[{name!r}]", opener, sets) for name, data in (holdouts or {}).items()}
    return OpenedSets(
        sets,
        other={name: _other(data, f"other[{name!r}]", opener, sets) for name, data in (other or {}).items()},
        holdouts=sets.holdouts if holdouts is None else given,
    )


def read_sets(
    opened: OpenedSets,
    *,
    on_error: str = "raise",
    seed: int = 0,
    test_fraction: float = UnlearnConfig.test_fraction,
    progress: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> AuditSets:
    """Read every image once, skip or refuse unreadable ones, and hold out test pairs where there are none.

    With the seed and the `test_fraction` of `unlearn()`, these are the pairs that it held out too. Every rank reads a
    share of the images.
    """
    how: dict[str, Any] = {"on_error": on_error, "progress": progress, "ranks": ranks}
    found = read_pair_sets(opened.pairs, test_fraction=test_fraction, seed=seed + 1, **how)
    require_one_kind(found.forget, found.test[0])
    skipped = found.intake.skipped
    other, holdouts = (
        {name: read_pairs(pairs, pairs.name, skipped, **how) for name, pairs in sets.items()}
        for sets in (opened.other, opened.holdouts)
    )
    if found.held_out:
        notes = held_out_notes(test_fraction, len(found.forget))
    else:
        notes = [f"{note}." for note in trained_on_notes([found.forget, found.retain], found.test)]
    if len(skipped):
        are = "is" if len(skipped) == 1 else "are"
        notes.append(f"{counted(len(skipped), 'pair')} {are} left out: {', '.join(skipped.counts)}.")
    names = opened.pairs.names
    return AuditSets.of(
        found.forget, found.retain, found.test, other=other, holdouts=holdouts, names=names, skipped=skipped,
        notes=notes,
    )  # fmt: skip


def held_out_notes(fraction: float, forget_pairs: int) -> list[str]:
    """Return notes on test pairs held out of data without a test split. forget_pairs: the number left for training."""
    notes = [
        f"The data has no test split, so {fraction:.0%} of the pairs are scored. The original may have been trained on "
        "them."
    ]
    if forget_pairs < 2:
        notes.append("There is a single forget pair: it is scored as it was trained, and scores have no interval.")
    return notes


def _other(data: Any, name: str, opener: Opener, sets: PairSets) -> PairDataset:
    pairs = _some(opener.test_pairs(data, name), name)
    if pairs.classes is None or pairs.labels is None:
        raise InputError(f"{name} has no classes, which zero-shot accuracy needs: give data with classes")
    forgotten = _names(sets.forget) - _names(sets.retain)
    known = sorted(_names(pairs) & forgotten)
    if known:
        raise InputError(
            f"{name} shows {known[0]!r}, which was forgotten: leave such pairs out, for its accuracy measures damage "
            "to what should stay"
        )
    return pairs


def _held_out(data: Any, name: str, opener: Opener, sets: PairSets) -> PairDataset:
    pairs = _some(opener.test_pairs(data, name), name)
    shared = overlap(sets.forget, pairs)
    if len(shared):
        raise InputError(
            f"{len(shared)} of the {len(pairs)} pairs of {name} are forget pairs (for example "
            f"{pairs.ids[int(shared[0])]!r}): give pairs that unlearning did not see"
        )
    return pairs


def _some(pairs: PairDataset, name: str) -> PairDataset:
    if len(pairs) == 0:
        raise InputError(f"{name} is empty: give at least one (image, caption) pair")
    return pairs


def _names(pairs: PairDataset) -> set[str]:
    """Return the classes that the pairs show and their captions, in a form that can be compared."""
    shown = {one for group in pairs.captions for one in group if isinstance(one, str)}
    if pairs.classes is not None and pairs.labels is not None:
        shown |= {pairs.classes[label] for label in np.unique(pairs.labels)}
    return {folded(readable(one)) for one in shown}
