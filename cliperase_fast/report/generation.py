"""Pictures of a text-to-image pipeline before and after unlearning: the table for terminals, and the page."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from cliperase_fast.evaluation.generation import FORGET, Generation, Painted
from cliperase_fast.evaluation.metrics import SHARE
from cliperase_fast.report.rendering import Cell, Row, Table, render, write_page
from cliperase_fast.report.wording import interval, percent, signed
from cliperase_fast.storage import writing

_SIDE = 160  # pixels of a picture at most
_PAIRS, _PROMPTS = 8, 12  # of a prompt and of a group at most
_SMALL = 64  # pictures up to this side are kept exactly
_MEANINGS = (
    ("As asked", "share of pictures in which the judge sees what the prompt asks for"),
    ("Concept", "share of pictures in which it sees any class of the concept"),
    ("Change", "percentage points, of the pictures with the same prompt and seed"),
    ("Lost, gained", "pictures that showed what was asked only before, and only after"),
    ("Same pixels", "pictures that did not change at all"),
)


class _Pair(NamedTuple):
    """Two pictures as data URIs, and what the judge sees. state: "lost", "gained" or "" """

    before: str
    after: str
    seen: str
    state: str


class _Prompt(NamedTuple):
    text: str
    asked: str
    pairs: Sequence[_Pair]


class _Group(NamedTuple):
    heading: str
    text: str
    prompts: Sequence[_Prompt]


def generation_text(content: Mapping[str, Any]) -> str:
    """Return the scores as a table for a terminal. content: of a `Generation`."""
    head = ["", "pictures", "as asked", "", "change", "the concept", ""]
    rows = [
        [
            name, str(of["pictures"]),
            percent(of["asked"]["before"]["value"]), f"> {percent(of['asked']['after']['value'])}",
            _points(of["asked"]["change"]["value"]).replace("−", "-"),
            percent(of["concept"]["before"]["value"]), f"> {percent(of['concept']['after']['value'])}",
        ]
        for name, of in content["groups"].items()
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    forms = [f"<{widths[0]}", *(f">{width}" for width in widths[1:])]
    lines = ["  ".join(map(format, row, forms)) for row in (head, *rows)]
    notes = ["", *content["notes"]] if content["notes"] else []
    return "\n".join([_summary(content), "", *(line.rstrip() for line in lines), *notes])


def save_generation_page(found: Generation, path: str | Path, title: str = "Pictures before and after") -> Path:
    """Write the scores and pictures as a page, one file with everything inside."""
    with writing(path):
        return write_page(generation_page(found, title), path)


def generation_page(found: Generation, title: str = "Pictures before and after") -> str:
    """Return that page."""
    content = found.content
    small = max(found.painted[0].before.shape[-2:]) <= _SMALL
    facts = [
        ("concept", ", ".join(content["concept"])),
        ("judge", f"{content['judge']}, {content['classes']} classes"),
        ("seeds", ", ".join(map(str, content["seeds"]))),
        *((name, str(value)) for name, value in content["options"].items()),
    ]
    return render(
        "generation.html", title=title, summary=_summary(content), table=_table(content), meanings=_MEANINGS,
        notes=content["notes"], groups=[_group(name, of) for name, of in _grouped(found.painted)], facts=facts,
        small=small,
    )  # fmt: skip


def _summary(content: Mapping[str, Any]) -> str:
    shown = content["groups"][FORGET]["concept"]
    before, after = (percent(shown[when]["value"]) for when in ("before", "after"))
    same = content["groups"][FORGET]
    if same["identical"] == same["pictures"]:
        return f"No picture of the concept changed: {before} show it, before and after."
    return f"Of the pictures whose prompt asks for the concept, {before} showed it before and {after} show it after."


def _table(content: Mapping[str, Any]) -> Table:
    columns = ["prompts", "pictures", "as asked", "after", "change", "lost, gained", "concept", "after", "same pixels"]
    rows = [
        Row(
            [
                name, str(of["pictures"]), *_cells(of["asked"]), f"{of['asked']['lost']}, {of['asked']['gained']}",
                *_cells(of["concept"])[:2], str(of["identical"]),
            ],
            "forget" if name == FORGET else "",
        )
        for name, of in content["groups"].items()
    ]  # fmt: skip
    return Table(columns, rows, minor=(1, 5, 8))


def _cells(found: Mapping[str, Mapping[str, float | None]]) -> list[Cell]:
    shares = [Cell(percent(found[when]["value"]), _interval(found[when])) for when in ("before", "after")]
    return [*shares, Cell(_points(found["change"]["value"]), _interval(found["change"]))]


def _interval(of: Mapping[str, float | None]) -> str:
    return interval(of["low"], of["high"], SHARE)


def _points(change: float | None) -> str:
    return signed(None if change is None else 100 * change, 1)


def _grouped(painted: Sequence[Painted]) -> list[tuple[str, list[Painted]]]:
    return [(name, list(of)) for name, of in itertools.groupby(painted, key=lambda one: one.group)]


def _group(name: str, painted: Sequence[Painted]) -> _Group:
    shown = painted[:_PROMPTS]
    text = f"{len(shown)} of {len(painted)} prompts, and the first {min(_PAIRS, len(painted[0].before))} of the "
    text += f"{len(painted[0].before)} seeds of each. Above before, below after."
    heading = "Prompts that ask for the concept" if name == FORGET else name
    return _Group(heading, text, [_Prompt(one.prompt, one.asked, _pairs(one)) for one in shown])


def _pairs(one: Painted) -> list[_Pair]:
    found = []
    for at in range(min(_PAIRS, len(one.before))):
        seen = (one.seen_before[at], one.seen_after[at])
        hit = [name == one.asked for name in seen]
        state = "" if hit[0] == hit[1] else "lost" if hit[0] else "gained"
        words = "hidden" if one.blocked[at] else seen[0] if seen[0] == seen[1] else " → ".join(seen)
        found.append(_Pair(_data_uri(one.before[at]), _data_uri(one.after[at]), words, state))
    return found


def _data_uri(pixels: Tensor) -> str:  # uint8 [3, H, W]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    exact = max(picture.size) <= _SMALL
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG" if exact else "JPEG", **({} if exact else {"quality": 85}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")
