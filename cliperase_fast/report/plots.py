"""The report's figures. Drawn with matplotlib's objects only: no pyplot, so no global state and no window."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cliperase_fast.report.data import ReportData
from cliperase_fast.report.placement import moved_apart
from cliperase_fast.report.wording import number, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 40  # rows of the per-class figure
MOST_LABELS = 20  # class names written into the embedding map
_BINS = 48


@dataclass(frozen=True)
class Theme:
    """Vermilion and blue keep apart for every kind of colour blindness (Okabe and Ito); greys carry the
    rest."""

    surface: str
    ink: str
    muted: str
    grid: str
    neutral: str  # what was before
    forget: str
    retain: str


_MAP_ROOM = (430.0, 370.0)  # pixels of a map inside its frame, about

LIGHT = Theme("#ffffff", "#1d2330", "#667085", "#e7e9ee", "#a3abb8", "#c8481a", "#0b6cb0")
DARK = Theme("#181b22", "#e8eaf0", "#98a2b3", "#2b303b", "#727c8c", "#ff8a57", "#58b0f0")


def write_plots(run: ReportData, directory: str | Path) -> list[Path]:
    """Write losses.png, per_class.png, similarities.png and embeddings.png into `directory`, which is made.

    A figure that the data has nothing for is left out. Returns the paths of those written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(run, LIGHT)
        if figure is not None:
            paths.append(directory / f"{name}.png")
            paths[-1].write_bytes(png(figure))
    return paths


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, two pixels to a CSS pixel, in 128 colours (a third of the size, and it does
    not show)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; the page's tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    drawn.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True, dpi=(192, 192))
    return file.getvalue()


def draw_losses(run: ReportData, theme: Theme) -> Figure | None:
    """The total loss, its three terms, the learning rate and the validation scores, by step."""
    steps = [line for line in run.metrics if "total" in line]
    looks = [line for line in run.metrics if isinstance(line.get("validation"), dict)]
    if not steps:
        return None
    config = run.result.get("config") or {}
    chosen = number((run.result.get("selection") or {}).get("step"))
    figure = _figure(520, 540, theme)
    grid = figure.add_gridspec(3, 2)
    wide = grid[0, 0] if looks else grid[0, :]
    panels = [
        (wide, "total", "Total loss", theme.ink),
        (grid[1, 0], "forget", "Forgetting" + _weight(config, "lambda_forget"), theme.forget),
        (grid[1, 1], "retain", "Retention" + _weight(config, "lambda_retain"), theme.retain),
        (grid[2, 0], "consistency", "Consistency" + _weight(config, "lambda_consistency"), theme.retain),
        (grid[2, 1], "learning_rate", "Learning rate", theme.muted),
    ]
    last = max(line["step"] for line in steps)
    if chosen is not None and not 0 <= chosen <= last:
        chosen = None  # of a run whose metrics are not all here
    for place, key, title, colour in panels:
        axes = _panel(figure.add_subplot(place), title, theme)
        axes.locator_params(axis="x", nbins=5, integer=True)
        _curve(axes, steps, key, colour, smooth=key != "learning_rate")
        axes.set_xlim(0, last)
        axes.yaxis.set_major_formatter(_short_number)  # matplotlib's own hides an exponent beside the title
        if chosen is not None:
            _mark_step(axes, chosen, last, theme, written=key == "total")
        if place in (grid[2, 0], grid[2, 1]):
            axes.set_xlabel("step", color=theme.muted, fontsize=_pt(11))
        if key == "learning_rate":
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", nbins=3)
    if looks:
        axes = _panel(figure.add_subplot(grid[0, 1]), "Validation score", theme)
        axes.locator_params(axis="x", nbins=5, integer=True)
        _validation(axes, looks, run.result, theme)
        axes.set_xlim(0, last)
        if chosen is not None:
            _mark_step(axes, chosen, last, theme, written=False)
    return figure


def draw_per_class(run: ReportData, theme: Theme) -> Figure | None:
    """Each class's accuracy before and after, forget classes first, then by change."""
    rows, total = changed_classes(run.result, MOST_CLASSES)
    if not rows:
        return None
    figure = _figure(520, 90 + 20 * len(rows), theme)
    axes = _panel(figure.add_subplot(), "Accuracy by class", theme)
    if len(rows) < total:
        axes.set_xlabel(f"the {len(rows)} most changed of {total} classes", color=theme.muted, fontsize=_pt(11))
    for height, (_, row) in zip(range(len(rows), 0, -1), rows, strict=True):
        colour = theme.retain if row["set"] == "retain" else theme.forget
        before, after = 100 * row["before"], 100 * row["after"]
        axes.plot([before, after], [height, height], color=colour, linewidth=2.2, alpha=0.35, zorder=2)
        axes.plot(
            [before],
            [height],
            "o",
            markersize=6,
            markerfacecolor=theme.surface,
            markeredgecolor=theme.neutral,
            markeredgewidth=1.5,
            zorder=3,
        )
        axes.plot([after], [height], "o", markersize=6, color=colour, markeredgewidth=0, zorder=4)
    axes.set_xlim(-3, 103)
    axes.set_ylim(0.3, len(rows) + 0.7)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
    axes.xaxis.grid(True, color=theme.grid, linewidth=0.8)
    axes.yaxis.grid(False)
    names = [_plain(name, 26) + (" (partly)" if row["set"] == "mixed" else "") for name, row in rows]
    axes.set_yticks(range(len(rows), 0, -1), names)
    for label, (_, row) in zip(axes.get_yticklabels(), rows, strict=True):
        forgets = row["set"] != "retain"
        label.set(color=theme.forget if forgets else theme.ink, fontweight="bold" if forgets else "normal")
    _key(axes, [("before", theme.neutral, False), ("after", theme.muted, True)], theme)
    return figure


