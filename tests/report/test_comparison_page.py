"""The table, the page and the figure of a comparison, from made-up content."""

from __future__ import annotations

import copy

import pytest
from page_reader import Reader

from cliperase_fast.report import comparison_page, comparison_table
from cliperase_fast.report.comparison import draw_tradeoff
from cliperase_fast.report.drawing import LIGHT


def scores(association, top1, retain, drop=None):
    found = {"zero_shot_top1": top1, "association": association, "retain_top1": retain, "worst_class_drop": drop}
    made = {name: {"value": value, "low": value, "high": value} for name, value in found.items()}
    made["worst_class_drop"]["class"] = "two"
    return made


def entry(association, gap, **more):
    return {
        "scores": scores(association, 0.05, 0.9, 0.021), "gap": gap, "floor": 0.04,
        "over_forgotten": association < -0.5, "verdict": "forgotten",
        "seconds": 12.0, "peak_mib": 100.0, "changed_mib": 1.5, "left_out": [], **more,
    }  # fmt: skip


@pytest.fixture
def content():
    return {
        "format": 1,
        "inputs": {
            "model": "base", "forget": "demo#class:<b>", "retain": "rest", "test": "None", "settings": {"seed": 3},
        },
        "oracle_seconds": 33.0,
        "models": {
            "before": scores(0.9, 1.0, 0.95),
            "oracle": scores(0.1, 0.0, 0.93),
            "oracle 1": scores(0.05, 0.0, 0.93),
            "oracle 2": scores(0.15, 0.0, 0.93),
        },
        "data": {"concepts": ["<b>"], "forget_test_pairs": 36, "retain_test_pairs": 324},
        "methods": {
            "far": entry(-0.9, 0.4), "near": entry(0.1, 0.02), "broken": {"error": "it <i>broke</i>"},
        },
        "notes": ["a note"],
    }  # fmt: skip


def lines(text):
    return {line.split("  ")[0].strip(): line for line in text.splitlines()}


def test_methods_stand_in_the_order_of_their_gap_below_the_oracles(content):
    text = comparison_table(content)
    names = [line.split("  ")[0].strip() for line in text.splitlines()[2:]]
    assert names == ["the original", "2 oracles, mean", "near", "far (over-forgotten)"]
    assert "broken" not in text


def test_numbers_of_a_row_are_those_of_the_entry(content):
    found = lines(comparison_table(content, unicode=False))["near"].split()
    assert found == ["near", "5.0%", "0.100", "90.0%", "-2.1", "0.020", "12", "s", "100", "MiB", "1.5", "MiB"]
    assert "0.040 between two" in comparison_table(content) and "33 s" in comparison_table(content)


def test_a_class_that_gained_is_shown_with_its_sign(content):
    content["methods"]["near"]["scores"]["worst_class_drop"]["value"] = -0.03
    assert "+3.0" in lines(comparison_table(content))["near"]


def test_without_oracles_there_is_no_gap_and_the_order_is_that_of_the_runs(content):
    for name in ("oracle", "oracle 1", "oracle 2"):
        del content["models"][name]
    for one in ("far", "near"):
        content["methods"][one].update(gap=None, floor=None)
    text = comparison_table(content)
    assert "gap" not in text and "oracle" not in text
    assert text.index("far") < text.index("near")


def test_a_column_without_values_is_left_out(content):
    for one in ("far", "near"):
        content["methods"][one]["scores"]["zero_shot_top1"]["value"] = None
    assert "forget top-1" not in comparison_table(content)
    assert "association" in comparison_table(content)


def test_the_page_has_the_table_the_failures_and_escaped_names(content):
    page = Reader(comparison_page(content))
    assert not page.open
    assert "broken: it <i>broke</i>" in page.text and "a note" in page.text
    assert "Forgetting <b>" in page.text
    assert not page.all("script") and not page.all("b") and not page.all("i")
    assert len(page.all("img")) == 1
    assert "two" in page.text  # the class that lost most
    assert "demo#class:<b> + rest" in page.text and "None" not in page.text
    links = {f"{name}/{page}.html" for name in ("near", "far") for page in ("report", "audit")}
    assert {link["href"] for link in page.all("a")} == links
    content["inputs"]["settings"]["report"] = False
    page = Reader(comparison_page(content))
    assert {link["href"] for link in page.all("a")} == {link for link in links if "report" not in link}


def test_a_comparison_without_a_result_has_a_page(content):
    content["methods"] = {"broken": content["methods"]["broken"]}
    page = Reader(comparison_page(content))
    assert "broken: it <i>broke</i>" in page.text and not page.all("img")


def points(figure):
    axes = figure.axes[0]
    return {text.get_text(): text.get_position() for text in axes.texts}, [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() != "None"
    ]


def test_the_figure_marks_the_original_every_oracle_and_every_method(content):
    names, marks = points(draw_tradeoff(content, LIGHT))
    assert set(names) == {"near", "far"}
    expected = [(0.0, 0.9), (-2.0, 0.05), (-2.0, 0.15), (-5.0, 0.1), (-5.0, -0.9)]
    for one, other in zip(sorted(marks), sorted(expected), strict=True):
        assert one == pytest.approx(other)


def test_without_classes_the_figure_takes_the_cosine_of_retain_pairs(content):
    content = copy.deepcopy(content)
    everything = [
        *content["models"].values(),
        content["methods"]["near"]["scores"],
        content["methods"]["far"]["scores"],
    ]
    for number, found in enumerate(everything):
        found["retain_top1"]["value"] = None
        found["retain_association"] = {"value": 0.8 - 0.1 * (number > 3)}
    _, marks = points(draw_tradeoff(content, LIGHT))
    assert sorted(x for x, _ in marks) == pytest.approx([-0.1, -0.1, 0, 0, 0])
