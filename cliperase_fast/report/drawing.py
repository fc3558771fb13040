"""What the figures share: themes, panels, curves, labels and PNG files.

matplotlib's objects only, without pyplot: no global state and no window.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cliperase_fast.reading import display_width
from cliperase_fast.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Theme:
    """The colours of a figure. Vermilion and blue differ under every kind of colour blindness (Okabe and Ito)."""

    surface: str
    ink: str
    muted: str
    grid: str
    neutral: str  # what was before
    forget: str
    retain: str


LIGHT = Theme("#ffffff", "#1d2330", "#667085", "#e7e9ee", "#a3abb8", "#c8481a", "#0b6cb0")
DARK = Theme("#181b22", "#e8eaf0", "#98a2b3", "#2b303b", "#727c8c", "#ff8a57", "#58b0f0")


class Drawing(NamedTuple):
    """A drawn figure. png: the file. width, height: in CSS pixels. places: where its axes are."""

    png: bytes
    width: int
    height: int
    places: Sequence[Any]


def draw_figure(figure: Figure, places: Sequence[Any] | None = None) -> Drawing:
    """Draw a figure.

    places: of its axes, from the same figure in another theme; finding them takes half the time of drawing.
    """
    if places is not None:
        figure.set_layout_engine("none")
        for axes, place in zip(figure.axes, places, strict=True):
            axes.set_position(place)
    file = png(figure)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Drawing(file, width, height, [axes.get_position(original=True) for axes in figure.axes])


def png(figure: Figure) -> bytes:
    """Encode a figure as a PNG file: two pixels for each CSS pixel, 128 colours (a third of the size, invisibly)."""
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


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """Create a figure; sizes in CSS pixels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.11, h_pad=0.11)  # inches
    return Figure(figsize=(width / 96, height / 96), dpi=192, facecolor=theme.surface, layout=layout)


def font_size(pixels: float) -> float:
    """Convert CSS pixels to points, matplotlib's unit of font sizes."""
    return 0.75 * pixels


def panel(axes: Axes, title: str, theme: Theme) -> Axes:
    axes.set_facecolor(theme.surface)
    axes.set_title(title, loc="left", fontsize=font_size(13), fontweight="bold", color=theme.ink, pad=9)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=theme.neutral, linewidth=0.8, zorder=5)
    axes.tick_params(length=0, pad=5, labelsize=font_size(11.5), labelcolor=theme.muted)
    axes.yaxis.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def short_number(value: float, _: object = None) -> str:
    if abs(value) < 1e-12:  # a tick at zero may be off by a rounding
        return "0"
    mantissa, _, exponent = (f"{value:.3e}" if abs(value) < 1e-3 else f"{value:.4g}").partition("e")
    return (f"{float(mantissa):g}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def plain(name: str, most: int) -> str:
    """Return one line, as wide as at most `most` characters, that matplotlib does not read as a formula."""
    name = " ".join(name.split()) or "(no name)"
    if display_width(name) > most:
        name = name[: 4 * most]  # marks have no width
        while display_width(name) > most - 1:
            name = name[:-1]
        name = name.rstrip() + "…"
    return name.replace("$", r"\$")


def draw_curve(axes: Axes, lines: Sequence[Any], key: str, colour: str, smooth: bool) -> None:
    points = [(line["step"], value) for line in lines if (value := number(line.get(key))) is not None]
    if not points:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=colour, fontsize=font_size(11))
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


def halo(theme: Theme) -> list[Any]:
    """Return path effects that keep text readable on lines and points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground=theme.surface)]


@dataclass(frozen=True)
class Mark:
    """How a point is drawn. colour: of the theme, by name. shape: matplotlib's marker."""

    name: str
    colour: str
    filled: bool = True
    shape: str = "o"

    def draw(self, axes: Axes, x: float, y: float, theme: Theme, colour: str | None = None) -> None:
        """Draw a point, in another colour if one is given."""
        axes.plot([x], [y], **self._style(theme, colour), zorder=4 if self.filled else 3)

    def entry(self, theme: Theme) -> Line2D:
        """The mark for a legend."""
        from matplotlib.lines import Line2D

        return Line2D([], [], **self._style(theme, None))

    def _style(self, theme: Theme, colour: str | None) -> dict[str, Any]:
        shade = colour or getattr(theme, self.colour)
        return {
            "linestyle": "",
            "marker": self.shape,
            "markersize": 6 if self.shape == "o" else 5,
            "markeredgewidth": 0 if self.filled else 1.5,
            "markeredgecolor": shade,
            "markerfacecolor": shade if self.filled else theme.surface,
        }


