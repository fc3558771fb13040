"""The audit's page, its figures and its text table, from made-up content of audit.json."""

from __future__ import annotations

import copy
import re
from itertools import pairwise

import numpy as np
import pytest
from audit_sample import EVIL, STEPS, sample_audit
from page_reader import KNOWN, Reader

from cliperase_fast.report import audit_html, audit_page, audit_plots, audit_table
from cliperase_fast.report.audit_scores import SCORES, find_score
from cliperase_fast.report.drawing import DARK, LIGHT, png


@pytest.fixture(scope="module")
def written():
    return audit_page(sample_audit())


@pytest.fixture(scope="module")
def reader(written):
    return Reader(written)


def test_the_page_is_well_formed_and_runs_nothing(written, reader):
    assert reader.open == []
    assert reader.all("script") == reader.all("link") == reader.all("iframe") == []
    assert not re.search(r"https?://|//cdn|@import|url\(", written)
    assert all(set(attributes) <= KNOWN for _, attributes in reader.tags)


def test_the_page_holds_every_verdict_note_and_score(reader):
    content = sample_audit()
    assert "Audit of forgetting seven" in reader.text
    for said in (*content["verdicts"].values(), *content["notes"]):
        assert said in reader.text
    for group in content["scores"]["after"].values():
        for name in group:
            assert find_score(name).label in reader.text, name
    for row in (
        "Association 0.400 [0.350, 0.450] −0.400 [−0.450, −0.350] −0.200 [−0.250, −0.150] −0.300 [−0.350, −0.250]",
        "Zero-shot accuracy 90.0% [85.0, 95.0] 10.0% [5.0, 15.0] 30.0% [25.0, 35.0]",
        "Largest loss of a class 10.0 [5.0, 15.0] two",
        "sevens 30.0% [25.0, 35.0]",
        "Without a value: Membership, found (needs at least 1000 forget test pairs; there are 36).",
        "Relearning, step 100 100.0%",
        "seven forget 36 97.0% 0.0% 2.0% −97.0",
        "Retain test pairs 1,324",
        "Left out 1,000 x image cannot be decoded (the first: image0.jpg)",
        "Oracles 3",
    ):
        assert row in reader.text, row


def test_each_score_of_the_page_is_explained(reader):
    for name, entry in SCORES.items():
        shown = entry.about("…") if name[-1] in "@:" else entry
        assert f"{shown.label} {shown.meaning}" in reader.text, name


def test_the_gaps_stand_beside_the_noise_floor(reader, no_drawing):
    assert "Association −0.400 −0.200 0.200 0.050 4.0" in reader.text
    assert "Retain accuracy 90.0% 90.0% 0.0 5.0 0.0" in reader.text
    assert "Mean gap 0.040 0.020 2.0" in reader.text
    assert "Tug of war: 0.910" in reader.text
    one = Reader(audit_page(sample_audit(oracles=1)))
    assert "Association −0.400 −0.300 0.100 – –" in one.text
    assert "the noise floor is not known" in one.text
    assert "oracle 1" not in one.text  # the mean of one oracle is that oracle


def test_over_forgetting_is_warned_of_with_its_figures_and_the_rule(reader):
    assert "Over-forgotten The association of the forget pairs is −0.400" in reader.text
    assert "The lowest oracle has −0.300, and a result is over-forgotten below −0.350, 0.05 under it." in reader.text
    one, alone = (" ".join(audit_html.over_forgotten_lines(sample_audit(oracles=count))) for count in (1, 0))
    assert "The oracle has −0.300, and" in one
    assert "unrelated pairs, has 0.000, and a result is over-forgotten below −0.100, 0.1 under it." in alone


def test_other_results_have_no_warning(no_drawing):
    for known in (False, None):
        assert "Over-forgotten" not in audit_page(sample_audit(oracles=0, over_forgotten=known))


@pytest.mark.parametrize(
    "changes",
    [
        {"oracles": 0},
        {"oracles": 1, "depth": False},
        {"classes": False},
        {"oracles": 0, "depth": False, "classes": False, "evidence": {}, "background": None, "data": {}},
        {"notes": [], "verdicts": {}, "over_forgotten_below": None, "gap": None},
    ],
)
def test_missing_parts_are_left_out_without_errors(changes, no_drawing):
    reader = Reader(audit_page(sample_audit(**changes)))
    assert reader.open == []
    assert "None" not in reader.text
    assert "nan" not in reader.text.split()
    assert ("By class" in reader.text) == (changes.get("classes", True) and "evidence" not in changes)


