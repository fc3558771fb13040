"""A comparison of methods: its table for terminals, its page and its figure, from the content of compare.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cliperase_fast.evaluation.metrics import COSINE
from cliperase_fast.report.audit_scores import find_score
from cliperase_fast.report.drawing import (
    BEFORE,
    ORACLE,
    Mark,
    Theme,
    font_size,
    name_marks,
    name_points,
    new_figure,
    panel,
    plain,
)
from cliperase_fast.report.rendering import Cell, Row, Table, picture, render
from cliperase_fast.report.table import aligned
from cliperase_fast.report.table import shown as printable
from cliperase_fast.report.wording import count, difference, interval, number, signed, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Content = Mapping[str, Any]  # of compare.json

_ROOM = (880.0, 330.0)  # pixels inside the figure's frame, about
_METHOD = Mark("methods", "retain")


class _Column(NamedTuple):
    """A score that has a column. loss: whether a falling score is written as the loss in points."""

    heading: str
    score: str
    loss: bool = False


_COLUMNS = (
    _Column("forget top-1", "zero_shot_top1"),
    _Column("association", "association"),
    _Column("retain top-1", "retain_top1"),
    _Column("worst class", "worst_class_drop", loss=True),
    _Column("relearning", "relearn_area"),
)
_MEANINGS = (
    ("Forget top-1", "share of forget images whose nearest class is their own"),
    ("Association", "mean cosine of forget images with their own captions"),
    ("Retain top-1", "the same accuracy on what should stay"),
    ("Worst class", "change of the class that lost most, in percentage points"),
    ("Relearning", "mean share of forget images that are named again after 0 to 100 steps on 16 pairs"),
    ("Gap", "mean distance of five scores from the oracles' mean, see the audit of each method"),
    ("Memory", "peak beyond what was in use before the run"),
    ("Changed", "size of the weights that differ from the original's"),
)


def _given(reference: str | None) -> bool:
    """Return whether data was given: compare.json has the text of each argument, "None" included."""
    return reference not in (None, "", "None")


def _ranked(content: Content) -> list[str]:
    """Return the methods with a result: the smallest gap first, without oracles in the order in which they ran."""
    found = [name for name, entry in content["methods"].items() if "scores" in entry]

    def gap(name: str) -> float:
        known = number(content["methods"][name].get("gap"))
        return math.inf if known is None else known

    return sorted(found, key=gap)


def _value(scores: Mapping[str, Any], score: str, end: str = "value") -> float | None:
    return number((scores.get(score) or {}).get(end))


def _shown(content: Content) -> list[_Column]:
    """Return the columns for which a method has a value."""
    entries = [entry["scores"] for entry in content["methods"].values() if "scores" in entry]
    return [column for column in _COLUMNS if any(_value(scores, column.score) is not None for scores in entries)]


def _rows(content: Content) -> tuple[list[str], list[Row]]:
    """Return the headings and the rows: the original, the oracles, then the methods."""
    columns, models = _shown(content), content["models"]
    gaps = any(number(entry.get("gap")) is not None for entry in content["methods"].values())
    headings = ["", *(column.heading for column in columns), *(["gap"] if gaps else []), "time", "memory", "changed"]
    oracles = [name for name in models if name.startswith("oracle ")]
    rows = []
    if "before" in models:
        rows.append(Row(("the original", *_cells(models["before"], columns, {}), *[""] * (3 + gaps))))
    if oracles:
        name = "an oracle" if len(oracles) == 1 else f"{len(oracles)} oracles, mean"
        floor = [f"{difference(_floor(content), COSINE)} between two" if _floor(content) is not None else ""] * gaps
        cost = _seconds(content.get("oracle_seconds")), "", ""
        rows.append(Row((name, *_cells(models["oracle"], columns, {}), *floor, *cost), "sum"))
    for method in _ranked(content):
        entry = content["methods"][method]
        gap = [difference(number(entry.get("gap")), COSINE)] * gaps
        label = Cell(method, note="over-forgotten" if entry.get("over_forgotten") else "")
        cost = _seconds(entry["seconds"]), _mib(entry.get("peak_mib")), _mib(entry["changed_mib"])
        rows.append(Row((label, *_cells(entry["scores"], columns, entry), *gap, *cost)))
    return headings, rows


def _cells(scores: Mapping[str, Any], columns: Sequence[_Column], entry: Mapping[str, Any]) -> list[str | Cell]:
    """Return the scores with their intervals, of a method with the class that lost most."""
    cells: list[str | Cell] = []
    for column in columns:
        value, low, high = (_value(scores, column.score, end) for end in ("value", "low", "high"))
        form = find_score(column.score).format
        if column.loss:
            lost = None if value is None or not entry else -form.scale * value
            named = (scores.get(column.score) or {}).get("class")
            cells.append(Cell(signed(lost, 1), note=str(named) if entry and named is not None and value else ""))
        else:
            cells.append(Cell(written(value, form), interval(low, high, form)))
    return cells


def _floor(content: Content) -> float | None:
    return next((f for entry in content["methods"].values() if (f := number(entry.get("floor"))) is not None), None)


def _seconds(value: Any) -> str:
    seconds = number(value)
    return "–" if seconds is None else f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _mib(value: Any) -> str:
    size = number(value)
    return "–" if size is None else f"{size:,.0f} MiB" if size >= 10 else f"{size:.2g} MiB"


def comparison_table(content: Content, *, unicode: bool | None = None) -> str:
    """Write a comparison's table in plain text; the page has the intervals too. unicode: as in `text_table`."""
    headings, rows = _rows(content)
    texts = [headings, *([_plain(cell) for cell in row.cells] for row in rows)]
    return printable("\n".join(aligned(texts)), unicode)


