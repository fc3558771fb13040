"""What the page shows beside the scores, computed once more from raw features."""

import json
from dataclasses import replace

import numpy as np
import pytest
from worlds import caption_world, class_world, unit, view_of

from cliperase_fast.auditing import scores
from cliperase_fast.auditing.evidence import BIN_WIDTH, evidence, histogram, per_class, similarities
from cliperase_fast.auditing.scores import View


def models(oracles=0):
    """Views of some models on the same pairs."""
    layout, features = class_world()
    rng = np.random.default_rng(7)
    names = ["before", "after", *(f"oracle {number}" for number in range(1, oracles + 1))]
    noisy = [
        replace(features, images=unit(features.images.numpy() + 0.3 * number * rng.normal(size=features.images.shape)))
        for number in range(len(names))
    ]
    return {name: View(layout, one, features) for name, one in zip(names, noisy, strict=True)}


def test_histograms_hold_each_cosine_in_its_bin_and_the_score_as_mean():
    layout, features = world = class_world()
    found = similarities(view_of(world))
    cosine = (features.images.double() @ features.concepts.double().T).numpy()
    own = cosine[np.arange(len(layout.labels)), layout.labels]
    for name, mask, score in (
        ("forget", layout.forget, scores.association),
        ("retain", ~layout.forget, scores.retain_association),
    ):
        low, width, counts = (found[name][key] for key in ("low", "width", "counts"))
        edges = low + width * np.arange(len(counts) + 1)
        expected = np.histogram(own[mask], edges)[0]
        assert counts == expected.tolist()
        assert sum(counts) == mask.sum()
        assert counts[0] and counts[-1]
        assert found[name]["mean"] == pytest.approx(score(view_of(world)).value, abs=1e-6)
    assert "other" not in found


def test_cosines_at_the_ends_have_a_bin():
    found = histogram(np.array([-1.0, 1.0, 1.0 + 1e-7]), np.zeros(3))
    assert found["low"] == -1.0
    assert len(found["counts"]) == round(2 / BIN_WIDTH) + 1
    assert (found["counts"][0], found["counts"][-1]) == (1, 2)
    assert histogram(np.zeros(0), np.zeros(0))["counts"] == []


def test_images_of_other_data_are_compared_with_their_own_classes():
    layout, features = class_world()
    first = unit([[1, 0], [0, 1]])
    second = unit([[1, 0]])
    others = {"a": (first, first, np.array([0, 1])), "b": (second, unit([[0, 1]]), np.array([0]))}
    found = similarities(View(layout, replace(features, other=others), features))["other"]
    assert sum(found["counts"]) == 3
    assert found["counts"][-1] == 2  # a cosine of 1
    assert found["mean"] == pytest.approx(2 / 3)


def test_class_accuracies_are_those_of_the_scores():
    views = models(oracles=2)
    layout = views["before"].layout
    found = per_class(views)
    assert list(found) == [f"class {number}" for number in range(6)]
    for number, row in enumerate(found.values()):
        mine = layout.labels == number
        assert row["set"] == ("forget" if number in (1, 4) else "retain")
        assert row["pairs"] == mine.sum()
        assert row["after"] == pytest.approx(views["after"].correct[mine].mean())
        oracles = [views[name].correct[mine].mean() for name in ("oracle 1", "oracle 2")]
        assert row["oracle"] == pytest.approx(np.mean(oracles))
    kept = [row for row in found.values() if row["set"] == "retain"]
    assert np.mean([row["after"] for row in kept]) == pytest.approx(scores.retain_top1(views["after"]).value)
    worst = scores.worst_class_drop(views["after"])
    assert max(row["before"] - row["after"] for row in kept) == pytest.approx(worst.value)


def test_a_class_with_pairs_of_both_sets_is_mixed():
    views = models()
    layout = views["before"].layout
    forget = layout.forget.copy()
    forget[np.flatnonzero(layout.labels == 0)[0]] = True
    partly = {name: replace(view, layout=replace(layout, forget=forget)) for name, view in views.items()}
    assert per_class(partly)["class 0"]["set"] == "mixed"
    assert "oracle" not in per_class(partly)["class 0"]


def test_data_without_classes_has_histograms_only():
    views = {name: view_of(caption_world()) for name in ("before", "after")}
    found = evidence(views)
    assert found["per_class"] == {}
    assert sum(found["similarities"]["after"]["retain"]["counts"]) == 15
    assert json.loads(json.dumps(found)) == found
