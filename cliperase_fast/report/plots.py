"""The report's figures, each from a run's data and a theme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cliperase_fast.report.data import ReportData
from cliperase_fast.report.drawing import (
    AFTER,
    BACKGROUND_LEVEL,
    BEFORE,
    ORACLE,
    ORACLE_LEVEL,
    TARGET_LEVEL,
    Level,
    Mark,
    Theme,
    draw_curve,
    font_size,
    halo,
    name_marks,
    name_points,
    name_rows,
    new_figure,
    panel,
    plain,
    short_number,
)
from cliperase_fast.report.rendering import draw_light
from cliperase_fast.report.wording import number, signed, term_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

MOST_CLASSES = 40  # rows of the per-class figure
MOST_LABELS = 20  # class names written into the embedding map
BINS = 48  # of a histogram
_MAP_ROOM = (430.0, 370.0)  # pixels of a map inside its frame, about
_MEAN_WIDTH = 0.28  # of a histogram's panel that the name of a mean takes
_NO_TERMS = ("step", "epoch", "total")  # what a line holds before its terms


def write_plots(run: ReportData, directory: str | Path) -> list[Path]:
    """Write losses.png, per_class.png, similarities.png and embeddings.png into `directory`, which is created.

    Figures without data are left out. Returns the paths of those written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        drawing = draw_light(run, draw)
        if drawing is not None:
            paths.append(directory / f"{name}.png")
            paths[-1].write_bytes(drawing.png)
    return paths