def changed_classes(result: Any, most: int | None = None) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """(name, row) of the classes with both accuracies, forget classes first, each group by change, losses
    first.

    With `most`, that many: forget classes (at most half of them when there are more), then the most changed.
    Also returns how many there are in all.
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
    """How the cosines of matching pairs are spread, before and after, for both sets."""
    values = {
        (which, when): array[np.isfinite(array)]
        for when in ("before", "after")
        for which, given in run.similarities.get(when, {}).items()
        if (array := np.asarray(given, dtype=np.float64).ravel()).size
    }
    values = {key: array for key, array in values.items() if array.size}
    present = [which for which in ("forget", "retain") if any(key[0] == which for key in values)]
    if not present:
        return None
    low, high = min(array.min() for array in values.values()), max(array.max() for array in values.values())
    pad = max(0.04 * (high - low), 0.01)
    edges = np.linspace(low - pad, high + pad, _BINS + 1)
    figure = _figure(520, 40 + 250 * len(present), theme)
    for index, which in enumerate(present):
        axes = _panel(figure.add_subplot(len(present), 1, index + 1), f"{which.capitalize()} pairs", theme)
        colour = theme.forget if which == "forget" else theme.retain
        tallest = 0.0
        for when, shade, alpha in (("before", theme.neutral, 0.45), ("after", colour, 0.45)):
            if (which, when) not in values:
                continue
            array = values[which, when]
            share = np.histogram(array, edges)[0] / len(array)
            tallest = max(tallest, share.max())
            axes.stairs(share, edges, fill=True, color=shade, alpha=alpha, linewidth=0)
            axes.stairs(np.where(share > 0, share, np.nan), edges, color=shade, linewidth=1.4)  # no line at zero
        for line, (when, shade) in enumerate((("before", theme.muted), ("after", colour))):
            if (which, when) in values:
                _mark_mean(axes, float(values[which, when].mean()), when, shade, edges, tallest, line)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.42 * tallest)
        axes.set_yticks([])
        axes.yaxis.grid(False)
        if index == len(present) - 1:
            axes.set_xlabel("cosine of an image and its caption", color=theme.muted, fontsize=_pt(11))
    return figure


def draw_embeddings(run: ReportData, theme: Theme, moments: Sequence[str] = ("before", "after")) -> Figure | None:
    """A map of the image features: the two main directions of those before, the same axes for those after."""
    maps = project(run)
    moments = [when for when in moments if when in maps]
    if not moments:
        return None
    spread = np.concatenate(list(maps.values()))
    middle = (spread.max(0) + spread.min(0)) / 2
    reach = np.maximum(spread.max(0) - spread.min(0), 1e-3) * 0.54
    forget = np.array([which != "retain" for which in run.embedding_sets])
    labels = np.array([str(label) for label in run.embedding_labels])
    figure = _figure(460 * len(moments), 430, theme)
    for index, when in enumerate(moments):
        axes = _panel(figure.add_subplot(1, len(moments), index + 1), f"Images {when}", theme)
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
        _key(axes, [("forget", theme.forget, True), ("retain", theme.retain, True)], theme)
    return figure


def project(run: ReportData) -> dict[str, np.ndarray]:
    """Float [n, 2] for "before" and, where given, "after": principal components of "before", from a singular
    value decomposition of its centred features; "after" is centred by the same mean. Values that are not
    finite count as 0."""
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


def _figure(width: float, height: float, theme: Theme) -> Figure:
    """Sizes in CSS pixels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.11, h_pad=0.11)  # inches
    return Figure(figsize=(width / 96, height / 96), dpi=192, facecolor=theme.surface, layout=layout)


def _pt(pixels: float) -> float:
    return 0.75 * pixels


