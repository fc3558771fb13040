"""Turn datasets, source strings and selectors into the checked splits of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, concat
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pair_sets import Opener, PairSets, hold_out, open_pair_sets, read_pair_sets
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks


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


def open_sets(
    forget: Any,
    retain: Any,
    test: Any,
    config: UnlearnConfig,
    *,
    templates: Sequence[str] | None,
    validation: Any = None,
) -> PairSets:
    """Open the sources and select the pairs, see `open_pair_sets`."""
    opener = Opener(templates, config.seed, config.on_error)
    return open_pair_sets(
        forget,
        retain,
        test,
        opener,
        overlap_policy=config.overlap,
        test_fraction=config.test_fraction,
        validation=validation,
    )


def prepare_data(
    sets: PairSets, config: UnlearnConfig, *, progress: bool, ranks: Ranks = SINGLE_PROCESS
) -> PreparedData:
    """Read every image once, skip or refuse unreadable ones, and hold out validation and test pairs."""
    found = read_pair_sets(
        sets,
        on_error=config.on_error,
        test_fraction=config.test_fraction,
        seed=config.seed + 1,
        progress=progress,
        ranks=ranks,
    )
    forget, retain, validation = found.forget, found.retain, found.validation
    if validation is None:
        forget, forget_validation = hold_out(forget, config.val_fraction, config.seed)
        retain, retain_validation = hold_out(retain, config.val_fraction, config.seed)
        validation = forget_validation, retain_validation
    return PreparedData(
        train=Split.of(forget, retain),
        validation=Split.of(*validation),
        test=Split.of(*found.test),
        intake=found.intake,
        names=sets.names,
        holdouts=sets.holdouts,
    )