def _plain(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return cell
    return cell.text + (" (over-forgotten)" if cell.note == "over-forgotten" else "")


def comparison_page(content: Content) -> str:
    """Render compare.html. Every text that comes from the comparison is escaped."""
    headings, rows = _rows(content)
    data, inputs = content.get("data") or {}, content["inputs"]
    return render(
        "compare.html",
        title=f"Forgetting {', '.join(map(str, data.get('concepts') or [])) or inputs['forget']}",
        table=Table(headings, rows, minor=[len(headings) - 2, len(headings) - 1]) if rows else None,
        meanings=_MEANINGS,
        figure=picture(
            content,
            draw_tradeoff,
            "Methods as points: how much they forget against what they damage; the table has the numbers",
            "Lower is more forgotten, further left is more damage. Models that never saw the pairs are the oracles.",
        ),
        failed=[
            f"{name}: {entry['error']}" for name, entry in content["methods"].items() if "error" in entry
        ],
        notes=content.get("notes") or [],
        runs=list(_ranked(content)),
        reports=inputs["settings"].get("report", True),
        facts=[
            ("Model", inputs["model"]),
            ("Data", " + ".join(inputs[name] for name in ("forget", "retain", "test") if _given(inputs.get(name)))),
            ("Forget test pairs", count(data.get("forget_test_pairs"))),
            ("Retain test pairs", count(data.get("retain_test_pairs"))),
            ("Settings of a method", "its recipe" if inputs.get("recipes") else "its defaults"),
            ("Settings for all methods", ", ".join(f"{k}={v}" for k, v in inputs["settings"].items() if k != "audit")),
        ],
    )  # fmt: skip


def draw_tradeoff(content: Content, theme: Theme) -> Figure | None:
    """Draw each method by its association and by what it changed of the retain pairs, with the oracles.

    The change is that of the retain accuracy in percentage points, or of the retain pairs' cosine without classes.
    """
    models, methods = content["models"], _ranked(content)
    if "before" not in models or not methods:
        return None
    before = models["before"]
    damage = "retain_top1" if _value(before, "retain_top1") is not None else "retain_association"
    scale = find_score(damage).format.scale

    def point(scores: Mapping[str, Any]) -> tuple[float, float] | None:
        x, y, start = _value(scores, damage), _value(scores, "association"), _value(before, damage)
        return None if x is None or y is None or start is None else (scale * (x - start), y)

    shown = [(BEFORE, "", point(before))]
    shown += [(ORACLE, "", point(scores)) for name, scores in models.items() if name.startswith("oracle ")]
    shown += [(_METHOD, name, point(content["methods"][name]["scores"])) for name in methods]
    drawn = [(mark, name, at) for mark, name, at in shown if at is not None]
    if not any(name for _, name, _ in drawn):
        return None
    figure = new_figure(980, 430, theme)
    axes = panel(figure.add_subplot(), "Association of forget pairs against the change of retain pairs", theme)
    unit = ", change in percentage points" if scale != 1 else ", change"
    axes.set_xlabel(find_score(damage).label + unit, color=theme.muted, fontsize=font_size(11.5))
    axes.xaxis.grid(True, color=theme.grid, linewidth=0.8)
    points = np.array([at for _, _, at in drawn])
    for values, limit in ((points[:, 0], axes.set_xlim), (points[:, 1], axes.set_ylim)):
        low, high = float(values.min()), float(values.max())
        room = 0.12 * (high - low) or 0.5
        limit(low - room, high + room)
    for mark, _, (x, y) in drawn:
        mark.draw(axes, x, y, theme)
    named = [(plain(name, 24), at) for _, name, at in drawn if name]
    places = np.array([at for _, at in named])
    name_points(axes, places, [name for name, _ in named], [False] * len(named), _ROOM, theme, below=12.0)
    has_oracles = any(mark is ORACLE for mark, _, _ in drawn)
    name_marks(axes, [BEFORE, *([ORACLE] if has_oracles else []), _METHOD], theme)
    return figure
