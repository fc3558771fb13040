"""Pairs in the rows of Parquet and Arrow files: images as bytes or paths, captions as texts or lists of them."""

from __future__ import annotations

import io
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cliperase_fast.data.class_files import WORDNET, name_keys, name_numbers
from cliperase_fast.data.classes import DEFAULT_TEMPLATES, ClassSpace, derive_classes, readable
from cliperase_fast.data.decoding import decode
from cliperase_fast.data.images import ImageStore
from cliperase_fast.data.intake import Intake, ItemError, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Option, Request
from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.reading import open_regular, printable, user_path

OPTIONS = (
    Option("img", "the column of images (found by type and name)"),
    Option("caption", "the column of captions (caption, captions, text or title)"),
    Option("label", "the column of classes (found by type and name)"),
    Option("id", "the column of ids (the row's number)"),
    Option("root", "the folder that paths of images are relative to (the file's)"),
    Option("classnames", "a file with the names of the classes"),
)
_IMAGE_NAMES = ("image", "img", "jpg", "png", "image_path", "file_name", "filepath", "filename")
_CAPTION_NAMES = ("caption", "captions", "text", "title")
_LABEL_NAMES = ("label", "labels", "class")
_MOST_NUMBERED = 100_000  # classes that are counted from 0; larger labels are names, such as those of products
_MOST_HELD = 1 << 30  # bytes of row groups that stay in memory


def _pyarrow(module: str) -> Any:
    return import_extra("parquet", "data in Parquet and Arrow files", module)


