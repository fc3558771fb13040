"""The figures of an audit, each from the content of audit.json and a theme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cliperase_fast.evaluation.metrics import SHARE
from cliperase_fast.report.audit_scores import AREA, find_score
from cliperase_fast.report.drawing import (
    AFTER,
    BEFORE,
    ORACLE,
    Theme,
    font_size,
    name_marks,
    name_rows,
    new_figure,
    panel,
    plain,
)
from cliperase_fast.report.plots import BINS, Histogram, association_levels, draw_classes, draw_histograms
from cliperase_fast.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cliperase_fast.report.drawing import Mark

Content = Mapping[str, Any]  # of audit.json

RELEARN = "relearn@"
_AREA = "relearn_area:"
_FORGET_GROUPS = ("forgetting", "depth")  # scores of the forget pairs
_COSINES, _SHARES, _AREAS = "Cosines", "Shares", "Ranks and areas"
_ROW = 24  # pixels
_OFFSET = 0.17  # of a row, between its middle and the marks of before and after


class Line(NamedTuple):
    """A curve: values at steps, with the ends of a band around it (None where it has none)."""

    steps: list[int]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def oracle_names(content: Content) -> list[str]:
    """The names of the single oracles, in their order."""
    return [name for name in content.get("scores") or {} if name.startswith("oracle ")]


def value_of(content: Content, model: str, group: str, score: str, end: str = "value") -> float | None:
    """A score's value, or an end of its interval ("low", "high"); None where it is missing."""
    found = ((content.get("scores") or {}).get(model) or {}).get(group) or {}
    return number((found.get(score) or {}).get(end))


def draw_scores(content: Content, theme: Theme) -> Figure | None:
    """Draw the scores before and after as dots with their intervals, the oracles' mean and their range as a band.

    Left out are the steps of relearning, which have a figure of their own, and the largest loss of a class, which is
    that of another class in each model.
    """
    panels = _score_rows(content)
    if not panels:
        return None
    rows = [len(names) for names in panels.values()]
    figure = new_figure(520, 70 * len(rows) + _ROW * sum(rows) + 10, theme)
    grid = figure.add_gridspec(len(rows), 1, height_ratios=[count + 1 for count in rows])
    for index, (title, names) in enumerate(panels.items()):
        axes = panel(figure.add_subplot(grid[index, 0]), title, theme)
        scale = 100 if title == _SHARES else 1
        for height, (group, score) in zip(range(len(names), 0, -1), names, strict=True):
            _draw_score(axes, content, group, score, height, scale, theme)
        axes.set_ylim(0.3, len(names) + 0.7)
        name_rows(
            axes, [(plain(find_score(score).label, 30), group in _FORGET_GROUPS) for group, score in names], theme
        )
        if title == _COSINES:
            _pad(axes)
            axes.locator_params(axis="x", nbins=6)
        else:
            axes.set_xlim(-0.03 * scale, 1.03 * scale)
        if title == _SHARES:
            axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
        if index == 0:
            name_marks(axes, [BEFORE, AFTER, *([ORACLE] if oracle_names(content) else [])], theme)
    return figure


def _score_rows(content: Content) -> dict[str, list[tuple[str, str]]]:
    """By the title of a panel, (group, score) of the scores that have a value before or after."""
    panels: dict[str, list[tuple[str, str]]] = {_COSINES: [], _SHARES: [], _AREAS: []}
    scores = content.get("scores") or {}
    for group, found in (scores.get("after") or {}).items():
        for score in found:
            known = [value_of(content, model, group, score) for model in ("before", "after")]
            if score == "worst_class_drop" or score.startswith(RELEARN) or known == [None, None]:
                continue
            panels[_panel_of(score)].append((group, score))
    return {title: names for title, names in panels.items() if names}


def _panel_of(score: str) -> str:
    entry = find_score(score)
    return _SHARES if entry.format is SHARE else _AREAS if entry.format is AREA else _COSINES


