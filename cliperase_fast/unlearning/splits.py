"""Turn datasets, source strings and selectors into the checked splits of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, concat
from cliperase_fast.data.checks import check_images
from cliperase_fast.data.intake import Intake, Tally
from cliperase_fast.data.pair_sets import (
    Opener,
    PairSets,
    SampleCounts,
    hold_out,
    open_pair_sets,
    read_pair_sets,
    read_pairs,
)
from cliperase_fast.data.streams import PairStream
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.sampling import Sets, check_batch, check_stream, sample_evaluation, sample_sets


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


def probe_rows(count: int) -> np.ndarray:
    """Return the rows of a few training pairs by whose images transforms are told apart, the first one among them."""
    return np.unique(np.linspace(0, count - 1, 4).astype(int))


@dataclass
class PreparedData:
    train: Split
    validation: Split
    test: Split
    intake: Intake  # what was left out or ignored
    names: dict[str, str]  # of each set, as the caller gave it
    holdouts: dict[str, PairDataset] = field(default_factory=dict)  # see `PairSets`
    sampled: SampleCounts = field(default_factory=dict)  # see `PairSets`
    all_read: bool = True  # whether the training images were all read; otherwise some may be unreadable

    stream: PairStream | None = None  # what training takes retain pairs from, in place of those in `train`

    def fingerprint(self) -> str:
        parts = [f"{part.pairs.fingerprint()}:{part.n_forget}" for part in (self.train, self.validation, self.test)]
        parts += [] if self.stream is None else [self.stream.fingerprint()]
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
    """Open the sources and select the pairs, see `open_pair_sets`; draw samples of sets that are too large."""
    opener = Opener(templates, config.seed, config.on_error)
    sets = open_pair_sets(
        forget,
        retain,
        test,
        opener,
        overlap_policy=config.overlap,
        test_fraction=config.test_fraction,
        validation=validation,
    )
    return sample_sets(sets, config)


def prepare_data(
    sets: PairSets, config: UnlearnConfig, *, progress: bool, ranks: Ranks = SINGLE_PROCESS
) -> PreparedData:
    """Read the images, skip or refuse unreadable ones, and hold out validation and test pairs.

    Of a large set only a sample is read here. What is scored is read whole where unreadable images are to be skipped.
    """
    found = read_pair_sets(
        sets,
        on_error=config.on_error,
        test_fraction=config.test_fraction,
        seed=config.seed + 1,
        progress=progress,
        ranks=ranks,
        sample=True,
    )
    forget, retain, validation = found.forget, found.retain, found.validation
    if validation is None:
        forget, forget_validation = hold_out(forget, config.val_fraction, config.seed)
        retain, retain_validation = hold_out(retain, config.val_fraction, config.seed)
        validation = forget_validation, retain_validation
    counts = dict(sets.sampled)
    if "retain" in counts:
        check_batch(len(retain), config)
    if sets.stream is not None:
        check_stream(len(retain), config)
    test = sample_evaluation(found.test, "test", config, counts)
    validation = sample_evaluation(validation, "validation", config, counts)
    train = Split.of(forget, retain)
    if not found.all_read and config.on_error == "skip":

        def read(parts: Sets, name: str) -> Sets:
            how: dict[str, Any] = {"on_error": "skip", "progress": progress, "ranks": ranks}
            forget, retain = parts
            return (
                read_pairs(forget, f"forget {name}", found.intake.skipped, **how),
                read_pairs(retain, f"retain {name}", found.intake.skipped, **how),
            )

        test, validation = read(test, "test"), read(validation, "validation")
        train = ranks.run_on_all(lambda: _with_readable_probes(train, found.intake.skipped))
    return PreparedData(
        train=train,
        validation=Split.of(*validation),
        test=Split.of(*test),
        intake=found.intake,
        names=sets.names,
        holdouts=sets.holdouts,
        sampled=counts,
        all_read=found.all_read,
        stream=sets.stream,
    )


def _with_readable_probes(train: Split, skipped: Tally) -> Split:
    """Leave out pairs until the few images by which a run is checked before it starts can be read."""
    while True:
        rows = probe_rows(len(train.pairs))
        good, bad = check_images(train.pairs.subset(rows), on_error="skip")
        if not bad:
            return train
        for image in bad:
            skipped.add(image.reason, image.message)
        rows = np.delete(rows, good)
        train = Split(train.pairs.without(rows), train.n_forget - int((rows < train.n_forget).sum()))
        if not 0 < train.n_forget < len(train.pairs):
            raise InputError(f"too few images of {train.pairs.name} can be read (first: {bad[0].message})")