class ArrowStore(ImageStore):
    """Images in a column of Parquet or Arrow files, read by row.

    Arrow files are mapped into memory. Of Parquet files a row group is read whole; up to `_MOST_HELD` bytes of them
    stay in memory. root: the folder that relative paths start from; None: that of the file.
    """

    def __init__(self, files: Sequence[str], counts: Sequence[int], column: str, root: str | None) -> None:
        self.files, self.column, self.root = list(files), column, root
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # [files + 1]
        self._set_up()

    def _set_up(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[int, Any] = {}  # by file: its column (Arrow), or its ParquetFile and starts of row groups
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()  # the least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("files", "column", "root", "starts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, position: int) -> tuple[int, int]:
        """Return the number of the file and the row in it."""
        number = int(np.searchsorted(self.starts, position, side="right")) - 1
        return number, position - int(self.starts[number])

    def image(self, position: int) -> Image.Image:
        number, row = self._find(position)
        where = f"row {row} of {printable(self.files[number])}"
        with self._lock, _faults_named(self.files[number]):
            value = self._value(number, row)
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if data is not None:
            return decode(io.BytesIO(data), f"the image in {where}")
        if not path:
            raise ItemError(f"{where} has no image; remove the row", "row without an image")
        root = os.path.dirname(self.files[number]) if self.root is None else self.root
        remedy = "; paths start from the file's folder: add '?root=DIR' to the source if the images are elsewhere"
        full = os.path.join(root, os.path.expanduser(path))
        return decode(full, full, remedy if self.root is None else "")

    def _value(self, number: int, row: int) -> Any:
        if number not in self._opened:
            self._opened[number] = _open_column(self.files[number], self.column)
        opened = self._opened[number]
        if not isinstance(opened, tuple):
            return opened[row].as_py()
        parquet, starts = opened
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if (number, group) not in self._groups:
            self._groups[number, group] = parquet.read_row_group(group, columns=[self.column]).column(0)
            while len(self._groups) > 1 and sum(held.nbytes for held in self._groups.values()) > _MOST_HELD:
                self._groups.popitem(last=False)
        self._groups.move_to_end((number, group))
        return self._groups[number, group][row - int(starts[group])].as_py()

    def origin(self, position: int) -> str:
        return os.path.realpath(self.files[self._find(position)[0]])

    def identity(self, position: int) -> Hashable:
        return self.origin(position), self._find(position)[1]


def _open_column(file: str, column: str) -> Any:
    """Return a column of an Arrow file, or (ParquetFile, first row of each row group)."""
    if not _is_parquet(file):
        return _arrow_table(file).column(column)
    parquet = _pyarrow("pyarrow.parquet").ParquetFile(file)
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return parquet, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _arrow_table(file: str) -> Any:
    """Map an Arrow file into memory: a stream, as `datasets` writes it, or the format of Feather."""
    pa = _pyarrow("pyarrow")
    mapped = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def _is_parquet(file: str) -> bool:
    with open_regular(file) as opened:
        start = opened.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{printable(file)} is a pointer of Git LFS, not the data; run 'git lfs pull'")
    return start.startswith(b"PAR1")


@contextmanager
def _faults_named(file: str) -> Iterator[None]:
    """Turn errors of pyarrow and of the disk into an `InputError` with the name of the file."""
    try:
        yield
    except (OSError, _pyarrow("pyarrow").ArrowException, EOFError) as error:
        said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise InputError(
            f"cannot read {printable(file)} as a Parquet or Arrow file: {said}; is it damaged or of another format?"
        ) from error


@dataclass(frozen=True)
class _Columns:
    image: str
    caption: str | None
    label: str | None
    id: str | None
    names: tuple[str, ...] | None  # of the classes, if the data names them

    @property
    def texts(self) -> list[str]:
        """The columns that are read at once."""
        return list(dict.fromkeys(name for name in (self.caption, self.label, self.id) if name is not None))


@dataclass(frozen=True)
class Classes:
    """The classes of a column of labels. numbers: of each value."""

    numbers: Mapping[Any, int]
    space: ClassSpace


def open_tables(
    files: Sequence[str], name: str, request: Request, *, known: Classes | None = None, prefix: str = ""
) -> tuple[PairDataset, Classes | None]:
    """Open the rows of Parquet or Arrow files with the same columns as pairs; return their classes too.

    request: has the options. known: the classes, if another split has defined them. prefix: of the ids that are numbers
    of rows.
    """
    options, intake = request.options, request.intake
    root = options.get("root")
    if root is not None and not user_path(root).is_dir():
        raise InputError(f"root={root!r} is not a directory; name the one that the paths of images start from")
    tables = []
    columns: _Columns | None = None
    for file in files:
        with _faults_named(file):
            if columns is None:
                columns = _find_columns(_schema(file), options, file)
            tables.append(_read_columns(file, columns))
    assert columns is not None
    counts = [count for count, _ in tables]
    rows = {column: [value for _, table in tables for value in table[column]] for column in columns.texts}
    store = ArrowStore(files, counts, columns.image, None if root is None else str(user_path(root)))
    classes = None
    if columns.label is not None:
        classes = known or _classes(columns, rows[columns.label], request, Path(files[0]).parent)
    kept, captions, labels = _usable(columns, rows, sum(counts), classes, name, intake)
    intake.require_some(len(kept), name, "has no row that can be used")
    ids = _ids(rows.get(columns.id or ""), kept, prefix, name)
    of_rows, space = derive_classes(captions) or (None, None)
    if classes is not None:
        of_rows, space = np.array(labels, dtype=np.int64), classes.space
    pairs = PairDataset(
        name, store, captions, ids, labels=of_rows, space=space, positions=np.array(kept, dtype=np.int64),
        intake=intake,
    )  # fmt: skip
    return pairs if columns.label is not None else request.prompted(pairs), classes


def _usable(
    columns: _Columns,
    rows: Mapping[str, list[Any]],
    count: int,
    classes: Classes | None,
    name: str,
    intake: Intake,
) -> tuple[list[int], list[tuple[str, ...]], list[int]]:
    """Return the rows that are used, with their captions, and with their classes if there are some."""
    kept: list[int] = []
    captions: list[tuple[str, ...]] = []
    labels: list[int] = []
    for row in range(count):
        where = f"row {row} of {name}"
        if classes is not None:
            assert columns.label is not None
            value = rows[columns.label][row]
            label = classes.numbers.get(value)
            if label is None:
                intake.fault("row of an unknown class", f"{where} has the class {value!r}; correct or remove it")
                continue
            labels.append(label)
        if columns.caption is not None:
            texts = _texts(rows[columns.caption][row], where, intake)
            if texts is None:
                del labels[len(kept) :]
                continue
        else:
            assert classes is not None
            texts = classes.space.prompts[labels[-1]]
        kept.append(row)
        captions.append(texts)
    return kept, captions, labels


def _schema(file: str) -> Any:
    return _pyarrow("pyarrow.parquet").read_schema(file) if _is_parquet(file) else _arrow_table(file).schema


def _read_columns(file: str, columns: _Columns) -> tuple[int, dict[str, list[Any]]]:
    """Return the number of rows and the values of the columns that are read at once."""
    schema, names = _schema(file), columns.texts
    missing = next((name for name in (columns.image, *names) if name not in schema.names), None)
    if missing is not None:
        raise InputError(
            f"{printable(file)} has no column {missing!r}, which the files before it have; open files of one kind"
        )
    _require_single(schema, (columns.image, *names), file)
    if columns.label is not None:
        _check_label_type(schema.field(columns.label), file)
    if not _is_parquet(file):
        table = _arrow_table(file)
        return table.num_rows, {name: table.column(name).to_pylist() for name in names}
    pq = _pyarrow("pyarrow.parquet")
    table = pq.read_table(file, columns=names, partitioning=None)
    return pq.read_metadata(file).num_rows, {name: table.column(name).to_pylist() for name in names}


def _require_single(schema: Any, names: Sequence[str], file: str) -> None:
    double = next((name for name in names if schema.names.count(name) > 1), None)
    if double is not None:
        raise InputError(f"{printable(file)} has several columns {double!r}; rename all but one")


def _find_columns(schema: Any, options: Mapping[str, str], file: str) -> _Columns:
    known = list(schema.names)
    for option in ("img", "caption", "label", "id"):
        if option in options and options[option] not in known:
            raise InputError(
                f"{printable(file)} has no column {options[option]!r}; it has {', '.join(map(repr, known))}"
            )
    features = _features(schema)
    remedy = f"it has {', '.join(map(repr, known))}; name"
    images = [name for name in known if features.get(name, {}).get("_type") == "Image"]
    image = options.get("img") or _only(images, "images", file) or _first(_IMAGE_NAMES, known)
    if image is None:
        raise InputError(f"{printable(file)} has no column of images; {remedy} one with '?img=COLUMN'")
    caption = options.get("caption") or _first(_CAPTION_NAMES, known)
    label = options.get("label")
    if label is None and caption is None:
        of_classes = [name for name in known if features.get(name, {}).get("_type") == "ClassLabel"]
        label = _only(of_classes, "classes", file, "label") or _first(_LABEL_NAMES, known)
        if label is None:
            raise InputError(
                f"{printable(file)} has neither captions nor classes; {remedy} a column with '?caption=COLUMN' or "
                "'?label=COLUMN'"
            )
    _require_single(schema, (image,), file)
    _check_image_type(schema.field(image), file)
    names = features.get(label or "", {}).get("names")
    return _Columns(image, caption, label, options.get("id"), None if names is None else tuple(map(str, names)))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what `datasets` says about each column; empty if other programs wrote the file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {name: one for name, one in features.items() if isinstance(one, dict)}


def _only(found: list[str], what: str, file: str, option: str = "img") -> str | None:
    if len(found) > 1:
        shown = ", ".join(map(repr, found))
        raise InputError(f"{printable(file)} has several columns of {what} ({shown}); name one with '?{option}=COLUMN'")
    return found[0] if found else None


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for name in names if name in known), None)