def _draw_score(
    axes: Axes, content: Content, group: str, score: str, height: float, scale: float, theme: Theme
) -> None:
    values = [
        value
        for name in oracle_names(content)
        if (value := value_of(content, name, group, score)) is not None
    ]  # fmt: skip
    if values:
        low, high = scale * min(values), scale * max(values)
        axes.plot(
            [low, high], [height] * 2, color=theme.neutral, alpha=0.3, linewidth=11, solid_capstyle="butt", zorder=1
        )
    target = value_of(content, "oracle", group, score)
    if target is not None:
        ORACLE.draw(axes, scale * target, height, theme)
    colour = theme.forget if group in _FORGET_GROUPS else theme.retain
    for model, mark, shade, middle in (
        ("before", BEFORE, theme.neutral, height + _OFFSET),
        ("after", AFTER, colour, height - _OFFSET),
    ):
        value, *ends = (value_of(content, model, group, score, end) for end in ("value", "low", "high"))
        if value is None:
            continue
        if None not in ends:
            axes.plot([scale * end for end in ends], [middle] * 2, color=shade, linewidth=1.6, zorder=2)  # type: ignore[operator]
        mark.draw(axes, scale * value, middle, theme, shade)


def _pad(axes: Axes) -> None:
    """Leave room beside the outermost marks."""
    low, high = axes.get_xlim()
    room = max(0.02, 0.02 * (high - low))
    axes.set_xlim(low - room, high + room)


def draw_relearning(content: Content, theme: Theme) -> Figure | None:
    """Draw how many forget images are named after some steps of training: before, after and the oracles.

    A panel for each kind of training data. The band of before and after is the 95 % interval; that of the oracles
    reaches from the lowest to the highest.
    """
    kinds = relearning_lines(content)
    if not kinds:
        return None
    more = list(kinds)[1:]
    rows = 1 + (len(more) + 1) // 2
    figure = new_figure(520, 290 + 200 * (rows - 1), theme)
    grid = figure.add_gridspec(rows, 2, height_ratios=[290, *[200] * (rows - 1)])
    for index, kind in enumerate(kinds):
        row, column = (index + 1) // 2, (index + 1) % 2
        alone = index == 0 or (column == 0 and index == len(more))
        axes = panel(figure.add_subplot(grid[row, slice(None) if alone else column]), _title(kind), theme)
        _draw_lines(axes, kinds[kind], theme)
        if row == rows - 1:
            axes.set_xlabel("steps of training", color=theme.muted, fontsize=font_size(11))
        if index == 0:
            name_marks(axes, [mark for model, mark in _MARKS.items() if model in kinds[kind]], theme)
    return figure


_MARKS: dict[str, Mark] = {"before": BEFORE, "after": AFTER, "oracle": ORACLE}


def relearning_lines(content: Content) -> dict[str, dict[str, Line]]:
    """By the kind of training data ("16 shots" first), then by model ("before", "after", "oracle"), its curve."""
    found = {"16 shots": _lines(content, _steps_of_scores)}
    after = ((content.get("scores") or {}).get("after") or {}).get("depth") or {}
    for score in after:
        if score.startswith(_AREA):
            found[score.removeprefix(_AREA)] = _lines(content, lambda depth, score=score: _steps_of_notes(depth, score))
    return {kind: lines for kind, lines in found.items() if "after" in lines}


def _lines(content: Content, read: Any) -> dict[str, Line]:
    scores = content.get("scores") or {}
    curves = {name: read((found or {}).get("depth") or {}) for name, found in scores.items() if name != "oracle"}
    lines = {name: curves[name] for name in ("before", "after") if curves.get(name) is not None}
    oracles = [curves[name] for name in oracle_names(content) if curves[name] is not None]
    if oracles:
        values = np.array([line.values for line in oracles if line.steps == oracles[0].steps])
        lines["oracle"] = Line(
            oracles[0].steps, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist()
        )
    return lines


