"""A page of small pictures with their captions, to look at pairs before something is done with them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.errors import InputError
from cliperase_fast.report.rendering import Table, render

SIDE = 128  # pixels of a picture
_CAPTION = 120  # characters of a caption that are shown


class Thumbnail(NamedTuple):
    """A small picture as a data URI, empty if the image cannot be read, and the words below it."""

    source: str
    name: str
    caption: str
    note: str = ""


class Group(NamedTuple):
    """Pictures under a heading."""

    heading: str
    text: str
    thumbnails: Sequence[Thumbnail]


def thumbnails(pairs: PairDataset, rows: Sequence[int], notes: Sequence[str] = ()) -> list[Thumbnail]:
    """Return small pictures of these pairs. notes: for each row, a few words such as a score."""
    found = []
    for at, row in enumerate(map(int, rows)):
        caption = pairs.captions[row][0]
        text = caption if isinstance(caption, str) else f"{len(caption)} token ids"
        shown = text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…"
        try:
            source = _data_uri(pairs.image(row))
        except InputError:
            source = ""
        found.append(Thumbnail(source, pairs.ids[row], shown, notes[at] if notes else ""))
    return found


def contact_sheet(
    title: str,
    kind: str,
    facts: Sequence[tuple[str, str]],
    groups: Sequence[Group],
    warnings: Sequence[str] = (),
    tables: Sequence[tuple[str, Table]] = (),
) -> str:
    """Return the page. kind: what sort of page it is, above the title. tables: with their headings."""
    return render(
        "contact_sheet.html", title=title, kind=kind, facts=facts, groups=groups, warnings=warnings, tables=tables,
        side=SIDE,
    )  # fmt: skip


def _data_uri(image: Image.Image | Tensor) -> str:
    picture = _as_picture(image) if isinstance(image, Tensor) else image.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _as_picture(pixels: Tensor) -> Image.Image:  # [3, H, W]
    """Return a picture of an image that is already transformed, its values stretched to what can be shown."""
    values = pixels.detach().cpu().float().nan_to_num()
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp_min(1e-6) * 255
    return Image.fromarray(scaled.round().to(torch.uint8).permute(1, 2, 0).numpy())
