"""The study of the levels that runs read, on features that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cliperase_fast.benchmarks import levels
from cliperase_fast.evaluation import EncodedPairs
from cliperase_fast.unlearning.related import SHARE

NAMES, LABELS = ("cat", "dog", "ship"), np.array([1, 0, 2, 0, 1, 2, 2])


class Pairs(SimpleNamespace):
    def subset(self, rows):
        return Pairs(labels=self.labels[rows], classes=self.classes, entities=None)

    def __len__(self):
        return len(self.labels)


def unit(rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def test_the_levels_of_a_class_are_those_of_unrelated_pairs_and_near_the_most_similar_class():
    captions = unit([[1, 0.6, 0.0], [0.6, 1, 0], [0, 0, 1]])
    found = EncodedPairs(captions[LABELS], captions, [np.array([label]) for label in LABELS], None)
    row = levels.levels_of(0, Pairs(labels=LABELS, classes=NAMES, entities=None), found)
    like = float(captions[0] @ captions[1])
    plain = 2 / 5 * like  # two of five retained pairs are dogs
    assert (row["similar_to"], row["own"]) == ("dog", pytest.approx(1.0))
    assert row["unrelated"] == pytest.approx(plain)
    assert row["similar"] == pytest.approx(plain + min(SHARE, 0.5 * (1 - plain) / (like - plain)) * (like - plain))


def test_the_table_has_the_distance_of_each_level_from_the_mean_of_the_oracles():
    cat = {"class": "cat", "own": 0.9, "unrelated": 0.0, "similar": 0.3, "similar_to": "dog", "oracles": [0.2, 0.6]}
    ship = {"class": "ship", "own": 0.8, "unrelated": -0.1, "similar": 0.1, "similar_to": "cat", "oracles": [-0.1]}
    rows = [{**cat, "pairs": 9}, {**ship, "pairs": 7}]
    words = {"asked": 24, "known": 4}
    table, counted = levels.parts({"classes": rows, "synonyms": words})
    assert table[1][0] == ("cat", "0.90", "0.00", "dog", "0.30", "0.20, 0.60")
    assert table[1][-1] == ("mean distance from the oracles", "", "0.20", "", "0.15", "")
    assert counted == "7 to 9 test pairs of each class. The text tower knows 4 of 24 synonyms."
    assert levels.parts({"classes": rows[:1], "synonyms": words})[1].startswith("9 test pairs of each class.")


def test_each_class_is_measured_with_its_own_oracles(monkeypatch):
    seen = []
    test = Pairs(labels=np.array([2, 0, 0, 1]), classes=NAMES, entities=None)
    train = Pairs(labels=LABELS, classes=NAMES, entities=None)
    monkeypatch.setattr(levels, "open_source", lambda name: SimpleNamespace(train=train, test=test))
    monkeypatch.setattr(levels, "encoded", lambda folder, pairs: seen.append((folder, len(pairs))))
    monkeypatch.setattr(levels, "pair_similarities", lambda of: np.array([0.25, 0.75]))
    monkeypatch.setattr(levels, "synonyms", lambda folder: {"asked": 2, "known": len(folder)})
    monkeypatch.setattr(levels, "levels_of", lambda label, pairs, found: {"label": label})
    study = SimpleNamespace(source="demo", test=None, original=lambda seed: "original")
    record = levels.measure(study, lambda concept: [f"no {concept}"])
    assert record["synonyms"] == {"asked": 2, "known": 8}
    assert seen == [("original", 7), ("no cat", 2), ("no dog", 1), ("no ship", 1)]
    assert [(row["class"], row["label"], row["oracles"], row["pairs"]) for row in record["classes"]] == [
        ("cat", 0, [0.5], 2), ("dog", 1, [0.5], 1), ("ship", 2, [0.5], 1)
    ]  # fmt: skip
