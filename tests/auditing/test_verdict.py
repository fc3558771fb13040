"""The verdicts of an audit say what the scores are, and nothing that reads as a find or a loss where there is none."""

import pytest

from cliperase_fast.auditing.verdict import verdicts


def said(group, **changes):
    scores = {
        "forgetting": {"association": {"value": 0.1}},
        "collateral": {"retain_top1": {"value": 0.9}, "worst_class_drop": {"value": None}},
        "depth": {},
    }
    scores[group] = {**scores[group], **changes}
    return verdicts({"before": scores, "after": scores}, None, None, None)[group]


@pytest.mark.parametrize(
    ("value", "variant", "words"),
    [
        (0.25, "a {}", "Under other names it finds up to 25.0% ('a {}')."),
        (0.25, "{}", "Under other names it finds up to 25.0% (the bare name)."),
        (0.0, "{}", "Under other names it finds none."),
    ],
)
def test_the_name_that_finds_most_is_quoted_if_it_finds_something(value, variant, words):
    assert words in said("forgetting", paraphrase_top1_max={"value": value, "variant": variant})


def test_a_cosine_that_rounds_to_zero_has_no_sign():
    assert "is 0.00 (0.00 before" in said("forgetting", association={"value": -0.004})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.125, "The class that lost most is 'cat': 12.5 points."),
        (0.0, "No class lost accuracy."),
        (-0.25, "No class lost accuracy."),
    ],
)
def test_a_class_is_named_as_the_one_that_lost_most_only_if_it_lost(value, words):
    assert words in said("collateral", worst_class_drop={"value": value, "class": "cat"})


def test_relearning_from_few_pictures_says_how_many():
    scores = {
        "forgetting": {"association": {"value": 0.1}},
        "collateral": {"retain_top1": {"value": 0.9}, "worst_class_drop": {"value": None}},
        "depth": {"relearn@0": {"value": 0.0}, "relearn@5": {"value": 0.9}},
    }
    for shots, words in ((16, "after 5 steps on 16 pictures"), (1, "after 5 steps on 1 picture.")):
        assert words in verdicts({"before": scores, "after": scores}, None, None, None, shots)["depth"]
