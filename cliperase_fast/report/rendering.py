"""Pages from templates: one file each, with every picture inside."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cliperase_fast.reading import user_path
from cliperase_fast.report.data import ReportData
from cliperase_fast.report.drawing import DARK, LIGHT, Drawing, Theme, draw_figure
from cliperase_fast.storage import write_text_atomically

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

Data = TypeVar("Data")

TEMPLATES = Path(__file__).parent / "templates"
_LETTERS = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+"  # Hebrew, Arabic, Syriac and the like
_RIGHT_TO_LEFT = re.compile(f"({_LETTERS}(?: +{_LETTERS})*)")
_LONG_WORD = 14  # letters that a class name may have in one piece beside the numbers, on a phone


class Cell(NamedTuple):
    """A text with small ones below it: an interval, which a phone leaves out, and a note."""

    text: str
    interval: str = ""
    note: str = ""


class Row(NamedTuple):
    """The cells of a table's row. emphasis: "forget" for rows of what is forgotten, "sum" for what others add up to."""

    cells: Sequence[str | Cell]
    emphasis: str = ""


class Table(NamedTuple):
    """The first `text_columns` columns are texts, the others numbers. A phone leaves out the `minor` columns."""

    columns: Sequence[str]
    rows: Sequence[Row]
    text_columns: int = 1
    minor: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A figure in both themes as data URIs; sizes in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int
    alt: str
    caption: str


def picture(data: Data, draw: Callable[[Data, Theme], Figure | None], alt: str, caption: str) -> Picture | None:
    """Draw a figure of the data in both themes. Returns None where the data has nothing for it."""
    light = draw_light(data, draw)
    figure = draw(data, DARK)
    if light is None or figure is None:
        return None
    dark = draw_figure(figure, light.places)
    return Picture(_image(light), _image(dark), light.width, light.height, alt, caption)


def draw_light(data: Data, draw: Callable[[Data, Theme], Figure | None]) -> Drawing | None:
    """Draw a figure of the data in the light theme, of a run's data once. Returns None where it has nothing for it."""
    known: dict[Any, Drawing | None] = data.drawings if isinstance(data, ReportData) else {}
    if draw not in known:
        figure = draw(data, LIGHT)
        known[draw] = None if figure is None else draw_figure(figure)
    return known[draw]


def _image(drawing: Drawing) -> str:
    return "data:image/png;base64," + base64.b64encode(drawing.png).decode("ascii")


def render(template: str, **variables: Any) -> str:
    """Render a template of `report/templates`. All variables are escaped, and a missing one is an error."""
    return environment().get_template(template).render(light=LIGHT, dark=DARK, **variables)


def write_page(text: str, path: str | Path) -> Path:
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text)
    return path


@functools.cache
def environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["breakable"] = _breakable
    found.filters["isolated"] = _isolated
    return found


def _breakable(name: str) -> Any:
    """Escape a name. Lines break at spaces, and in a word too long for a phone after each "_" and "/"."""
    from markupsafe import Markup

    words = (_pieces(word) if len(word) > _LONG_WORD else [word] for word in str(name).split(" "))
    return Markup(" ").join(Markup("<wbr>").join(pieces) for pieces in words)


def _isolated(text: Any) -> Any:
    """Escape a text. Words from right to left do not change the order of what stands around them."""
    from markupsafe import Markup

    parts = _RIGHT_TO_LEFT.split(str(text))  # every second one is such words
    return Markup("").join(Markup("<bdi>{}</bdi>").format(part) if at % 2 else part for at, part in enumerate(parts))


def _pieces(word: str) -> list[str]:
    """Split a word into pieces of at most `_LONG_WORD` letters, after each "_" and "/" and wherever one is longer."""
    parts = re.findall(r"[^_/]*[_/]|[^_/]+", word)
    return [part[at : at + _LONG_WORD] for part in parts for at in range(0, len(part), _LONG_WORD)]
