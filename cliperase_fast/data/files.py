"""Sources made of image files: class folders, caption tables, Flickr30k."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.data.classes import ClassSpace, derive_classes, readable
from cliperase_fast.data.images import FileStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def open_folder(path: str, name: str, templates: Sequence[str]) -> tuple[PairDataset, PairDataset | None]:
    """DIR/CLASS/**/*.jpg, or DIR/train/CLASS/... with DIR/test (else DIR/val) beside it."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a directory: 'folder:' needs one that holds a folder of images for each class")
    train_root, test_root = root, None
    if (root / "train").is_dir() and _subfolders(
        root / "train"
    ):  # a class called "train" would hold images, not folders
        train_root = root / "train"
        test_root = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    folders = _subfolders(train_root)
    if not folders:
        raise InputError(f"{train_root} has no folders: put the images of each class into {train_root}/CLASS/")
    classes = [readable(folder) for folder in folders]
    if len(set(classes)) < len(classes):
        double = next(name for name in classes if classes.count(name) > 1)
        raise InputError(f"two folders in {train_root} stand for the class {double!r}: rename one")
    space = ClassSpace.from_templates(classes, templates)
    train = _class_folders(train_root, root, f"{name} train" if test_root else name, folders, space)
    counts = np.bincount(train.labels, minlength=len(folders))  # type: ignore[arg-type]
    if not counts.all():
        empty = folders[int(np.argmin(counts))]
        raise InputError(f"{train_root / empty} holds no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove it")
    if test_root is None:
        return train, None
    unknown = [folder for folder in _subfolders(test_root) if folder not in folders]
    if unknown:
        raise InputError(f"{test_root} has the class {unknown[0]!r}, which {train_root} has not")
    test = _class_folders(test_root, root, f"{name} {test_root.name}", folders, space)
    if len(test) == 0:
        raise InputError(f"{test_root} holds no images: fill or remove it")
    return train, test


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(part: Path, root: Path, name: str, folders: list[str], space: ClassSpace) -> PairDataset:
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = [
            Path(parent, file)
            for parent, _, files in os.walk(part / folder, followlinks=True)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        ]
        paths.extend(sorted(found))
        labels.extend([label] * len(found))
    return PairDataset(
        name,
        FileStore([str(path) for path in paths], os.path.realpath(root)),
        [space.prompts[label] for label in labels],
        [path.relative_to(root).as_posix() for path in paths],
        labels=np.array(labels, dtype=np.int64),
        space=space,
    )


_SEPARATORS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}


def open_csv(path: str, name: str, *, sep: str = "tab", img: str = "filepath", caption: str = "title") -> PairDataset:
    """A table with a column of image paths (relative ones count from the table's folder) and one of captions.

    The defaults are open_clip's. Rows with the same path are one image with several captions.
    """
    file = Path(path).expanduser()
    separator = _SEPARATORS.get(sep, sep)
    if len(separator) != 1:
        raise InputError(f"sep={sep!r} must be one character, or tab")
    with_lines: list[tuple[str, str, int]] = []
    reader = csv.reader(_lines(file), delimiter=separator)
    try:
        header = next(reader, [])
        for column in (img, caption):
            if column not in header:
                raise InputError(
                    f"{file} has no column {column!r}; it has {_columns(header)}{_csv_hint(header, separator)}"
                )
        at = header.index(img), header.index(caption)
        for row in reader:
            if any("\n" in cell for cell in row):
                raise InputError(
                    f"{file} line {reader.line_num}: quoted text over several lines; is a quote not closed?"
                )
            if row:
                cells = [row[column].strip() if column < len(row) else "" for column in at]
                with_lines.append((cells[0], cells[1], reader.line_num))
    except csv.Error as error:
        raise InputError(f"{file} line {reader.line_num} is not a valid table row: {error}") from error
    captions = _grouped(with_lines, file)
    labels, space = derive_classes(list(captions.values())) or (None, None)
    store = FileStore([os.path.join(file.parent, image) for image in captions], os.path.realpath(file))
    return PairDataset(name, store, list(captions.values()), list(captions), labels=labels, space=space)


def _columns(header: list[str]) -> str:
    return ", ".join(repr(column) for column in header) or "none"


def _csv_hint(header: list[str], separator: str) -> str:
    other = next((sign for sign in (",", ";", "\t", "|") if sign != separator and sign in "".join(header)), None)
    if len(header) == 1 and other:
        named = "tab" if other == "\t" else other
        return f"; columns seem to be separated otherwise: add '?sep={named}' to the source"
    return "; name its columns with '?img=COLUMN&caption=COLUMN' after the file"


