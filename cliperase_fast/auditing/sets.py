"""From what the caller names (datasets, source strings, selectors) to the pairs that are audited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

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
from cliperase_fast.errors import InputError

HELD_OUT = 0.2  # of data without a test split, as `unlearn()` does
HOLDOUTS = ("association", "identity")


@dataclass(frozen=True)
class AuditSets:
    """The pairs of an audit, training and test pairs in one class space.

    forget, retain: training pairs. test: forget pairs, then retain pairs; forget_mask: bool [n], which are which.
    other, holdouts: further data, scored by itself. notes: what the reader of the result must know.
    """

    forget: PairDataset
    retain: PairDataset
    test: PairDataset
    forget_mask: np.ndarray
    other: Mapping[str, PairDataset] = field(default_factory=dict)
    holdouts: Mapping[str, PairDataset] = field(default_factory=dict)
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
            notes=tuple(notes),
        )


def open_sets(
    forget: Any,
    retain: Any,
    test: Any = None,
    *,
    other: Mapping[str, Any] | None = None,
    holdouts: Mapping[str, Any] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> AuditSets:
    """Open, select and check.

    forget: a map-style dataset of (image, caption) pairs, or "SOURCE#SELECTOR".
    retain: a dataset, "SOURCE#SELECTOR", or "rest" for all that `forget` does not select from its source, without the
        holdouts if the source has some (`Source.hold_out`).
    test: None for the source's own test split, a dataset or source of both kinds, or (forget test, retain test).
        Without any, a fifth of the pairs is held out; with the seed of `unlearn()`, the pairs that it held out too.
    other: data sets with classes, by name. holdouts: data under "association" and "identity"; None for those of the
        source, which retain="rest" leaves out.

    Raises InputError for whatever cannot be opened, selected or read.
    """
    opened: dict[str, Source] = {}

    def source_of(spec: str) -> Source:
        if spec not in opened:
            opened[spec] = open_source(spec, templates=templates, seed=seed)
        return opened[spec]

    forget_pairs, selector, source = _forget_pairs(forget, source_of)
    if source is not None and not (isinstance(retain, str) and retain == "rest"):
        source = replace(source, hold_out=None)  # the caller says what is kept
    retain_pairs = _retain_pairs(retain, selector, source, source_of)
    for pairs, name in ((forget_pairs, "forget"), (retain_pairs, "retain")):
        if len(pairs) == 0:
            raise InputError(f"the {name} set is empty: give at least one (image, caption) pair")
    shared = overlap(forget_pairs, retain_pairs)
    if len(shared) == len(retain_pairs):
        raise InputError("every retain pair is also a forget pair: nothing is left to compare with")
    retain_pairs = retain_pairs.subset(np.setdiff1d(np.arange(len(retain_pairs)), shared))
    notes = []
    tests = _test_pairs(test, forget_pairs, retain_pairs, selector, source, source_of)
    if tests is None:
        notes.append(
            f"The data has no test split, so {HELD_OUT:.0%} of the pairs are scored. The original may have been "
            "trained on them."
        )
        (forget_pairs, forget_test), (retain_pairs, retain_test) = (
            _hold_out(pairs, seed + 1) for pairs in (forget_pairs, retain_pairs)
        )
        if len(forget_pairs) < 2:
            notes.append("There is a single forget pair: it is scored as it was trained, and scores have no interval.")
    else:
        forget_test, retain_test = tests
    for pairs in (forget_pairs, forget_test, retain_test):
        find_bad_images(pairs)
    _require_one_kind([forget_pairs, retain_pairs, forget_test, retain_test])
    return AuditSets.of(
        forget_pairs,
        retain_pairs,
        (forget_test, retain_test),
        other={name: _further(data, f"other[{name!r}]", source_of, True) for name, data in (other or {}).items()},
        holdouts=select_holdouts(source, selector) if holdouts is None else _holdouts(holdouts, source_of),
        notes=notes,
    )


def _forget_pairs(forget: Any, source_of: Any) -> tuple[PairDataset, str | None, Source | None]:
    if not isinstance(forget, str):
        return as_pairs(forget, "forget"), None, None
    spec, selector = parse_reference(forget)
    if selector is None:
        raise InputError(f"forget={forget!r} selects nothing: add what was forgotten, such as '{forget}#class:apple'")
    source = source_of(spec)
    return source.train.subset(select(source.train, selector, other=source.test)), selector, source


def _retain_pairs(retain: Any, selector: str | None, source: Source | None, source_of: Any) -> PairDataset:
    if not isinstance(retain, str):
        return as_pairs(retain, "retain")
    if retain == "rest":
        if source is None or selector is None:
            raise InputError("retain='rest' needs forget as 'SOURCE#SELECTOR'; give the retain pairs as a dataset")
        return source.train.subset(source.rest(source.train, select(source.train, selector, other=source.test)))
    spec, own = parse_reference(retain)
    opened = source_of(spec)
    return opened.train if own is None else opened.train.subset(select(opened.train, own, other=opened.test))


def _test_pairs(
    test: Any, forget: PairDataset, retain: PairDataset, selector: str | None, source: Source | None, source_of: Any
) -> tuple[PairDataset, PairDataset] | None:
    if test is None:
        if source is None or source.test is None:
            return None
        pairs = source.test
    elif isinstance(test, tuple) and len(test) == 2 and not isinstance(test[0], (tuple, str)):
        return as_pairs(test[0], "forget test"), as_pairs(test[1], "retain test")
    else:
        pairs = _further(test, "test", source_of, False)
    if selector is not None:
        mask = select(pairs, selector, other=None if source is None else source.train)
    else:
        wanted, kept = ({caption_key(one) for group in part.captions for one in group} for part in (forget, retain))
        mask = np.array([any(caption_key(one) in wanted - kept for one in group) for group in pairs.captions], bool)
        if mask.all() or not mask.any():
            raise InputError(
                f"{int(mask.sum())} of the {len(pairs)} test pairs share a caption with the forget pairs, so the test "
                "set cannot be told apart: pass test=(forget_test, retain_test)"
            )
    return pairs.subset(mask), pairs.subset(source.rest(pairs, mask) if source and source.has(pairs) else ~mask)


def _further(data: Any, name: str, source_of: Any, needs_classes: bool) -> PairDataset:
    if isinstance(data, str):
        spec, selector = parse_reference(data)
        source = source_of(spec)
        pairs = source.train if source.test is None else source.test
        pairs = pairs if selector is None else pairs.subset(select(pairs, selector))
    else:
        pairs = as_pairs(data, name)
    if len(pairs) == 0:
        raise InputError(f"{name} is empty: give at least one (image, caption) pair")
    if needs_classes and pairs.classes is None:
        raise InputError(f"{name} has no classes, which zero-shot accuracy needs: give data with classes")
    return pairs


def _holdouts(holdouts: Mapping[str, Any], source_of: Any) -> dict[str, PairDataset]:
    unknown = set(holdouts) - set(HOLDOUTS)
    if unknown:
        raise InputError(f"holdouts has {sorted(unknown)[0]!r}; its keys are {' and '.join(map(repr, HOLDOUTS))}")
    return {name: _further(data, f"holdouts[{name!r}]", source_of, False) for name, data in holdouts.items()}


def _hold_out(pairs: PairDataset, seed: int) -> tuple[PairDataset, PairDataset]:
    """(training, test). A single pair serves both."""
    if len(pairs) < 2:
        return pairs, pairs
    rest, held_out = split(pairs, HELD_OUT, seed)
    return pairs.subset(rest), pairs.subset(held_out)


def _require_one_kind(parts: Sequence[PairDataset]) -> None:
    kinds = {
        (
            "tensors" if isinstance(part.image(0), Tensor) else "PIL images",
            "texts" if isinstance(part.captions[0][0], str) else f"{len(part.captions[0][0])} token ids",
        ): part.name
        for part in parts
        if len(part)
    }
    if len(kinds) > 1:
        (first, name), (second, other) = list(kinds.items())[:2]
        raise InputError(
            f"{name} has {' with '.join(first)} and {other} has {' with '.join(second)}: give images and captions of "
            "one kind in all sets"
        )
