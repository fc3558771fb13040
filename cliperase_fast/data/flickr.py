"""The source `flickr30k`: Flickr30k or Flickr8k, with captions from any of the published files."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cliperase_fast.data.decoding import image_suffixes
from cliperase_fast.data.folders import is_system_file
from cliperase_fast.data.images import FileStore
from cliperase_fast.data.intake import Intake, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Request, Source, SourceType
from cliperase_fast.data.tables import Row, caption_rows, group_rows, read_table
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable, read_lines, read_text, user_path

Captions = dict[str, tuple[str, ...]]
Parts = tuple[Captions, Captions | None]  # for training and for testing

# Folders of the images, below DIR.
_FOLDERS = (
    "flickr30k_images/flickr30k_images", "flickr30k_images", "flickr30k-images", "Flickr30k_images", "Images", "images",
    "Flicker8k_Dataset", "Flickr8k_Dataset",
)  # fmt: skip
_PARTS = {"train": "train", "restval": "train", "test": "test", "val": None}
_MAX_JSON = 1 << 30


def open_flickr30k(path: str, name: str, intake: Intake) -> tuple[PairDataset, PairDataset | None]:
    """Open DIR with the first of the caption files below and images in DIR or one of its folders."""
    root = user_path(path)
    if not root.is_dir():
        raise InputError(
            f"{root} is not a directory; 'flickr30k:' needs one with results.csv or dataset_flickr30k.json"
        )
    found = _caption_files(root)
    if not found:
        raise InputError(
            f"{root} has neither dataset_flickr30k.json nor results.csv, nor flickr_annotations_30k.csv, captions.txt, "
            "a .token file or Karpathy's dataset_coco.json; use csv:FILE for other captions"
        )
    (file, read), *others = found
    for other, _ in others:
        intake.ignored.add("caption file that is not used", str(other))
    train, test = read(file, intake)
    folder = _image_folder(root, [*train, *(test or ())], name)
    _count_others(folder, {*train, *(test or ())}, intake)
    if test is None:
        return _pairs(train, folder, root, name, intake), None
    return _pairs(train, folder, root, f"{name} train", intake), _pairs(test, folder, root, f"{name} test", intake)


def _caption_files(root: Path) -> list[tuple[Path, Callable[[Path, Intake], Parts]]]:
    """Return each caption file with its reader, the preferred one first: those with splits."""
    places = [root, *(root / folder for folder in _FOLDERS)]
    found: list[tuple[Path, Callable[[Path, Intake], Parts]]] = []
    for pattern, read in _READERS.items():
        for place in places:
            files = [file for file in sorted(place.glob(pattern)) if "lemma" not in file.name and file.is_file()]
            found.extend((file, read) for file in files if not any(file.samefile(other) for other, _ in found))
    return found


def _count_others(folder: Path, known: set[str], intake: Intake) -> None:
    with os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries):
            suffix = os.path.splitext(name)[1].lower()
            if name not in known and suffix in image_suffixes() and not is_system_file(name):
                intake.ignored.add("image without a caption for training or testing", str(folder / name))


def _delimited(file: Path, intake: Intake) -> Parts:
    """Read lines "image_name| comment_number| comment" or "image,caption", with any spaces, with or without a header.

    The caption is all that follows the last expected separator, so it may contain more of them. With commas a caption
    may be in double quotes; with bars quotes are part of it.
    """

    def rows() -> Iterator[Row]:
        sign, cells_wanted = "|", 3
        for line, text in enumerate(read_lines(file), start=1):
            if line == 1:
                sign = "|" if "|" in text else ","
                cells_wanted = 3 if re.match(rf"[^{sign}]*[{sign}]\s*(comment_number|\d)\s*[{sign}]", text) else 2
            cells = [cell.strip() for cell in text.split(sign, cells_wanted - 1)]
            if cells == [""] or (line == 1 and cells[0] in ("image_name", "image")):
                continue
            if cells_wanted == 3 and len(cells) == 2:
                # The published file lacks a separator once: "2199200615.jpg| 4   A dog runs across the grass ."
                number_and_caption = re.fullmatch(r"(\d+)\s+(.+)", cells[1])
                cells = [cells[0], *number_and_caption.groups()] if number_and_caption else cells
            if len(cells) != cells_wanted:
                form = "'image_name| comment_number| comment'" if cells_wanted == 3 else f"'image{sign}caption'"
                said = f"{file} line {line} is not {form}: {text.strip()[:80]!r}; correct or remove it"
                intake.fault("line of another form", said)
                continue
            caption = _unquoted(cells[-1]) if sign == "," else cells[-1]
            yield cells[0], (caption,), line

    return group_rows(rows(), file, intake), None


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        (cells,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError):
        return text  # a caption that starts with a quotation
    return cells[0].strip() if len(cells) == 1 else text


def _tokens(file: Path, intake: Intake) -> Parts:
    """Read lines "1000092795.jpg#0<tab>caption"."""

    def rows() -> Iterator[Row]:
        for line, text in enumerate(read_lines(file), start=1):
            match = re.fullmatch(r"\s*([^\t#]+)#\d+\t(.*)", text.rstrip("\r\n"))
            if match:
                yield match[1].strip(), (match[2].strip(),), line
            elif text.strip():
                said = (
                    f"{file} line {line} is not 'image.jpg#0<tab>caption': {text.strip()[:80]!r}; correct or remove it"
                )
                intake.fault("line of another form", said)

    return group_rows(rows(), file, intake), None


def _annotations(file: Path, intake: Intake) -> Parts:
    """Read a table with columns filename, raw (a list of captions) and split."""
    parts: dict[str, list[tuple[str, str, int]]] = {"train": [], "test": []}
    for line, (image, texts, split) in read_table(file, ",", ("filename", "raw", "split"), intake):
        part = _part(split, f"{file} line {line}", intake)
        if part is not None:
            parts[part].append((image, texts, line))
    train, test = (
        group_rows(caption_rows(rows, file, intake), file, intake) if rows else {} for rows in parts.values()
    )
    return _checked(train, test, file)


def _karpathy(file: Path, intake: Intake) -> Parts:
    """Read Karpathy's JSON: splits train and restval are for training, test is for testing, val is not used."""
    try:
        images = json.loads(read_text(file, _MAX_JSON))["images"]
        parts: dict[str, Captions] = {"train": {}, "test": {}}
        for image in images:
            name = str(image["filename"]) if "split" in image and "filename" in image else "?"
            part = _part(image["split"], f"{file}, image {printable(name)},", intake)
            texts = None if part is None else _sentences(image, file, intake)
            if part is None or texts is None:
                continue
            name = _file_name(image)
            if name in parts["train"] or name in parts["test"]:
                intake.fault("image named twice", f"{file} names the image {printable(name)} twice; keep one")
                continue
            parts[part][name] = texts
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file} is not Karpathy's format (images[].filename, .split, .sentences[].raw): "
            f"{type(error).__name__}: {error}"
        ) from error
    return _checked(parts["train"], parts["test"], file)


