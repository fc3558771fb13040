"""Pictures of a record of `loss`, `memory` or `scaling`: time, memory and the roofline against N."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .batches import Case
from .compare import FLOOR, Row
from .loss_report import milliseconds
from .points_report import KINDS, groups, title, value

Series = dict[str, list[tuple[int, float]]]  # (N, y) of each provider
_FLOOR = {"color": "black", "linestyle": ":", "marker": "x"}
_FLOOR_NAME = "the floor: products alone"
_GUIDES = {"time": 2, "memory": 1}  # what a scaling run is expected to grow as


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """PNGs for each loss, data, dtype and width: time, memory, and where a floor was measured the roofline."""
    drawn = []
    for group, sizes in groups(record).items():
        series = {kind: _series(sizes, measure) for kind, (_, measure) in KINDS.items()}
        figures = {
            kind: _against_n(points, KINDS[kind][0], _GUIDES[kind] if record.get("benchmark") == "scaling" else None)
            for kind, points in series.items()
            if points
        }
        if FLOOR in series["time"]:
            figures["roofline"] = _roofline(group, sizes)
        for kind, figure in figures.items():
            figure.suptitle(title(group), fontsize=11)
            path = folder / f"{kind}-{group.loss}-{group.data}-{group.dtype}-{group.width}.png"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
            plt.close(figure)
            drawn.append(path)
    return drawn


def _series(sizes: Mapping[int, Mapping[str, Row]], measure: str) -> Series:
    found: Series = {}
    for n, rows in sorted(sizes.items()):
        for name, row in rows.items():
            if (y := value(row, measure)) is not None and y > 0:
                found.setdefault(name, []).append((n, y))
    return found


def _against_n(series: Series, label: str, guide: int | None) -> Any:
    if len({n for points in series.values() for n, _ in points}) == 1:
        return _bars({label: series})
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    _lines(axes, series, label)
    axes.set_yscale("log")
    if guide is not None:
        points = min(series.values(), key=lambda found: (-len(found), found[-1][1]))  # who got furthest, in the least
        last_n, last = points[-1]
        ns = [points[0][0], last_n]
        style: dict[str, Any] = {"color": "grey", "linestyle": "--", "linewidth": 1}
        axes.plot(ns, [last * (n / last_n) ** guide for n in ns], label="N²" if guide == 2 else "N", zorder=0, **style)
    axes.legend(fontsize=8)
    return figure


def _roofline(group: Case, sizes: Mapping[int, Mapping[str, Row]]) -> Any:
    """The rate at which the products that are needed get done, under the roof of those products alone."""
    rates: Series = {}
    shares: Series = {}
    for n, rows in sorted(sizes.items()):
        floor = milliseconds(rows.get(FLOOR))
        flop = Case(group.loss, group.data, group.dtype, n, group.width).flop
        for name, row in rows.items():
            if (ms := milliseconds(row)) is not None:
                rates.setdefault(name, []).append((n, flop / ms / 1e9))
                if floor is not None and name != FLOOR:
                    shares.setdefault(name, []).append((n, 100 * floor / ms))
    if len(sizes) == 1:
        return _bars({"TFLOP/s of the products needed": rates, "floor / time, %": shares})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    _lines(left, rates, "TFLOP/s of the products needed")
    left.set_ylim(bottom=0)
    _lines(right, shares, "floor / time, %")
    right.set_ylim(bottom=0)
    right.axhline(100, color="black", linestyle=":")
    left.legend(fontsize=8)
    return figure


def _bars(panels: Mapping[str, Series]) -> Any:
    """One size, which no line can be drawn through: a bar for each provider, with its figure."""
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    size = (1.5 + 5.5 * len(panels), 1.2 + 0.4 * len(names))
    figure, row = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, (label, series) in zip(row[0], panels.items(), strict=True):
        for place, name in enumerate(names):
            if name in series:
                ((_, y),) = series[name]
                colour = _FLOOR["color"] if name == FLOOR else f"C{[n for n in names if n != FLOOR].index(name)}"
                axes.bar_label(axes.barh(place, y, color=colour), labels=[f"{y:,.4g}"], padding=3)
        (n,) = {n for points in series.values() for n, _ in points}
        axes.set(xlabel=f"{label} (N = {n:,})")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3, axis="x")
    row[0][0].set_yticks(range(len(names)), [_FLOOR_NAME if name == FLOOR else name for name in names])
    row[0][0].invert_yaxis()
    return figure


def _lines(axes: Any, series: Series, label: str) -> None:
    names = [name for name in series if name != FLOOR]
    for name, points in series.items():
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": f"C{names.index(name)}", "marker": "o"} if name in names else _FLOOR
        axes.plot(x, y, label=_FLOOR_NAME if name == FLOOR else name, **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="N, pairs", ylabel=label)
    axes.grid(alpha=0.3)