def test_scores_without_any_value_leave_an_empty_group(no_drawing):
    content = sample_audit(oracles=0)
    for groups in content["scores"].values():
        for group in groups.values():
            for found in group.values():
                found.update(value=None, low=None, high=None)
                found.pop("curve", None)
    content["evidence"]["similarities"]["before"] = {"forget": {"low": 0, "width": 0.005, "counts": [], "mean": None}}
    content["evidence"]["similarities"]["after"] = {}
    reader = Reader(audit_page(content))
    assert "Without a value: Association (no value); Reciprocal rank" in reader.text
    assert len(reader.all("img")) == 1  # only the classes


def test_names_from_outside_are_escaped_and_long_ones_cut(no_drawing):
    names = (EVIL, 'a "quoted" & name', "", "שבע", "$\\frac{1$", "x" * 300)
    row = {"set": "retain", "pairs": 5, "before": 0.9, "after": 0.5}
    content = sample_audit(depth=False, notes=[EVIL], verdicts={EVIL: EVIL})
    content["evidence"]["per_class"] = dict.fromkeys(names, row) | {EVIL + "2": {**row, "set": EVIL}}
    content["data"] = {"forget": EVIL, "test": EVIL, "concepts": [EVIL, *names]}
    after = content["scores"]["after"]
    after["collateral"]["worst_class_drop"]["class"] = EVIL
    after["collateral"][f"other:{EVIL}"] = after["collateral"]["other"]
    after["forgetting"]["zero_shot_top1"] = {"value": None, "low": None, "high": None, "reason": EVIL}
    after[EVIL] = {EVIL: {"value": 1.0, "low": None, "high": None}}
    content["scores"][EVIL] = copy.deepcopy(after)
    text = audit_page(content)
    reader = Reader(text)
    assert "<script" not in text
    assert reader.open == []
    assert all(set(attributes) <= KNOWN for _, attributes in reader.tags)
    assert text.count("&lt;script&gt;") >= 12
    for name in ('a "quoted" & name', "שבע", "$\\frac{1$", "(no name)", "x" * 14):
        assert name in reader.text, name
    assert "<bdi>שבע</bdi>" in text
    assert "x" * 14 + "<wbr>" + "x" * 14 in text
    assert "x" * 61 not in text.replace("<wbr>", "")


def test_of_many_classes_the_most_changed_are_shown_and_the_others_counted(no_drawing):
    content = sample_audit(oracles=0, depth=False)
    content["evidence"]["per_class"] = {
        f"class {number:04}": {"set": "retain", "pairs": 5, "before": 0.9, "after": 0.9 - number / 2000}
        for number in range(1000)
    }
    reader = Reader(audit_page(content))
    assert "960 more classes changed less and are left out; audit.json has all." in reader.text
    assert "class 0999" in reader.text
    assert "class 0500" not in reader.text
    assert "the 40 most changed of 1,000 classes" in texts(audit_plots.draw_class_changes(content, LIGHT))


def test_one_class_is_enough(no_drawing):
    content = sample_audit(oracles=0, depth=False)
    content["evidence"]["per_class"] = {"seven": content["evidence"]["per_class"]["seven"]}
    assert "seven forget 36 97.0% 0.0% −97.0" in Reader(audit_page(content)).text