def _file_name(image: dict[str, Any]) -> str:
    """Return the path below the folder of images; COCO's file has the subfolder in a field of its own."""
    folder = image.get("filepath", "")
    if not isinstance(folder, str) or "\0" in folder:
        raise TypeError(f"a filepath is {folder!r}")
    return os.path.join(folder, image["filename"])


def _part(split: Any, where: str, intake: Intake) -> str | None:
    if split not in _PARTS:
        intake.fault(
            "image of an unknown split",
            f"{where} has the split {split!r}, which is not one of {', '.join(_PARTS)}; correct it",
        )
        return None
    if _PARTS[split] is None:
        intake.ignored.add("image of the split 'val', which is not used", where)
    return _PARTS[split]


def _checked(train: Captions, test: Captions, file: Path) -> Parts:
    if not train:
        raise InputError(f"{file} has no images in the split 'train'")
    return train, test or None


def _sentences(image: dict[str, Any], file: Path, intake: Intake) -> tuple[str, ...] | None:
    name = image["filename"]
    if not isinstance(name, str) or "\0" in name:
        raise TypeError(f"a filename is {name!r}")
    texts = tuple(sentence["raw"].strip() for sentence in image["sentences"])
    fault = next((found for text in texts if (found := caption_fault(text))), None)
    if not texts or fault is not None:
        reason = "empty caption" if fault is None else fault[0]
        kind = "an empty caption or none" if reason == "empty caption" else f"an unusable caption ({reason})"
        intake.fault(reason, f"{file} has {kind} for {printable(name)}; correct or remove the image")
        return None
    return texts


# Readers by file name, the preferred one first.
_READERS: dict[str, Callable[[Path, Intake], Parts]] = {
    "dataset_flickr*.json": _karpathy,
    "dataset_coco.json": _karpathy,
    "flickr_annotations_*.csv": _annotations,
    "results.csv": _delimited,
    "captions.txt": _delimited,
    "*.token": _tokens,
    "*.token.txt": _tokens,
}


def _image_folder(root: Path, images: list[str], name: str) -> Path:
    # A single missing image is reported when all images are checked; here the first hundred tell the folder.
    probes = images[:100]
    folders = [*(root / folder for folder in _FOLDERS), root]
    hits = [sum((folder / image).is_file() for image in probes) for folder in folders]
    if not any(hits):
        raise InputError(
            f"the images of {name} are neither in {root / 'flickr30k_images'} nor in {root} (looked for {probes[0]}, "
            f"also in {', '.join(_FOLDERS[2:])})"
        )
    return folders[hits.index(max(hits))]


def _pairs(captions: Captions, folder: Path, root: Path, name: str, intake: Intake) -> PairDataset:
    store = FileStore([str(folder / image) for image in captions], os.path.realpath(root))
    return PairDataset(name, store, list(captions.values()), [printable(image) for image in captions], intake=intake)


def _open(request: Request) -> Source:
    train, test = open_flickr30k(request.path, request.name, request.intake)
    return Source(request.name, request.prompted(train), test)


SOURCE = SourceType(
    "flickr30k:DIR",
    "Karpathy's dataset_flickr30k.json, flickr_annotations_30k.csv, results.csv, captions.txt or a .token file",
    _open,
)
