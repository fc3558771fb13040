"""The sources `hf` and `parquet`: folders of Hugging Face `datasets`, and Parquet files."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cliperase_fast.data.arrow_tables import OPTIONS, open_tables
from cliperase_fast.data.folders import is_system_file
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable, read_text, user_path

_STATE, _SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk
_LARGEST = 16 << 20  # bytes of these files
# Words in the names of files and folders that name a split, as `datasets` reads them.
_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "dev", "val"),
}
_TEST = ("test", "validation")  # the split to measure on, the preferred one first


def open_hugging_face(request: Request) -> Source:
    """Open a folder that `save_to_disk` wrote, or one with Parquet or Arrow files, such as a repository of the hub."""
    root = user_path(request.path)
    if not root.is_dir():
        raise InputError(f"{root} is not a directory; 'hf:' needs a folder of a data set, or use parquet:FILES")
    splits = _splits(root)
    shown = ", ".join(map(repr, splits))
    wanted = request.options.get("split")
    if wanted is not None and wanted not in splits:
        raise InputError(f"split={wanted!r} is not in {root}, which has {shown}")
    train = wanted or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if train is None:
        raise InputError(f"{root} has no split 'train' but {shown}; name the one to use with '?split=NAME'")
    test = None if wanted else next((split for split in _TEST if split in splits and split != train), None)
    for split in splits.keys() - {train, test}:
        request.intake.ignored.add("split that is not used", f"{split} of {root}")
    name = request.name if test is None else f"{request.name} {train}"
    pairs, classes = open_tables(splits[train], name, request, prefix="" if test is None else f"{train}/")
    if test is None:
        return Source(request.name, pairs, None)
    others, _ = open_tables(splits[test], f"{request.name} {test}", request, known=classes, prefix=f"{test}/")
    return Source(request.name, pairs, others)


def open_parquet(request: Request) -> Source:
    """Open Parquet files, named by one path or by a pattern with `*`, as one set of pairs."""
    path = str(user_path(request.path))
    files = [path] if os.path.isfile(path) else sorted(file for file in glob.glob(path) if os.path.isfile(file))
    if not files:
        hint = f"; for a folder use hf:{path}" if os.path.isdir(path) else ""
        raise InputError(f"{path} names no file{hint}; a pattern such as '/data/train-*.parquet' names several")
    return Source(request.name, open_tables(files, request.name, request)[0], None)


def _splits(root: Path) -> dict[str, list[str]]:
    """Return the files of each split."""
    if (root / _SPLITS).is_file():
        names = _json(root / _SPLITS).get("splits")
        if not isinstance(names, list) or not names or not all(_is_plain(name) for name in names):
            raise InputError(f"{root / _SPLITS} lists no splits; save the data set again with save_to_disk")
        return {name: _saved_files(root / name) for name in names}
    if (root / _STATE).is_file():
        return {"train": _saved_files(root)}
    found: dict[str, list[str]] = {}
    for file in _data_files(root):
        found.setdefault(_split_of(file.relative_to(root)), []).append(str(file))
    if not found:
        raise InputError(
            f"{root} holds no data set: neither {_STATE} nor {_SPLITS} (of save_to_disk), nor .parquet or .arrow files"
        )
    return found


def _saved_files(folder: Path) -> list[str]:
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise InputError(f"{folder} holds a selection of an old version of datasets; load it and save it again")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / _STATE} lists no files; save the data set again with save_to_disk") from error
    if not names or not all(_is_plain(name) for name in names):
        raise InputError(f"{folder / _STATE} lists files outside of its folder; save the data set again")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{folder / _STATE} names the file {missing!r}, which is missing; copy it into {folder}")
    return [str(folder / name) for name in names]


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_text(path, _LARGEST))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; save the data set again with save_to_disk")
    return content


def _data_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_system_file(name))
        for name in sorted(names):
            if name.endswith((".parquet", ".arrow")) and not name.startswith((".", "cache-")):
                yield Path(folder) / name


def _split_of(path: Path) -> str:
    """Return the split that a file's name or, failing that, one of its folders names; "train" without such a word."""
    for part in reversed(path.parts):
        words = re.findall(r"[a-z]+", printable(part).lower())
        split = next((split for split, names in _WORDS.items() if set(words) & set(names)), None)
        if split is not None:
            return split
    return "train"


HUGGING_FACE = SourceType(
    "hf:DIR",
    "a data set of Hugging Face: a folder from save_to_disk, or one with .parquet or .arrow files",
    open_hugging_face,
    (Option("split", "the split to use (train, and test or validation for measuring)"), *OPTIONS),
)
PARQUET = SourceType(
    "parquet:FILES", "Parquet files with images as bytes: '/data/train-*.parquet'", open_parquet, OPTIONS
)