def _lines(file: Path) -> list[str]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            return stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"not UTF-8 text ({error})"
        raise InputError(f"cannot read {file}: {reason}") from error


def _grouped(rows: Iterable[tuple[str, str, int]], file: Path) -> dict[str, tuple[str, ...]]:
    """Captions of each image from (image, caption, line) rows, in order and without repetitions."""
    captions: dict[str, dict[str, None]] = {}
    for image, caption, line in rows:
        if not image:
            raise InputError(f"{file} line {line} names no image: complete or remove the line")
        if not caption:
            raise InputError(f"{file} line {line} has no caption for {image}: complete or remove the line")
        captions.setdefault(image, {})[caption] = None
    if not captions:
        raise InputError(f"{file} has no rows")
    return {image: tuple(texts) for image, texts in captions.items()}


def open_flickr30k(path: str, name: str) -> tuple[PairDataset, PairDataset | None]:
    """DIR with Karpathy's dataset_flickr30k.json (preferred: it has splits) or results.csv, and images."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(
            f"{root} is not a directory: 'flickr30k:' needs one with results.csv or dataset_flickr30k.json"
        )
    places = [root, root / "flickr30k_images", root / "flickr30k-images"]
    for place in places:
        if (place / "dataset_flickr30k.json").is_file():
            return _karpathy(place / "dataset_flickr30k.json", root, name)
    for place in places:
        if (place / "results.csv").is_file():
            return _flickr_pairs(_results_csv(place / "results.csv"), root, name), None
    raise InputError(f"there is neither dataset_flickr30k.json nor results.csv in {root}")


def _results_csv(file: Path) -> dict[str, tuple[str, ...]]:
    """Rows of "image_name| comment_number| comment", spaces anywhere; quotes are part of captions."""
    rows: list[tuple[str, str, int]] = []
    for line, text in enumerate(_lines(file), start=1):
        cells = [cell.strip() for cell in text.split("|", 2)]
        if cells == [""] or (line == 1 and cells[0] == "image_name"):
            continue
        if len(cells) == 2:
            # The published file lacks a separator once: "2199200615.jpg| 4   A dog runs across the grass ."
            number_and_caption = re.fullmatch(r"(\d+)\s+(.+)", cells[1])
            cells = [cells[0], *number_and_caption.groups()] if number_and_caption else cells
        if len(cells) != 3:
            raise InputError(f"{file} line {line} is not 'image_name| comment_number| comment': {text.strip()[:80]!r}")
        rows.append((cells[0], cells[2], line))
    return _grouped(rows, file)


def _karpathy(file: Path, root: Path, name: str) -> tuple[PairDataset, PairDataset | None]:
    """Splits train and restval are for training, test for testing; val is left alone."""
    try:
        images = json.loads("".join(_lines(file)))["images"]
        parts: dict[str, dict[str, tuple[str, ...]]] = {"train": {}, "test": {}}
        for image in images:
            part = {"train": "train", "restval": "train", "test": "test"}.get(image["split"])
            if part is not None:
                parts[part][image["filename"]] = _sentences(image, file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file} is not Karpathy's format (images[].filename, .split, .sentences[].raw): "
            f"{type(error).__name__}: {error}"
        ) from error
    if not parts["train"]:
        raise InputError(f"{file} has no images in the split 'train'")
    train = _flickr_pairs(parts["train"], root, f"{name} train")
    return train, _flickr_pairs(parts["test"], root, f"{name} test") if parts["test"] else None


def _sentences(image: dict[str, Any], file: Path) -> tuple[str, ...]:
    texts = tuple(sentence["raw"].strip() for sentence in image["sentences"])
    if not texts or not all(texts):
        raise InputError(f"{file} has an empty caption or none for {image['filename']}")
    return texts


def _flickr_pairs(captions: dict[str, tuple[str, ...]], root: Path, name: str) -> PairDataset:
    inner = "flickr30k_images"
    folders = [root / inner / inner, root / inner, root / "flickr30k-images", root / "images", root]
    # One image may be missing, which is for the check of all images to say; the first few cannot all be.
    probes = list(captions)[:100]
    folder = next((folder for folder in folders if any((folder / image).is_file() for image in probes)), None)
    if folder is None:
        raise InputError(f"the images of {name} are neither in {root / inner} nor in {root} (looked for {probes[0]})")
    store = FileStore([str(folder / image) for image in captions], os.path.realpath(root))
    return PairDataset(name, store, list(captions.values()), list(captions))