@dataclass(frozen=True)
class Level:
    """How a value to compare others with is drawn: a line across the panel. colour: of the theme, by name."""

    name: str
    colour: str
    style: Any

    def draw(self, axes: Axes, x: float, theme: Theme) -> None:
        """Draw an upright line."""
        axes.axvline(x, color=getattr(theme, self.colour), linewidth=1.3, linestyle=self.style, zorder=2)

    def entry(self, theme: Theme) -> Line2D:
        """The line for a legend."""
        from matplotlib.lines import Line2D

        return Line2D([], [], color=getattr(theme, self.colour), linewidth=1.3, linestyle=self.style)


BACKGROUND_LEVEL = Level("background", "muted", (0, (1.2, 1.6)))
ORACLE_LEVEL = Level("oracles", "ink", (0, (5, 2)))
TARGET_LEVEL = Level("target", "muted", (0, (4, 1.5, 1, 1.5)))
BEFORE = Mark("before", "neutral", filled=False)
AFTER = Mark("after", "muted")
ORACLE = Mark("oracles", "ink", shape="D")


def name_marks(axes: Axes, marks: Sequence[Mark | Level], theme: Theme) -> None:
    """Write a legend in one line above the panel, right of its title."""
    lines = any(isinstance(mark, Level) for mark in marks)
    axes.legend(
        [mark.entry(theme) for mark in marks],
        [mark.name for mark in marks],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(marks),
        frameon=False,
        fontsize=font_size(11.5),
        labelcolor=theme.muted,
        handletextpad=0.5 if lines else 0.1,
        handlelength=1.6 if lines else 2.0,
        columnspacing=0.9,
        borderaxespad=0.6,
        borderpad=0.2,
    )


def name_rows(axes: Axes, names: Sequence[tuple[str, bool]], theme: Theme) -> None:
    """Name the rows at the heights n, ..., 1 on the left. names: (text, whether it is about what is forgotten)."""
    axes.xaxis.grid(True, color=theme.grid, linewidth=0.8)
    axes.yaxis.grid(False)
    axes.set_yticks(range(len(names), 0, -1), [name for name, _ in names])
    for label, (_, forgets) in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=theme.forget if forgets else theme.ink, fontweight="bold" if forgets else "normal")


_PASSES = 300  # two boxes need one, a crowd some dozens


def move_apart(centres: np.ndarray, sizes: np.ndarray, room: tuple[float, float]) -> np.ndarray:
    """Move boxes with `centres` [n, 2] and `sizes` [n, 2] apart until none covers another; return their centres.

    Boxes stay between (0, 0) and `room` as far as they fit. The result is deterministic.
    """
    placed = np.array(centres, dtype=np.float64)
    least, most = sizes / 2, np.asarray(room) - sizes / 2
    for _ in range(_PASSES):
        placed = np.clip(placed, np.minimum(least, most), np.maximum(least, most))
        covers = False
        for one in range(len(placed)):
            for other in range(one + 1, len(placed)):
                gap = placed[other] - placed[one]
                covered = (sizes[one] + sizes[other]) / 2 - np.abs(gap)
                if (covered > 0).all():
                    covers = True
                    axis = 0 if covered[0] < covered[1] else 1  # the shorter way out
                    push = (covered[axis] / 2 + 0.05) * (1.0 if gap[axis] >= 0 else -1.0)
                    placed[one, axis] -= push
                    placed[other, axis] += push
        if not covers:
            break
    return placed


def name_points(
    axes: Axes,
    points: np.ndarray,
    names: Sequence[str],
    forgets: Sequence[bool],
    room: tuple[float, float],
    theme: Theme,
    *,
    below: float = 0.0,
) -> None:
    """Write names at points [n, 2] or beside them, with a line to the point, so that no name covers another.

    forgets: which names are about what is forgotten. room: the size of the axes, about, in CSS pixels. below: how far
    under its point a name stands where it can.
    """
    heights = [12 if bold else 11 for bold in forgets]  # pixels
    low, high = (np.array(ends) for ends in zip(axes.get_xlim(), axes.get_ylim(), strict=True))
    scale = np.array(room) / (high - low)
    widths = [0.6 * tall * display_width(text) + 4 for text, tall in zip(names, heights, strict=True)]
    sizes = np.array([(width, 1.3 * tall) for width, tall in zip(widths, heights, strict=True)])
    wanted = (points - low) * scale - (0.0, below)
    places = move_apart(wanted, sizes, room) / scale + low
    for text, bold, tall, point, place, size in zip(names, forgets, heights, points, places, sizes, strict=True):
        colour = theme.forget if bold else theme.ink
        if (np.abs(place - point) * scale > size / 2 + below).any():
            axes.plot(*zip(point, place, strict=True), color=colour, linewidth=0.7, zorder=4)
        axes.text(
            float(place[0]),
            float(place[1]),
            text,
            ha="center",
            va="center",
            fontsize=font_size(tall),
            fontweight="bold" if bold else "normal",
            color=colour,
            path_effects=halo(theme),
            zorder=6 if bold else 5,
        )