def texts(figure):
    """Everything written on the figure."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_every_figure_is_drawn_in_both_themes_without_clipped_names(theme):
    content = sample_audit()
    rows = content["evidence"]["per_class"]
    rows["n02099601_golden_retriever_puppy"] = {**rows["one"], "set": "mixed"}
    for name in ("scores", "relearning", "cosines", "classes"):
        figure = audit_plots.FIGURES[name](content, theme)
        assert png(figure).startswith(b"\x89PNG")
        width, height = figure.canvas.get_width_height()
        for axes in figure.axes:
            left, right = axes.get_xlim()
            ticks = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
            names = [*axes.get_yticklabels(), *ticks, axes._left_title, axes.xaxis.label]
            boxes = [text.get_window_extent() for text in names if text.get_text()]
            assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes), name
            if axes.get_legend() is not None:
                assert not axes._left_title.get_window_extent().overlaps(axes.get_legend().get_window_extent()), name


def test_the_numbers_under_the_cosines_stand_apart():
    content = sample_audit()
    for group in content["scores"]["before"].values():
        for found in group.values():
            found |= {"low": None, "high": None}
    content["scores"]["before"]["forgetting"]["association"]["value"] = -0.85
    content["scores"]["before"]["collateral"]["text_side"]["value"] = 0.85
    axes = audit_plots.draw_scores(content, LIGHT).axes[0]
    png(axes.figure)  # lays it out
    left, right = axes.get_xlim()
    shown = [text for text in axes.get_xticklabels() if left <= text.get_position()[0] <= right]
    boxes = [text.get_window_extent() for text in shown]
    assert all(box.x1 + 10 < after.x0 for box, after in pairwise(boxes))


def test_dots_stand_at_the_scores_and_bands_reach_over_the_oracles():
    figure = audit_plots.draw_scores(sample_audit(), LIGHT)
    cosines = figure.axes[0]
    rows = [label.get_text() for label in cosines.get_yticklabels()]
    assert rows[0] == "Association"
    top = len(rows)
    lines = [line for line in cosines.lines if round(float(np.mean(line.get_ydata()))) == top]
    dots = sorted(float(line.get_xdata()[0]) for line in lines if len(line.get_xdata()) == 1)
    assert dots == pytest.approx([-0.4, -0.2, 0.4])  # after, the oracles' mean, before
    ends = sorted(tuple(map(float, line.get_xdata())) for line in lines if len(line.get_xdata()) == 2)
    assert ends == [pytest.approx(pair) for pair in ((-0.45, -0.35), (-0.3, -0.1), (0.35, 0.45))]


def test_relearning_curves_are_the_scores_and_the_band_reaches_over_the_oracles():
    lines = audit_plots.relearning_lines(sample_audit())
    assert list(lines) == ["16 shots", "4 shots", "1 shot", "neighbour", "unrelated"]
    after, oracle = lines["16 shots"]["after"], lines["16 shots"]["oracle"]
    assert after.steps == list(STEPS)
    np.testing.assert_allclose(after.values, [min(1, 0.1 + step / 100) for step in STEPS])
    np.testing.assert_allclose(after.high, np.array(after.values) + 0.05)
    np.testing.assert_allclose(oracle.values[0], 0.3)
    np.testing.assert_allclose((oracle.low[0], oracle.high[0]), (0.2, 0.4))
    assert lines["4 shots"]["after"].low is None
    assert audit_plots.draw_relearning(sample_audit(depth=False), LIGHT) is None


def test_histograms_hold_every_pair_and_mark_the_given_means():
    content = sample_audit()
    wide = {"low": -1.0, "width": 0.005, "counts": [1] * 400, "mean": 0.25}
    content["evidence"]["similarities"]["after"] = {"forget": wide}
    figure = audit_plots.draw_cosines(content, LIGHT)
    shares = [patch.get_data().values for axes in figure.axes for patch in axes.patches if patch.get_fill()]
    assert [share.sum() for share in shares] == pytest.approx([1.0] * 4)
    edges = figure.axes[0].patches[0].get_data().edges
    assert len(edges) <= 50
    first = shares[0][np.flatnonzero(shares[0])]
    assert first.sum() == pytest.approx(1)
    assert edges[np.flatnonzero(shares[0])[0]] <= -0.1
    assert "after: mean 0.25" in texts(figure)
    assert "Pairs of concepts that were never trained" in texts(figure)


def test_the_text_table_fits_a_terminal_with_several_oracles():
    content = sample_audit()
    collateral = content["scores"]["after"]["collateral"]
    collateral["other:" + "long name " * 9] = collateral["other"]
    table = audit_table(content, unicode=True)
    assert max(map(len, table.splitlines())) <= 100
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "association 0.400 [0.350, 0.450] −0.400 [−0.450, −0.350] −0.200 0.200 0.050" in lines
    assert "zero_shot_top1 90.0% [85.0, 95.0] 10.0% [5.0, 15.0] 30.0% 20.0 5.0" in lines
    assert lines[-1] == "mean gap 0.040 0.020"
    assert audit_table(content, unicode=False).isascii()
    assert "floor" not in audit_table(sample_audit(oracles=1))
    assert "gap" not in audit_table(sample_audit(oracles=0))


def test_a_score_that_the_table_does_not_know_is_shown_by_its_name():
    assert find_score("new_score").label == "New score"
    assert find_score("new@3").label == "New@3"
    assert find_score("other:a:b@c").label == "Accuracy on a:b@c"
    assert find_score("relearn@{}").label == "Relearning, step {}"
