"""Seeded samples of sets that are larger than a run needs, and how certain the scores of a sample are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, split
from cliperase_fast.data.pair_sets import PairSets, SampleCounts
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.metrics import METRICS, PRIMARY, SHARE
from cliperase_fast.plurals import counted
from cliperase_fast.report.wording import percent
from cliperase_fast.unlearning.selection import wilson

CAPTIONS = 5  # of a pair on average, as in COCO, for which `max_test_pairs` is meant
Sets = tuple[PairDataset, PairDataset]  # forget, retain


def sample_pairs(pairs: PairDataset, most: int, seed: int) -> PairDataset:
    """Return at most so many pairs, each class in its share; the same seed draws the same ones."""
    if len(pairs) <= most:
        return pairs
    return pairs.subset(split(pairs, most / len(pairs), seed)[1])


def sample_sets(sets: PairSets, config: UnlearnConfig) -> PairSets:
    """Return the sets with at most `max_retain_pairs` retain and `max_test_pairs` test and validation pairs."""
    retain, counts = sets.retain, dict(sets.sampled)
    if 0 < config.max_retain_pairs < len(retain):
        if sets.stream is not None:
            raise InputError(
                f"max_retain_pairs={config.max_retain_pairs} does not limit the pairs that training takes from a "
                f"stream, and is less than the {len(retain)} that it holds for evaluation: set it to 0, and give a "
                "smaller '?head=', or fewer steps"
            )
        retain = sample_pairs(retain, config.max_retain_pairs, config.seed)
        counts["retain"] = {"pairs": len(retain), "of": len(sets.retain)}
    found = {
        name: None if part is None else sample_evaluation(part, name, config, counts)
        for name, part in (("test", sets.test), ("validation", sets.validation))
    }
    return replace(sets, retain=retain, test=found["test"], validation=found["validation"], sampled=counts)


def sample_evaluation(parts: Sets, name: str, config: UnlearnConfig, counts: SampleCounts) -> Sets:
    """Return (forget, retain) pairs with at most `max_test_pairs` together, fewer if they would have more than
    `CAPTIONS` captions each; at most half of them are forget pairs if there are enough retain pairs.

    counts: gets how many were drawn, under "forget test" or the like.
    """
    most, sizes = config.max_test_pairs, tuple(map(len, parts))
    captions = sum(len(own) for part in parts for own in part.captions)
    if captions > CAPTIONS * most:
        most = min(most, CAPTIONS * most * sum(sizes) // captions)
    if config.max_test_pairs == 0 or sum(sizes) <= most:
        return parts
    forget = min(sizes[0], max(most // 2, most - sizes[1]))
    drawn = sample_pairs(parts[0], forget, config.seed), sample_pairs(parts[1], most - forget, config.seed)
    for kind, part, size in zip(("forget", "retain"), drawn, sizes, strict=True):
        if len(part) < size:
            counts[f"{kind} {name}"] = {"pairs": len(part), "of": size}
    return drawn


def check_batch(n_retain: int, config: UnlearnConfig) -> None:
    """Raise InputError if `max_retain_pairs` leaves fewer training pairs than a batch has."""
    if n_retain < config.retain_pairs:
        raise InputError(
            f"max_retain_pairs={config.max_retain_pairs} leaves {counted(n_retain, 'retain pair')} to train on, "
            f"without the held-out ones, and a batch has {config.retain_pairs}: make it larger, or give a smaller "
            "batch_size"
        )


def check_stream(n_retain: int, config: UnlearnConfig) -> None:
    """Raise InputError for settings that need retain pairs with an index. n_retain: of the head that are trained on."""
    if n_retain < config.retain_pairs:
        raise InputError(
            f"the head of the stream leaves {counted(n_retain, 'retain pair')} without those held out, and a batch has "
            f"{config.retain_pairs}: raise '?head=', or give a smaller batch_size"
        )
    if config.epoch_over == "retain":
        raise InputError("epoch_over='retain' needs retain pairs that end, and a stream does not: use 'forget'")
    if config.teacher_cache in ("memory", "disk"):
        raise InputError(
            f"teacher_cache={config.teacher_cache!r} keeps features of pairs with an index, which a stream does not "
            "have: use 'auto' or 'off'"
        )


def test_intervals(
    scores: Mapping[str, Mapping[str, Any]], similarities: Mapping[str, np.ndarray]
) -> dict[str, dict[str, list[float]]]:
    """Return the 95 % interval of each score of the forget and of the retain pairs of a test split.

    scores, similarities: by set. A share has Wilson's interval over the images of the set, which is wide for captions
    of the same image; the association has the normal one.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("forget", "retain"):
        count, found[name] = scores[name]["pairs"], {}
        for metric in METRICS.values():
            value = metric.read(scores[name])
            if value is None or count < 2:
                continue
            if metric.format is SHARE:
                found[name][metric.name] = list(wilson(value, count))
            elif metric.name == "association":
                half = 1.959964 * float(similarities[name].std(ddof=1)) / math.sqrt(count)
                found[name][metric.name] = [value - half, value + half]
    return found


def sample_notes(
    sampled: SampleCounts, after: Mapping[str, Mapping[str, Any]], intervals: dict[str, dict[str, list[float]]] | None
) -> list[str]:
    """Return notes that say which sets were sampled, and how certain the main score of the unlearned model is.

    after, intervals: of the test split, by set; no intervals if it was not sampled.
    """
    notes = []
    if "retain" in sampled:
        drawn = sampled["retain"]
        notes.append(
            f"{drawn['pairs']} of the {drawn['of']} retain pairs were used, a sample drawn by the seed "
            "(max_retain_pairs)"
        )
    if intervals is None:
        return notes
    tested = {kind: sampled[f"{kind} test"] for kind in intervals if f"{kind} test" in sampled}
    sizes = " and ".join(f"{drawn['pairs']} of the {drawn['of']} {kind}" for kind, drawn in tested.items())
    primary = next(name for name in PRIMARY if name in intervals["retain"])
    scores = " and ".join(
        f"{percent(after[kind][primary])} of the {kind} pairs ({' to '.join(map(percent, found[primary]))})"
        for kind, found in intervals.items()
        if primary in found
    )
    notes.append(
        f"The test scores are those of a sample of {sizes} test pairs (max_test_pairs): {METRICS[primary].label} "
        f"{scores}, 95 % intervals. Retrieval searches the sample only"
    )
    return notes