def _panel(axes: Axes, title: str, theme: Theme) -> Axes:
    axes.set_facecolor(theme.surface)
    axes.set_title(title, loc="left", fontsize=_pt(13), fontweight="bold", color=theme.ink, pad=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=theme.neutral, linewidth=0.8, zorder=5)
    axes.tick_params(length=0, pad=5, labelsize=_pt(11.5), labelcolor=theme.muted)
    axes.yaxis.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _short_number(value: float, _: object = None) -> str:
    if abs(value) < 1e-12:  # a tick at zero may be off by a rounding
        return "0"
    mantissa, _, exponent = (f"{value:.3e}" if abs(value) < 1e-3 else f"{value:.4g}").partition("e")
    return (f"{float(mantissa):g}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def _plain(name: str, most: int) -> str:
    """One line of text that matplotlib does not read as a formula."""
    name = " ".join(name.split()) or "(no name)"
    name = name if len(name) <= most else name[: most - 1].rstrip() + "…"
    return name.replace("$", r"\$")


def _weight(config: Any, name: str) -> str:
    weight = number(config.get(name))
    return "" if weight is None else f"  ×{weight:g}"


def _curve(axes: Axes, lines: Sequence[Any], key: str, colour: str, smooth: bool) -> None:
    points = [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=colour, fontsize=_pt(11))
        return
    x, y = np.array(points, dtype=np.float64).T
    window = len(y) // 25
    if not smooth or window < 2:
        marker = "o" if len(y) == 1 else ""
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=4, clip_on=not marker)
        return
    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - window // 2, 0)
    stop = np.minimum(np.arange(len(y)) + window // 2 + 1, len(y))
    axes.plot(x, (sums[stop] - sums[first]) / (stop - first), color=colour, linewidth=1.8)


def _validation(axes: Axes, looks: Sequence[Any], result: Any, theme: Theme) -> None:
    known = (result.get("selection") or {}).get("validation") or {}
    for which, colour in (("retain", theme.retain), ("forget", theme.forget)):
        points = [(0.0, number(known.get(f"{which}_before")))]
        points += [(float(line["step"]), number(line["validation"].get(which))) for line in looks]
        known_points = [(step, 100 * score) for step, score in points if score is not None]
        if not known_points:
            continue
        x, y = np.array(known_points).T
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5, markeredgewidth=0, clip_on=False)
        high = y[-1] > 50
        axes.annotate(
            which,
            (x[-1], y[-1]),
            xytext=(0, -7 if high else 7),
            textcoords="offset points",
            ha="right",
            va="top" if high else "bottom",
            color=colour,
            fontsize=_pt(11.5),
            fontweight="bold",
            path_effects=_halo(theme),
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
            fontsize=_pt(11),
        )


def _mark_mean(axes: Axes, mean: float, when: str, colour: str, edges: np.ndarray, tallest: float, line: int) -> None:
    height = (1.3 - 0.17 * line) * tallest
    axes.plot([mean, mean], [0, height], color=colour, linewidth=1.2)
    left = mean > (edges[0] + edges[-1]) / 2
    axes.annotate(
        f"{when}: mean {signed(mean, 2).lstrip('+')}",
        (mean, height),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=colour,
        fontsize=_pt(11.5),
        fontweight="bold",
    )


def _name_groups(axes: Axes, points: np.ndarray, labels: np.ndarray, forget: np.ndarray, theme: Theme) -> None:
    """Class names at the middle of their points or beside it, where there are few enough to read."""
    names = [name for name in dict.fromkeys(labels.tolist()) if name] if len(labels) == len(points) else []
    if len(names) > MOST_LABELS:
        names = []
    if not names:
        return
    forgets = [bool(forget[labels == name].all()) for name in names]
    heights = [12 if bold else 11 for bold in forgets]  # pixels
    shown = [_plain(name, 16) for name in names]
    low, high = (np.array(ends) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
    scale = np.array(_MAP_ROOM) / (high - low)
    middles = np.array([np.median(points[labels == name], axis=0) for name in names])
    sizes = np.array([(0.6 * tall * len(text) + 4, 1.3 * tall) for text, tall in zip(shown, heights, strict=True)])
    places = moved_apart((middles - low) * scale, sizes, _MAP_ROOM) / scale + low
    for text, bold, tall, middle, place, size in zip(shown, forgets, heights, middles, places, sizes, strict=True):
        colour = theme.forget if bold else theme.ink
        if (np.abs(place - middle) * scale > size / 2).any():
            axes.plot(*zip(middle, place, strict=True), color=colour, linewidth=0.7, zorder=4)
        axes.text(
            float(place[0]),
            float(place[1]),
            text,
            ha="center",
            va="center",
            fontsize=_pt(tall),
            fontweight="bold" if bold else "normal",
            color=colour,
            path_effects=_halo(theme),
            zorder=6 if bold else 5,
        )


def _halo(theme: Theme) -> list[Any]:
    """Keeps text readable on lines and points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground=theme.surface)]


def _key(axes: Axes, entries: Sequence[tuple[str, str, bool]], theme: Theme) -> None:
    """Name the marks in one line above the panel, right of its title."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=5.5,
            markeredgewidth=0 if filled else 1.5,
            markeredgecolor=colour,
            markerfacecolor=colour if filled else theme.surface,
        )
        for _, colour, filled in entries
    ]
    axes.legend(
        marks,
        [text for text, _, _ in entries],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(marks),
        frameon=False,
        fontsize=_pt(11.5),
        labelcolor=theme.muted,
        handletextpad=0.1,
        columnspacing=0.9,
        borderaxespad=0.6,
        borderpad=0.2,
    )