def _check_image_type(field: Any, file: str) -> None:
    kinds = _pyarrow("pyarrow.types")

    def holds_bytes(kind: Any) -> bool:
        return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)

    def holds_text(kind: Any) -> bool:
        return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)

    parts = {part.name: part.type for part in field.type} if kinds.is_struct(field.type) else {"": field.type}
    if any(holds_bytes(parts[name]) for name in ("", "bytes") if name in parts):
        return
    if any(holds_text(parts[name]) for name in ("", "path") if name in parts):
        return
    raise InputError(
        f"the column {field.name!r} of {printable(file)} is of type {field.type}; a column of images holds encoded "
        "images as bytes, or paths"
    )


def _check_label_type(field: Any, file: str) -> None:
    kinds = _pyarrow("pyarrow.types")
    if kinds.is_floating(field.type) or kinds.is_nested(field.type):
        raise InputError(
            f"the column {field.name!r} of {printable(file)} is of type {field.type}; a column of classes holds whole "
            "numbers or texts"
        )


def _classes(columns: _Columns, labels: list[Any], request: Request, folder: Path) -> Classes:
    """Return the classes of a column of labels: named by the data, by a file, or by the labels themselves."""
    where, file = f"the column {columns.label!r}", request.options.get("classnames")
    values: list[Any] = [value for value in dict.fromkeys(labels) if value is not None]
    numbered = all(isinstance(value, int) and value < _MOST_NUMBERED for value in values)
    if columns.names is not None:
        values, names = list(range(len(columns.names))), list(columns.names)
    elif numbered:
        values = list(range(max(values, default=-1) + 1))
        names = [str(number) for number in values]
    else:
        values = sorted(values, key=str)
        names = [str(value) for value in values]
    if file is not None and numbered and columns.names is None:
        names = name_numbers(len(names), file, folder, where)
    elif file is not None:
        names = name_keys(names, file, folder, where)
    elif any(WORDNET.fullmatch(name) for name in names):
        raise InputError(
            f"{where} has WordNet ids, which would appear in the captions; name the classes with '?classnames=FILE' "
            "(a line 'n01440764 tench' for each)"
        )
    space = ClassSpace.from_templates([readable(name) for name in names], request.templates or DEFAULT_TEMPLATES)
    return Classes({value: number for number, value in enumerate(values)}, space)


def _texts(value: Any, where: str, intake: Intake) -> tuple[str, ...] | None:
    """Return the captions in a cell; None if it was left out."""
    texts = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None or not texts:
        intake.fault("caption is missing", f"{where} has no caption; complete or remove it")
        return None
    for text in texts:
        fault = caption_fault(text)
        if fault is not None:
            intake.fault(fault[0], f"{where} has a caption that {fault[1]}; correct or remove it")
            return None
    return tuple(dict.fromkeys(text.strip() for text in texts))


def _ids(values: list[Any] | None, kept: list[int], prefix: str, name: str) -> list[str]:
    if values is None:
        return [f"{prefix}{row}" for row in kept]
    ids = [printable(str(values[row])) for row in kept]
    if len(set(ids)) < len(ids):
        double = Counter(ids).most_common(1)[0][0]
        raise InputError(f"the id {double!r} occurs several times in {name}; name another column with '?id=COLUMN'")
    return ids
