from __future__ import annotations

import pytest
from report_sample import sample_result, scores

from cliperase_fast.inspecting import _class_lines
from cliperase_fast.reading import display_width
from cliperase_fast.report import class_table, text_table


def test_the_table_holds_every_metric_before_after_and_change():
    result = sample_result()
    lines = text_table(result["before"], result["after"], unicode=True).splitlines()
    assert "forget (36 pairs)" in lines[0]
    assert "retain (324 pairs)" in lines[0]
    assert lines[1].split() == ["before", "after", "change"] * 2
    assert lines[3].split() == ["Zero-shot", "accuracy", "98.0%", "0.0%", "−98.0", "97.0%", "96.5%", "−0.5"]
    assert lines[-1].split() == [
        "Association",
        "0.800",
        "−0.200",
        "−1.000",
        "0.700",
        "0.690",
        "−0.010",
    ]
    assert len(lines) == 3 + 8


def test_columns_line_up():
    result = sample_result()
    lines = text_table(result["before"], result["after"], unicode=True).splitlines()
    ends = [[i for i in range(len(line)) if i + 1 == len(line) or line[i] != " " == line[i + 1]] for line in lines]
    columns = ends[1]  # where "before", "after", "change" end
    for found in ends[3:]:
        assert found[-6:] == columns
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("pairs", [3, 123456789])
def test_long_headings_keep_the_columns_together(pairs):
    before = {"forget": scores(pairs, 1.0, 1.0, 1.0), "retain": scores(pairs, 1.0, 1.0, 1.0)}
    lines = text_table(before, unicode=False).splitlines()
    assert f"forget ({pairs} pairs)" in lines[0]
    assert len({len(line) for line in [lines[0], *lines[2:]]}) == 1


def test_output_is_ascii_only_if_the_terminal_cannot_encode_more(monkeypatch):
    result = sample_result()
    assert text_table(result["before"], result["after"], unicode=False).isascii()

    class Old:
        encoding = "ascii"

    monkeypatch.setattr("sys.stdout", Old())
    assert text_table(result["before"], result["after"]).isascii()
    Old.encoding = "utf-8"
    assert "−" in text_table(result["before"], result["after"])


def test_missing_scores_are_dashes_and_unused_metrics_are_left_out():
    before = {"forget": scores(0, None, None, None), "retain": scores(9, None, 0.5, 0.2)}
    lines = text_table(before, before, unicode=True).splitlines()
    assert not any("Zero-shot" in line for line in lines)
    assert lines[3].split()[-6:] == ["–", "–", "–", "50.0%", "50.0%", "0.0"]


def test_an_evaluation_alone_has_one_column():
    lines = text_table({"all": scores(360, 0.9, 0.5, 0.3), "per_class": {}}, unicode=True).splitlines()
    assert lines[1].split() == ["score"]
    assert lines[3].split() == ["Zero-shot", "accuracy", "90.0%"]


def test_forget_and_lowest_classes_come_first_and_the_rest_is_counted():
    rows = {f"c{number:03d}": {"set": "retain", "pairs": 9, "accuracy": number / 100} for number in range(100)}
    rows["zebra"] = {"set": "forget", "pairs": 4, "accuracy": 1.0}
    lines = class_table(rows, limit=3, unicode=False).splitlines()
    assert lines[0].split() == ["class", "set", "pairs", "accuracy"]
    assert [line.split() for line in lines[2:5]] == [
        ["zebra", "forget", "4", "100.0%"], ["c000", "retain", "9", "0.0%"], ["c001", "retain", "9", "1.0%"],
    ]  # fmt: skip
    assert lines[5].startswith("and 98 more classes")
    assert class_table({}) == ""


def test_class_names_a_terminal_cannot_show_are_escaped():
    rows = {"café": {"set": "all", "pairs": 1, "accuracy": 0.5}}
    assert class_table(rows, unicode=False).isascii()
    assert "café" in class_table(rows, unicode=True)


@pytest.mark.parametrize(
    ("text", "columns"),
    [("cat", 3), ("日本語", 6), ("cafe\u0301", 4), ("קָמֶץ", 3), ("🍎 apple", 8), ("👨\u200d👩\u200d👧", 2), ("", 0)],
)
def test_the_width_of_text_is_that_on_a_terminal(text, columns):
    assert display_width(text) == columns


def test_names_of_wide_letters_and_with_marks_keep_the_columns_together():
    names = ("cat", "日本語", "cafe\u0301", "🍎 apple")
    rows = {name: {"set": "retain", "pairs": 20, "accuracy": 0.5} for name in names}
    assert len({display_width(line) for line in class_table(rows, unicode=True).splitlines()}) == 1
    assert len({display_width(line) for line in _class_lines({name: {"all": 20} for name in names})}) == 1