def _steps_of_scores(depth: Mapping[str, Any]) -> Line | None:
    """The curve of `relearn@S`, with intervals where all have one."""
    known = {
        int(score.removeprefix(RELEARN)): found
        for score, found in depth.items()
        if score.startswith(RELEARN) and number(found.get("value")) is not None
    }
    if not known:
        return None
    steps = sorted(known)
    values, low, high = ([known[step].get(end) for step in steps] for end in ("value", "low", "high"))
    return Line(steps, values, *([low, high] if None not in (*low, *high) else []))


def _steps_of_notes(depth: Mapping[str, Any], score: str) -> Line | None:
    curve = (depth.get(score) or {}).get("curve") or {}
    known = sorted((int(step), value) for step, found in curve.items() if (value := number(found)) is not None)
    return Line([step for step, _ in known], [value for _, value in known]) if known else None


def _title(kind: str) -> str:
    shots = {"16 shots": "Relearning from 16 pictures", "4 shots": "From 4 pictures", "1 shot": "From 1 picture"}
    classes = {"neighbour": "From a neighbouring class", "unrelated": "From an unrelated class"}
    return (shots | classes).get(kind) or plain(kind, 30)


def _draw_lines(axes: Axes, lines: Mapping[str, Line], theme: Theme) -> None:
    """Draw curves over steps that are as far from each other as their numbers in the list."""
    steps = sorted({step for line in lines.values() for step in line.steps})
    place = {step: position for position, step in enumerate(steps)}
    colours = {"before": theme.neutral, "after": theme.forget, "oracle": theme.ink}
    for model in ("oracle", "before", "after"):
        if model not in lines:
            continue
        line, colour = lines[model], colours[model]
        x, y = [place[step] for step in line.steps], 100 * np.array(line.values)
        if line.low is not None and line.high is not None:
            low, high = (100 * np.array(end) for end in (line.low, line.high))
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.8, linestyle="--" if model == "oracle" else "-", zorder=3)
        for left, height in zip(x, y, strict=True):
            _MARKS[model].draw(axes, left, height, theme, colour)
    axes.set_xlim(-0.2, len(steps) - 0.8)
    axes.set_ylim(-3, 104)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_yticks([0, 50, 100], ["0", "50", "100%"])


def draw_cosines(content: Content, theme: Theme) -> Figure | None:
    """Draw histograms of the cosines of pairs, before and after: forget, retain and, where given, never-seen ones."""
    given = {
        (which, when): found
        for when in ("before", "after")
        for which, found in (((content.get("evidence") or {}).get("similarities") or {}).get(when) or {}).items()
        if found.get("counts")
    }
    if not given:
        return None
    width = next(iter(given.values()))["width"]
    starts = {key: round(found["low"] / width) for key, found in given.items()}  # in bins of the file
    levels = association_levels(content)
    ends = [*starts.values(), *(int(value // width) for value in levels.values())]
    first = min(ends) - 2
    last = max(*ends, *(start + len(given[key]["counts"]) for key, start in starts.items())) + 2
    joined = max(1, -(-(last - first) // BINS))  # bins of the file in one of the figure
    bins = -(-(last - first) // joined)
    histograms = {}
    for key, found in given.items():
        counts = np.zeros(bins * joined)
        start = starts[key] - first
        counts[start : start + len(found["counts"])] = found["counts"]
        histograms[key] = Histogram(counts.reshape(bins, joined).sum(1) / counts.sum(), found["mean"])
    edges = (first + joined * np.arange(bins + 1)) * width
    titles = {"forget": "Forget pairs", "retain": "Retain pairs", "other": "Pairs of concepts that were never trained"}
    return draw_histograms(histograms, edges, titles, levels, theme)


def draw_class_changes(content: Content, theme: Theme) -> Figure | None:
    """Draw the accuracy of the classes, with the oracles' mean."""
    return draw_classes(content.get("evidence") or {}, theme)


FIGURES = {
    "scores": draw_scores,
    "relearning": draw_relearning,
    "cosines": draw_cosines,
    "classes": draw_class_changes,
}