def draw_losses(run: ReportData, theme: Theme) -> Figure | None:
    """Draw the total loss, its terms, the learning rate and the validation scores, by step."""
    steps = [line for line in run.metrics if "total" in line]
    evaluations = [line for line in run.metrics if isinstance(line.get("validation"), dict)]
    if not steps:
        return None
    config = run.result.get("config") or {}
    last = max(line["step"] for line in steps)
    chosen = number((run.result.get("selection") or {}).get("step"))
    if chosen is not None and not 0 <= chosen <= last:
        chosen = None  # of a run whose metrics are not all here
    curves = [
        (name, term_label(name) + _weight(config, name), theme.forget if name == "forget" else theme.retain)
        for name in recorded_terms(steps)
    ]
    curves.append(("learning_rate", "Learning rate", theme.muted))
    rows = 1 + (len(curves) + 1) // 2
    figure = new_figure(520, 180 * rows, theme)
    grid = figure.add_gridspec(rows, 2)

    def step_panel(place: SubplotSpec, title: str) -> Axes:
        axes = panel(figure.add_subplot(place), title, theme)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.set_xlim(0, last)
        if place.rowspan.stop == rows:
            axes.set_xlabel("step", color=theme.muted, fontsize=font_size(11))
        return axes

    total = step_panel(grid[0, 0] if evaluations else grid[0, :], "Total loss")
    draw_curve(total, steps, "total", theme.ink, smooth=True)
    for index, (name, title, colour) in enumerate(curves):
        alone = index == len(curves) - 1 and index % 2 == 0
        axes = step_panel(grid[1 + index // 2, slice(None) if alone else index % 2], title)
        draw_curve(axes, steps, name, colour, smooth=name != "learning_rate")
    axes.set_ylim(bottom=0)  # the learning rate's
    axes.locator_params(axis="y", nbins=3)
    for axes in figure.axes:
        axes.yaxis.set_major_formatter(short_number)  # matplotlib's own hides an exponent beside the title
    if evaluations:
        _draw_validation(step_panel(grid[0, 1], "Validation score"), evaluations, run.result, theme)
    if chosen is not None:
        for axes in figure.axes:
            _mark_step(axes, chosen, last, theme, written=axes is total)
    return figure


def recorded_terms(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the loss terms in the lines of steps: what stands before the learning rate.

    The forget term comes first, then the others as they are recorded.
    """
    names: dict[str, None] = {}
    for line in steps:
        before_rate = list(line)[: list(line).index("learning_rate")] if "learning_rate" in line else []
        names |= dict.fromkeys(name for name in before_rate if name not in _NO_TERMS)
    return sorted(names, key=lambda name: name != "forget")


def draw_per_class(run: ReportData, theme: Theme) -> Figure | None:
    """Draw the accuracy of a run's classes; see `draw_classes`."""
    return draw_classes(run.result, theme)


def draw_classes(result: Mapping[str, Any], theme: Theme) -> Figure | None:
    """Draw each class's accuracy before and after, forget classes first, then by change.

    result: with "per_class". Where a class also has one of "oracle", it is marked.
    """
    rows, total = changed_classes(result, MOST_CLASSES)
    if not rows:
        return None
    figure = new_figure(520, 90 + 20 * len(rows), theme)
    axes = panel(figure.add_subplot(), "Accuracy by class", theme)
    if len(rows) < total:
        text = f"the {len(rows)} most changed of {total:,} classes"
        axes.set_xlabel(text, color=theme.muted, fontsize=font_size(11))
    marks = [BEFORE, AFTER]
    for height, (_, row) in zip(range(len(rows), 0, -1), rows, strict=True):
        colour = theme.retain if row["set"] == "retain" else theme.forget
        before, after, oracle = 100 * row["before"], 100 * row["after"], number(row.get("oracle"))
        axes.plot([before, after], [height, height], color=colour, linewidth=2.2, alpha=0.35, zorder=2)
        if oracle is not None:
            ORACLE.draw(axes, 100 * oracle, height, theme)
            marks = [BEFORE, AFTER, ORACLE]
        BEFORE.draw(axes, before, height, theme)
        AFTER.draw(axes, after, height, theme, colour)
    axes.set_xlim(-3, 103)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
    room = 26 if len(marks) == 2 else 18  # letters, so that the title and the legend stand side by side
    name_rows(axes, [(_class_label(name, row["set"], room), row["set"] != "retain") for name, row in rows], theme)
    name_marks(axes, marks, theme)
    return figure


def changed_classes(result: Any, most: int | None = None) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Return (name, row) of the classes with both accuracies, and how many there are in all.

    Forget classes come first; in each group the largest losses come first. At most `most` rows are returned: forget
    classes fill at most half of them when retain classes need the others, and the most changed are chosen.
    """
    rows = [
        (str(name), {**row, "set": row.get("set", ""), "before": before, "after": after})
        for name, row in (result.get("per_class") or {}).items()
        if (before := number(row.get("before"))) is not None and (after := number(row.get("after"))) is not None
    ]

    def by_change(item: tuple[str, dict[str, Any]]) -> tuple[float, str]:
        return item[1]["after"] - item[1]["before"], item[0]

    def most_changed(items: list[tuple[str, dict[str, Any]]], count: int) -> list[tuple[str, dict[str, Any]]]:
        ranked = sorted(items, key=lambda item: (-abs(by_change(item)[0]), item[0]))
        return sorted(ranked[: max(count, 0)], key=by_change)

    forget = [item for item in rows if item[1]["set"] != "retain"]
    retain = [item for item in rows if item[1]["set"] == "retain"]
    if most is not None and len(rows) > most:
        forget = most_changed(forget, max(most // 2, most - len(retain)))
        retain = most_changed(retain, most - len(forget))
    return sorted(forget, key=by_change) + sorted(retain, key=by_change), len(rows)


def draw_similarities(run: ReportData, theme: Theme) -> Figure | None:
    """Draw histograms of the cosines of matching pairs, before and after, for both sets."""
    values = {
        (which, when): array[np.isfinite(array)]
        for when in ("before", "after")
        for which, given in run.similarities.get(when, {}).items()
        if (array := np.asarray(given, dtype=np.float64).ravel()).size
    }
    values = {key: array for key, array in values.items() if array.size}
    if not values:
        return None
    levels = association_levels(run.audit)
    target = number(((run.result.get("recipe") or {}).get("target") or {}).get("association"))
    if target is not None and not levels:
        levels = {TARGET_LEVEL: target}
    known = [*values.values(), np.array(list(levels.values()))] if levels else list(values.values())
    low, high = min(array.min() for array in known), max(array.max() for array in known)
    pad = max(0.04 * (high - low), 0.01)
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    histograms = {
        key: Histogram(np.histogram(array, edges)[0] / len(array), float(array.mean())) for key, array in values.items()
    }
    titles = {"forget": "Forget pairs", "retain": "Retain pairs"}
    return draw_histograms(histograms, edges, titles, levels, theme)


def association_levels(audit: Mapping[str, Any] | None) -> dict[Level, float]:
    """What an audit compares the association of the forget pairs with: the background level of the original, and the
    oracles' mean where there are some.

    audit: the content of audit.json, or None.
    """
    content = audit or {}
    oracle = (content.get("scores") or {}).get("oracle") or {}
    target = (oracle.get("forgetting") or {}).get("association") or {}
    levels = {BACKGROUND_LEVEL: number(content.get("background")), ORACLE_LEVEL: number(target.get("value"))}
    return {level: value for level, value in levels.items() if value is not None}


class Histogram(NamedTuple):
    """shares: of the values in each bin. mean: of the values."""

    shares: np.ndarray
    mean: float


def draw_histograms(
    histograms: Mapping[tuple[str, str], Histogram],
    edges: np.ndarray,
    titles: Mapping[str, str],
    levels: Mapping[Level, float],
    theme: Theme,
) -> Figure:
    """Draw a panel for each set with histograms of cosines, before and after, and mark their means.

    histograms: by (set, "before" or "after"). edges: of the bins, for all. titles: by set, in the order of the panels;
    "forget" has its own colour, and `levels` to compare its means with.
    """
    present = [which for which in titles if any(key[0] == which for key in histograms)]
    figure = new_figure(520, 40 + 250 * len(present), theme)
    for index, which in enumerate(present):
        axes = panel(figure.add_subplot(len(present), 1, index + 1), titles[which], theme)
        colour = theme.forget if which == "forget" else theme.retain
        tallest = 0.0
        means = {}
        for when, shade in (("before", theme.neutral), ("after", colour)):
            if (which, when) not in histograms:
                continue
            share, means[when] = histograms[which, when]
            tallest = max(tallest, share.max())
            axes.stairs(share, edges, fill=True, color=shade, alpha=0.45, linewidth=0)
            axes.stairs(np.where(share > 0, share, np.nan), edges, color=shade, linewidth=1.4)  # no line at zero
        if which == "forget" and levels:
            for level, value in levels.items():
                level.draw(axes, value, theme)
            name_marks(axes, list(levels), theme)
        _mark_means(axes, means, {"before": theme.muted, "after": colour}, edges, tallest, theme)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.42 * tallest)
        axes.set_yticks([])
        axes.yaxis.grid(False)
        if index == len(present) - 1:
            axes.set_xlabel("cosine of an image and its caption", color=theme.muted, fontsize=font_size(11))
    return figure


def draw_embeddings(run: ReportData, theme: Theme, moments: Sequence[str] = ("before", "after")) -> Figure | None:
    """Draw a map of the image features in the two main directions of those before; the same axes serve for after."""
    maps = project(run)
    moments = [when for when in moments if when in maps]
    if not moments:
        return None
    spread = np.concatenate(list(maps.values()))
    middle = (spread.max(0) + spread.min(0)) / 2
    reach = np.maximum(spread.max(0) - spread.min(0), 1e-3) * 0.54
    forget = np.array([which != "retain" for which in run.embedding_sets])
    labels = np.array([str(label) for label in run.embedding_labels])
    figure = new_figure(460 * len(moments), 430, theme)
    for index, when in enumerate(moments):
        axes = panel(figure.add_subplot(1, len(moments), index + 1), f"Images {when}", theme)
        points = maps[when]
        for chosen, colour, size, order in ((~forget, theme.retain, 13, 2), (forget, theme.forget, 19, 3)):
            axes.scatter(
                points[chosen, 0],
                points[chosen, 1],
                s=size,
                color=colour,
                alpha=0.6,
                linewidths=0,
                zorder=order,
            )
        axes.set_xlim(middle[0] - reach[0], middle[0] + reach[0])
        axes.set_ylim(middle[1] - reach[1], middle[1] + reach[1])
        _name_groups(axes, points, labels, forget, theme)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, color=theme.grid)
        name_marks(axes, [Mark("forget", "forget"), Mark("retain", "retain")], theme)
    return figure


def project(run: ReportData) -> dict[str, np.ndarray]:
    """Project the image features to float [n, 2], for "before" and, where given, "after".

    The axes are the principal components of "before", from a singular value decomposition of its centred features;
    "after" is centred by the same mean. Values that are not finite count as 0.
    """
    before = run.embeddings.get("before")
    if before is None or len(before) == 0 or len(before) != len(run.embedding_sets):
        return {}
    before = np.nan_to_num(np.asarray(before, dtype=np.float64))  # [n, D]
    mean = before.mean(0)
    axes = np.zeros((2, before.shape[1]))
    found = np.linalg.svd(before - mean, full_matrices=False)[2][:2]  # [<= 2, D]
    # A component's sign is arbitrary: fixed, so that the same run gives the same picture everywhere.
    largest = np.take_along_axis(found, np.abs(found).argmax(1, keepdims=True), 1)
    axes[: len(found)] = found * np.where(largest < 0, -1.0, 1.0)
    maps = {"before": (before - mean) @ axes.T}
    after = run.embeddings.get("after")
    if after is not None and np.shape(after) == before.shape:
        maps["after"] = (np.nan_to_num(np.asarray(after, dtype=np.float64)) - mean) @ axes.T
    return maps


FIGURES: dict[str, Callable[[ReportData, Theme], Any]] = {
    "losses": draw_losses,
    "per_class": draw_per_class,
    "similarities": draw_similarities,
    "embeddings": draw_embeddings,
}


def _class_label(name: str, which: str, room: int) -> str:
    """Return the class's name in at most `room` letters."""
    suffix = " (partly)" if which == "mixed" else ""
    return plain(name, room - len(suffix)) + suffix


def _weight(config: Mapping[str, Any], term: str) -> str:
    if config.get("method", "cliperase") != "cliperase":
        return ""  # the weights are settings of CLIPErase alone
    weight = number(config.get(f"lambda_{term}"))
    return "" if weight is None else f"  ×{weight:g}"


def _draw_validation(axes: Axes, evaluations: Sequence[Any], result: Any, theme: Theme) -> None:
    known = (result.get("selection") or {}).get("validation") or {}
    ends: list[float] = []
    for which, colour in (("retain", theme.retain), ("forget", theme.forget)):
        points = [(0.0, number(known.get(f"{which}_before")))]
        points += [(float(line["step"]), number(line["validation"].get(which))) for line in evaluations]
        known_points = [(step, 100 * score) for step, score in points if score is not None]
        if not known_points:
            continue
        x, y = np.array(known_points).T
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5, markeredgewidth=0, clip_on=False)
        high = y[-1] > 50
        # The second name moves past the first where the curves end side by side.
        close = any(abs(end - y[-1]) < 20 and (end > 50) == high for end in ends)
        offset = 21 if close else 7
        ends.append(float(y[-1]))
        axes.annotate(
            which,
            (x[-1], y[-1]),
            xytext=(0, -offset if high else offset),
            textcoords="offset points",
            ha="right",
            va="top" if high else "bottom",
            color=colour,
            fontsize=font_size(11.5),
            fontweight="bold",
            path_effects=halo(theme),
        )
    axes.set_ylim(0, 104)
    axes.set_yticks([0, 50, 100], ["0", "50", "100%"])


def _mark_step(axes: Axes, step: float, last: float, theme: Theme, written: bool) -> None:
    axes.axvline(step, color=theme.muted, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    if written:
        left = step > last / 2
        axes.annotate(
            "chosen",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, -2),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            color=theme.muted,
            fontsize=font_size(11),
        )


def _mark_means(
    axes: Axes, means: Mapping[str, float], colours: Mapping[str, str], edges: np.ndarray, tallest: float, theme: Theme
) -> None:
    """Mark the means "before" and, lower, "after", each with its name on the side that has room."""
    span = edges[-1] - edges[0]
    for when, mean in means.items():
        height = (1.3 if when == "before" else 1.13) * tallest
        axes.plot([mean, mean], [0, height], color=colours[when], linewidth=1.2)
        left = mean > (edges[0] + edges[-1]) / 2
        if when == "after" and "before" in means:  # its name must not cross the taller line
            away_left = mean < means["before"]
            room = mean - edges[0] if away_left else edges[-1] - mean
            left = away_left if room > _MEAN_WIDTH * span else left
        axes.annotate(
            f"{when}: mean {signed(mean, 2).lstrip('+')}",
            (mean, height),
            xytext=(-5 if left else 5, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colours[when],
            fontsize=font_size(11.5),
            fontweight="bold",
            path_effects=halo(theme),
        )


def _name_groups(axes: Axes, points: np.ndarray, labels: np.ndarray, forget: np.ndarray, theme: Theme) -> None:
    """Write class names at the middle of their points or beside it, where there are few enough to read."""
    names = [name for name in dict.fromkeys(labels.tolist()) if name] if len(labels) == len(points) else []
    if len(names) > MOST_LABELS:
        names = []
    if not names:
        return
    forgets = [bool(forget[labels == name].all()) for name in names]
    middles = np.array([np.median(points[labels == name], axis=0) for name in names])
    alone = any((labels == name).sum() == 1 for name in names)  # a name would cover a class's only point
    shown = [plain(name, 16) for name in names]
    name_points(axes, middles, shown, forgets, _MAP_ROOM, theme, below=11.0 if alone else 0.0)
