"""The source `csv`: caption tables with a line for each pair."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cliperase_fast.data.classes import derive_classes
from cliperase_fast.data.images import FileStore
from cliperase_fast.data.intake import Intake, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import read_lines, user_path

_SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}
_QUOTES = ("double", "none")

Row = tuple[str, tuple[str, ...], int]  # image, captions, line


def open_csv(
    path: str,
    name: str,
    intake: Intake,
    *,
    sep: str = "tab",
    img: str = "filepath",
    caption: str = "title",
    root: str | None = None,
    quotes: str = "double",
) -> PairDataset:
    """Open a table with a column of image paths and one of captions.

    The defaults are open_clip's. Rows with the same path are one image with several captions, as is a cell with a list
    of texts in Python or JSON notation.
    root: the folder that relative paths start from, by default the table's. quotes: "double" if texts may be in double
    quotes, "none" if quotes are part of the text.
    """
    file = user_path(path)
    separator = _SEPARATORS.get(sep, sep)
    if len(separator) != 1 or separator in '"\r\n':
        raise InputError(f"sep={sep!r} must be one character, or tab")
    if quotes not in _QUOTES:
        raise InputError(f"quotes={quotes!r} is not one of {', '.join(_QUOTES)}")
    folder = file.parent if root is None else user_path(root)
    if root is not None and not folder.is_dir():
        raise InputError(f"root={root!r} is not a directory; name the one that the paths in {file} start from")
    rows = read_table(file, separator, (img, caption), intake, quoted=quotes == "double")
    captions = group_rows(
        caption_rows(((cells[0], cells[1], line) for line, cells in rows), file, intake), file, intake
    )
    labels, space = derive_classes(list(captions.values())) or (None, None)
    remedy = "; paths start from the table's folder: add '?root=DIR' to the source if the images are elsewhere"
    store = FileStore(
        [_local_path(image, folder) for image in captions], os.path.realpath(file), remedy if root is None else ""
    )
    return PairDataset(name, store, list(captions.values()), list(captions), labels=labels, space=space, intake=intake)


def _local_path(image: str, folder: Path) -> str:
    """Return the path in a cell: relative to `folder`, with "~", as a file: URL, or with Windows separators."""
    if image.lower().startswith("file://"):
        image = unquote(image[len("file://") :].removeprefix("localhost"))
    path = os.path.join(folder, os.path.expanduser(image))
    if "\\" in image and os.sep != "\\" and not os.path.exists(path):
        other = os.path.join(folder, image.replace("\\", "/"))
        return other if os.path.exists(other) else path
    return path


def read_table(
    file: Path, separator: str, columns: Sequence[str], intake: Intake, *, quoted: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, the cells of `columns`) of each row below the header; report rows that do not fit the header."""
    lines = read_lines(file)
    first = next(lines, "")  # of an empty file too
    hinted = re.fullmatch(r'"?sep=."?\s*', first, flags=re.IGNORECASE) is not None  # as Excel writes it
    lines = lines if hinted else chain([first], lines)
    if quoted:
        reader = csv.reader(lines, delimiter=separator, strict=True)
    else:
        reader = csv.reader(lines, delimiter=separator, strict=True, quoting=csv.QUOTE_NONE)
    header: list[str] | None = None
    at: list[int] = []
    line = 1 + hinted
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{file} line {line}: {_quoting_fault(reader.line_num + hinted > line, error)}") from error
        if row is None:
            break
        started, line = line, reader.line_num + hinted + 1
        if any(_may_be_rows(cell.strip(), separator) for cell in row):
            raise InputError(f"{file} line {started}: {_quoting_fault(True, None)}")
        row = [" ".join(cell.split()) if "\n" in cell or "\r" in cell else cell for cell in row]
        if header is None:
            header = [cell.strip() for cell in row]
            at = _find_columns(header, columns, file, separator)
        elif len(row) > 1 or (row and row[0].strip()):  # not a blank line
            cells = _fitted(row, header, at, file, started, separator, intake)
            if cells is not None:
                yield started, cells
    if header is None:
        _find_columns([], columns, file, separator)


def _may_be_rows(text: str, separator: str) -> bool:
    """Return whether a quoted text may contain rows of the table, because of a quote that is not closed."""
    return separator in text and ("\n" in text or "\r" in text)


def _quoting_fault(several_lines: bool, error: csv.Error | None) -> str:
    if error is not None and "field limit" in str(error):
        return f"a cell is longer than {csv.field_size_limit()} characters; is a quote not closed?"
    what = "quoted text over several lines; is a quote not closed?" if several_lines else f"bad quotes ({error});"
    return (
        f"{what} double the quotes inside quoted text, put each text that contains the separator on one line, or add "
        "'?quotes=none' to the source if all quotes are part of texts"
    )


def _find_columns(header: list[str], columns: Sequence[str], file: Path, separator: str) -> list[int]:
    for column in columns:
        if column not in header:
            raise InputError(f"{file} has no column {column!r}; it has {_listed(header)}{_csv_hint(header, separator)}")
        if header.count(column) > 1:
            raise InputError(f"{file} has {header.count(column)} columns {column!r}; rename all but one")
    return [header.index(column) for column in columns]


