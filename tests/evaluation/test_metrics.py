"""The table of metrics, and that everything that shows scores reads it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import METRICS, PRIMARY, EncodedPairs, Metric, find_metric, score
from cliperase_fast.report import ReportData, text_table, verdict
from cliperase_fast.report.html import page

IMAGES = torch.eye(4)
PAIRS = SimpleNamespace(class_kinds=None, labels=np.arange(4), classes=tuple("abcd"))
FORGET = np.array([True, False, False, False])


def encoded(images=IMAGES):
    return EncodedPairs(images, torch.eye(4), [np.array([row]) for row in range(4)], torch.eye(4))


def test_results_hold_the_metrics_of_the_table_in_its_order():
    scores = score(encoded(), PAIRS, FORGET)
    assert list(scores["forget"])[4:] == list(METRICS)
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_is_described_and_has_a_direction_for_each_set(metric):
    assert metric.label and metric.meaning and not metric.meaning.endswith(".")
    assert metric.better == {"forget": "lower", "retain": "higher", "all": "higher"}


def test_the_primary_metrics_are_in_the_table():
    assert set(PRIMARY) <= set(METRICS)


def test_an_unknown_metric_is_an_error_with_the_nearest_name():
    assert find_metric("association") is METRICS["association"]
    with pytest.raises(InputError, match=r"metric 'asociation' is not known; did you mean 'association'\?"):
        find_metric("asociation")
    with pytest.raises(InputError, match="use one of zero_shot_top1, image_to_text_r@1"):
        find_metric("fid")


def test_results_with_the_former_name_of_a_metric_stay_readable():
    old = {"forget": {"pairs": 9, "pair_similarity": 0.25}, "retain": {"pairs": 9, "pair_similarity": -0.5}}
    assert find_metric("pair_similarity").read(old["forget"]) == 0.25
    lines = text_table(old, old, unicode=True).splitlines()
    assert lines[-1].split() == ["Association", "0.250", "0.250", "0.000", "−0.500", "−0.500", "0.000"]
    assert '<td class="n">−0.500</td>' in page(ReportData("old", {"before": old, "after": old}))


def test_a_metric_added_to_the_table_is_computed_and_shown_everywhere(monkeypatch):
    added = Metric(
        "nearest_cosine",
        "Nearest caption",
        "mean of the largest cosine of an image and any caption",
        lambda queries, member: (queries.images @ queries.captions.T).amax(1).numpy()[member],
    )
    monkeypatch.setitem(METRICS, added.name, added)
    scores = score(encoded(), PAIRS, FORGET)
    assert scores["forget"]["nearest_cosine"] == 1.0
    assert "Nearest caption" in text_table(scores)
    assert added.label in page(ReportData("added", {"before": scores, "after": scores}))


def test_the_verdict_is_about_the_first_primary_metric_that_both_scores_have():
    after = score(encoded(IMAGES.roll(1, 0)), PAIRS, FORGET)
    result = {"before": score(encoded(), PAIRS, FORGET), "after": after}
    assert "recognises 0.0%" in verdict(result).sentence
    after["forget"]["zero_shot_top1"] = None
    assert "finds the right caption of 0.0%" in verdict(result).sentence
