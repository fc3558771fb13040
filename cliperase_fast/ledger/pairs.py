"""The pairs of requests: open and split them, know them again later, and hold earlier ones in a new request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, concat, overlap, same_pairs
from cliperase_fast.data.intake import Tally
from cliperase_fast.data.pair_sets import Opener, PairSets, hold_out, open_pair_sets, read_pairs
from cliperase_fast.errors import InputError
from cliperase_fast.ledger.log import Entry

HOLDING = frozenset(["calibrated"])  # methods that keep what the current model does, not what captions say


@dataclass(frozen=True)
class RequestPairs:
    """The pairs of a request, split. Of `test` and `validation`, each is (forget, retain).

    names: of each set, as the caller gave it.
    """

    forget: PairDataset
    retain: PairDataset
    validation: tuple[PairDataset, PairDataset]
    test: tuple[PairDataset, PairDataset]
    names: Mapping[str, str]

    def fingerprints(self) -> dict[str, str]:
        """Return digests by which the pairs are known again. Retain pairs may change without making it another
        request."""
        digest = hashlib.sha256()
        for part in (self.forget, self.validation[0], self.test[0]):
            digest.update(part.fingerprint().encode())
        return {"forget": digest.hexdigest(), "retain": self.retain.fingerprint()}

    def counts(self) -> dict[str, int]:
        return {
            "forget": len(self.forget) + len(self.validation[0]),
            "retain": len(self.retain) + len(self.validation[1]),
            "forget_test": len(self.test[0]),
            "retain_test": len(self.test[1]),
        }

    @property
    def single(self) -> bool:
        """Whether there are too few forget pairs to hold some out: then one pair serves all splits."""
        return same_pairs(self.validation[0], self.test[0])

    @property
    def forgotten(self) -> list[PairDataset]:
        """All pairs that the request forgets, in training, validation and test."""
        return [self.forget, self.validation[0], self.test[0]]


def open_request(
    forget: Any,
    retain: Any,
    test: Any,
    validation: Any,
    settings: UnlearnConfig,
    templates: Sequence[str] | None,
    opener: Opener,
) -> RequestPairs:
    """Open the pairs of a request as `unlearn()` does, and hold out validation and test pairs as it does.

    Raises InputError for what cannot be opened or selected, and for a stream.
    """
    if isinstance(retain, str) and retain.startswith("stream:"):
        raise InputError(
            f"retain={retain!r} is a stream, whose pairs a ledger cannot know again: read its shards with wds:, or "
            "give other pairs"
        )
    sets = open_pair_sets(
        forget, retain, test, opener, overlap_policy=settings.overlap, test_fraction=settings.test_fraction,
        validation=validation,
    )  # fmt: skip
    if settings.on_error == "skip":
        sets = _readable(sets)
    own_forget, own_retain, seed = sets.forget, sets.retain, settings.seed
    tests, validations = sets.test, sets.validation
    if tests is None:
        own_forget, forget_test = hold_out(own_forget, settings.test_fraction, seed + 1)
        own_retain, retain_test = hold_out(own_retain, settings.test_fraction, seed + 1)
        tests = forget_test, retain_test
    if validations is None:
        own_forget, forget_validation = hold_out(own_forget, settings.val_fraction, seed)
        own_retain, retain_validation = hold_out(own_retain, settings.val_fraction, seed)
        validations = forget_validation, retain_validation
    return RequestPairs(own_forget, own_retain, validations, tests, sets.names)


def _readable(sets: PairSets) -> PairSets:
    """Leave out pairs whose images cannot be read, as the run does."""

    def read(part: PairDataset) -> PairDataset:
        return read_pairs(part, part.name, Tally(), on_error="skip")

    return replace(
        sets,
        forget=read(sets.forget),
        retain=read(sets.retain),
        test=None if sets.test is None else (read(sets.test[0]), read(sets.test[1])),
        validation=None if sets.validation is None else (read(sets.validation[0]), read(sets.validation[1])),
    )


def without(pairs: PairDataset, others: Sequence[PairDataset], what: str) -> PairDataset:
    """Leave out the pairs that are in one of the others. Raises InputError if none are left; what: the set's name."""
    kept = _others(pairs, others)
    if not kept.any():
        raise InputError(
            f"every {what} pair belongs to an earlier request: nothing is left to keep; give other retain pairs"
        )
    return pairs if kept.all() else pairs.subset(np.flatnonzero(kept))


def _others(pairs: PairDataset, others: Sequence[PairDataset]) -> np.ndarray:
    """Return which pairs are in none of the others; bool [n]."""
    kept = np.ones(len(pairs), dtype=bool)
    for other in others:
        kept[overlap(other, pairs)] = False
    return kept