def _listed(header: list[str]) -> str:
    shown = [repr(column if len(column) <= 40 else column[:40] + "...") for column in header[:20]]
    return ", ".join(shown) + (" ..." if len(header) > 20 else "") or "none"


def _csv_hint(header: list[str], separator: str) -> str:
    if header and header[0].startswith(("{", "[")):
        return "; this is JSON; write its images and captions as a table with a line for each caption"
    other = next((sign for sign in (",", ";", "\t", "|") if sign != separator and sign in "".join(header)), None)
    if len(header) == 1 and other:
        named = "tab" if other == "\t" else other
        return f"; columns seem to have another separator: add '?sep={named}' to the source"
    return "; its first line must name the columns; name those to read with '?img=COLUMN&caption=COLUMN' after the file"


def _fitted(
    row: list[str], header: list[str], at: list[int], file: Path, line: int, separator: str, intake: Intake
) -> list[str] | None:
    cells = [cell.strip() for cell in row]
    while len(cells) > len(header) and not cells[-1]:
        cells.pop()  # separators at the end of a line
    where = f"{file} line {line}"
    sign = "tab" if separator == "\t" else repr(separator)
    if len(cells) > len(header):
        intake.fault(
            "row with too many cells",
            f"{where} has {len(cells)} cells and the header has {len(header)}; put texts that contain a {sign} into "
            "double quotes, or use another separator ('?sep=')",
        )
        return None
    if len(cells) < len(header):
        no_caption = f" has no caption for {cells[at[0]]}:" if at[0] < len(cells) <= at[-1] else ""
        intake.fault(
            "row with too few cells",
            f"{where}{no_caption} has {len(cells)} cells and the header has {len(header)}; complete or remove the line",
        )
        return None
    return [cells[column] for column in at]


def caption_rows(rows: Iterable[tuple[str, str, int]], file: Path, intake: Intake) -> Iterator[Row]:
    """Yield rows with the captions of a cell: its text, or the texts of a list."""
    for image, cell, line in rows:
        where = f"{file} line {line}"
        texts = _listed_captions(cell, where, intake)
        if texts is not None:
            yield image, texts, line


def _listed_captions(cell: str, where: str, intake: Intake) -> tuple[str, ...] | None:
    if not (cell.startswith("[") and cell.endswith("]")):
        return (cell,)
    content = _parsed_list(cell)
    if content is None:
        return (cell,)
    if _has_joined_texts(cell):
        intake.fault(
            "list of captions without commas",
            f"{where} holds a list of texts without commas, as numpy prints it; write it with commas",
        )
        return None
    fault = "is empty" if not content else next((found[1] for text in content if (found := caption_fault(text))), None)
    if fault is not None:
        intake.fault("list with an unusable caption", f"{where} holds a list in which a caption {fault}; correct it")
        return None
    return tuple(text.strip() for text in content)


def _parsed_list(cell: str) -> list[Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            content = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(content, list):
            return content
    return None


def _has_joined_texts(cell: str) -> bool:
    """Return whether two quoted texts follow each other without a comma; Python would join them."""
    try:
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
    except (tokenize.TokenError, SyntaxError):  # JSON that is not Python
        return False
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))


_REMOTE = re.compile(r"(?!file://)[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def group_rows(rows: Iterable[Row], file: Path, intake: Intake) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image, in order; repetitions are dropped and counted."""
    captions: dict[str, dict[str, None]] = {}
    count = 0
    for image, texts, line in rows:
        count += 1
        where = f"{file} line {line}"
        if not image:
            intake.fault("row without an image", f"{where} names no image; complete or remove the line")
            continue
        if _REMOTE.match(image):
            intake.fault(
                "image is not a local file", f"{where} names {image[:80]}, which is not a local file; download it"
            )
            continue
        for text in texts:
            fault = caption_fault(text)
            if fault is not None:
                said = "has no caption" if not text else f"has a caption that {fault[1]},"
                intake.fault(fault[0], f"{where} {said} for {image}; complete or remove the line")
            elif text in captions.get(image, ()):
                intake.ignored.add("repeated row", where)
            else:
                captions.setdefault(image, {})[text] = None
    if count == 0 and not len(intake.skipped):
        raise InputError(f"{file} has no rows")
    intake.require_some(len(captions), str(file), "has no row that can be used")
    return {image: tuple(texts) for image, texts in captions.items()}


def _open(request: Request) -> Source:
    pairs = open_csv(request.path, request.name, request.intake, **request.options)
    return Source(request.name, request.prompted(pairs), None)


SOURCE = SourceType(
    "csv:FILE",
    "a table, tab-separated with columns filepath and title by default, as open_clip reads it",
    _open,
    (
        Option("sep", "the separator, such as a comma (tab)"),
        Option("img", "the column of image paths (filepath)"),
        Option("caption", "the column of captions (title)"),
        Option("root", "the folder that paths are relative to (the table's)"),
        Option("quotes", "none if quotes are part of the text (double)"),
    ),
)