def without_earlier(own: RequestPairs, earlier: Sequence[RequestPairs], settings: UnlearnConfig) -> RequestPairs:
    """Return the request's pairs with no pair of an earlier request among those to keep.

    Where that leaves no test or validation pairs to keep, some are held out again.
    """
    gone = [part for one in earlier for part in one.forgotten]
    retain = without(own.retain, gone, "retain")
    kept = [part.subset(np.flatnonzero(_others(part, gone))) for part in (own.test[1], own.validation[1])]
    for place, fraction in enumerate((settings.test_fraction, settings.val_fraction)):
        if len(kept[place]) == 0:
            retain, kept[place] = hold_out(retain, fraction, settings.seed)
    return replace(own, retain=retain, test=(own.test[0], kept[0]), validation=(own.validation[0], kept[1]))


def held_among(own: RequestPairs, earlier: Sequence[RequestPairs]) -> RequestPairs:
    """Return the request's pairs with the forget pairs of earlier requests among those to keep, except its own.

    own: without pairs of earlier requests (`without_earlier`). A method that keeps what the current model does, and not
    what captions say, keeps them forgotten. They are in the validation split too: a checkpoint in which an earlier
    request comes back diverges in its class.
    """
    gone = own.forgotten

    def with_earlier(pairs: PairDataset, parts: Sequence[PairDataset]) -> PairDataset:
        held = [part.subset(kept) for part in parts if len(kept := np.flatnonzero(_others(part, gone)))]
        return concat([pairs, *held]) if held else pairs

    return replace(
        own,
        retain=with_earlier(own.retain, [one.forget for one in earlier]),
        validation=(own.validation[0], with_earlier(own.validation[1], [one.validation[0] for one in earlier])),
    )


class DataAtHand:
    """Finds the pairs of earlier requests: given in this session, or opened from their sources again."""

    def __init__(self) -> None:
        self._pairs: dict[str, RequestPairs] = {}
        self._openers: dict[tuple[Any, ...], Opener] = {}

    def opener(self, settings: UnlearnConfig, templates: Sequence[str] | None) -> Opener:
        """Return what opens sources, each once in a session."""
        key = tuple(templates or ()), settings.seed, settings.on_error
        return self._openers.setdefault(key, Opener(templates, settings.seed, settings.on_error))

    def keep(self, id: str, pairs: RequestPairs) -> None:
        self._pairs[id] = pairs

    def known(self, id: str) -> RequestPairs:
        """Return the pairs that `keep` was called with."""
        return self._pairs[id]

    def find(self, entry: Entry) -> RequestPairs | str:
        """Return the pairs of a request, or why they are not at hand."""
        if entry.id not in self._pairs:
            selection = entry.content["selection"]
            if not selection["reopens"]:
                return "its pairs were given as objects: pass them with supply()"
            settings = UnlearnConfig.from_dict(entry.content["settings"])
            templates = selection["templates"]
            try:
                found = open_request(
                    selection["forget"], selection["retain"], selection["test"], selection["validation"], settings,
                    templates, self.opener(settings, templates),
                )  # fmt: skip
            except InputError as error:
                return f"its pairs cannot be opened: {error}"
            if found.fingerprints()["forget"] != selection["fingerprints"]["forget"]:
                return "its source has other pairs now"
            self._pairs[entry.id] = found
        return self._pairs[entry.id]

    def supply(self, entry: Entry, forget: Any, retain: Any, test: Any, validation: Any) -> None:
        """Take the pairs of an earlier request. Raises InputError if they are others than it had."""
        settings = UnlearnConfig.from_dict(entry.content["settings"])
        selection = entry.content["selection"]
        templates = selection["templates"]
        found = open_request(forget, retain, test, validation, settings, templates, self.opener(settings, templates))
        if found.fingerprints()["forget"] != selection["fingerprints"]["forget"]:
            raise InputError(
                f"these are not the pairs of request {entry.id!r}: their number, names, captions or order differ; give "
                "those that it forgot"
            )
        self._pairs[entry.id] = found


def selection_of(given: Mapping[str, Any], templates: Sequence[str] | None, pairs: RequestPairs) -> dict[str, Any]:
    """Return what the log says about the pairs: references as they were given, counts and digests; no pair itself.

    given: forget, retain, test and validation as the caller gave them.
    """
    texts = {name: value if isinstance(value, str) else None for name, value in given.items()}
    reopens = all(value is None or isinstance(value, str) for value in given.values())
    return {
        **texts,
        "reopens": reopens,
        "templates": None if templates is None else list(templates),
        "pairs": pairs.counts(),
        "fingerprints": pairs.fingerprints(),
    }
