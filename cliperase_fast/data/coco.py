"""The source `coco`: captions in COCO's JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cliperase_fast.data.images import FileStore
from cliperase_fast.data.intake import Intake, caption_fault
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable, read_text, user_path

Captions = dict[str, tuple[str, ...]]

_MAX_JSON = 1 << 30
_PROBED = 100  # images that are looked for in each folder
_FORM = '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'


def open_coco(request: Request) -> Source:
    """Open a file of captions, or DIR with annotations/captions_train*.json and maybe captions_val*.json."""
    path = user_path(request.path)
    root = request.options.get("root")
    if root is not None and not user_path(root).is_dir():
        raise InputError(f"root={root!r} is not a directory; name the one that holds the images")
    if not path.is_dir():
        return Source(request.name, request.prompted(_open_file(path, request.name, root, request.intake)), None)
    train, test = _find(path, "train"), _find(path, "val")
    if train is None:
        raise InputError(f"{path} has no annotations/captions_train*.json; name the file of captions, coco:FILE")
    if test is None:
        return Source(request.name, request.prompted(_open_file(train, request.name, root, request.intake)), None)
    pairs = _open_file(train, f"{request.name} train", root, request.intake)
    return Source(request.name, request.prompted(pairs), _open_file(test, f"{request.name} val", root, request.intake))


def _find(folder: Path, split: str) -> Path | None:
    found = sorted({*folder.glob(f"annotations/captions_{split}*.json"), *folder.glob(f"captions_{split}*.json")})
    if len(found) > 1:
        raise InputError(f"{folder} has {found[0].name} and {found[1].name}; name the file to read, coco:FILE")
    return found[0] if found else None


def _open_file(file: Path, name: str, root: str | None, intake: Intake) -> PairDataset:
    captions = _read(file, intake)
    folder = user_path(root) if root is not None else _image_folder(file, list(captions))
    store = FileStore(
        [str(folder / image) for image in captions],
        os.path.realpath(file),
        "" if root is not None else "; add '?root=DIR' to the source if the images are elsewhere",
    )
    return PairDataset(name, store, list(captions.values()), [printable(image) for image in captions], intake=intake)


def _read(file: Path, intake: Intake) -> Captions:
    """Return the captions of each image in the order of the images."""
    try:
        content = json.loads(read_text(file, _MAX_JSON))
        names = _names(content["images"], file, intake)
        found: dict[Any, dict[str, None]] = {number: {} for number in names}
        for annotation in content["annotations"]:
            _take(annotation, names, found, file, intake)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        hint = "; this file has Karpathy's format: use flickr30k:DIR" if "'annotations'" in str(error) else ""
        raise InputError(f"{file} does not have the form {_FORM}: {type(error).__name__}: {error}{hint}") from error
    captions: Captions = {}
    for number, texts in found.items():
        if not texts:
            intake.ignored.add("image without a caption", f"{names[number]} in {file}")
        elif names[number] in captions:
            intake.fault("image named twice", f"{file} names the image {printable(names[number])} twice; keep one")
        else:
            captions[names[number]] = tuple(texts)
    intake.require_some(len(captions), str(file), "has no caption that can be used")
    return captions


def _names(images: Iterable[Mapping[str, Any]], file: Path, intake: Intake) -> dict[Any, str]:
    """Return the file name of each id. An id of several images is left out: its captions could be of any of them."""
    names: dict[Any, str] = {}
    several: dict[Any, str] = {}
    for image in images:
        number, name = image["id"], _file_name(image)
        if names.setdefault(number, name) != name:
            several[number] = name
    for number, name in several.items():
        intake.fault(
            "id of several images",
            f"{file} gives the id {number!r} to {printable(names.pop(number))} and to {printable(name)}; number them "
            "and their captions anew",
        )
    return names


def _take(
    annotation: Mapping[str, Any],
    names: Mapping[Any, str],
    found: dict[Any, dict[str, None]],
    file: Path,
    intake: Intake,
) -> None:
    number = annotation["image_id"]
    if "caption" not in annotation and ("bbox" in annotation or "keypoints" in annotation):
        raise InputError(f"{file} has objects, not captions; use captions_*.json")
    where = f"annotation {annotation.get('id', '?')} in {file}"
    if number not in names:
        intake.fault("caption of an unknown image", f"{where} is of the image {number!r}, which is not listed")
        return
    text = annotation["caption"]
    fault = caption_fault(text)
    if fault is not None:
        intake.fault(fault[0], f"{where} has a caption that {fault[1]}; correct or remove it")
        return
    text = " ".join(text.split())
    if text in found[number]:
        intake.ignored.add("repeated caption", where)
    found[number][text] = None


def _file_name(image: Mapping[str, Any]) -> str:
    name = image["file_name"]
    if not isinstance(name, str) or not name or "\0" in name:
        raise TypeError(f"a file_name is {name!r}")
    return name


def _image_folder(file: Path, images: list[str]) -> Path:
    """Return the folder with most of the first images: that of the split, below the folder of the annotations."""
    above = file.parent.parent if file.parent.name == "annotations" else file.parent
    split = re.fullmatch(r"captions_(.+)", file.stem)
    named = [split.group(1)] if split else []
    inner = [Path(), Path("images"), *(Path(name) for name in named), *(Path("images") / name for name in named)]
    folders = list(dict.fromkeys([*(above / path for path in inner), file.parent]))
    hits = [sum((folder / image).is_file() for image in images[:_PROBED]) for folder in folders]
    if not any(hits):
        shown = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"the images of {file} are in none of {shown} (looked for {printable(images[0])}); "
            "name their folder with '?root=DIR'"
        )
    return folders[hits.index(max(hits))]


SOURCE = SourceType(
    "coco:FILE",
    "captions in COCO's JSON; or the folder with annotations/captions_train2017.json, train2017 and so on",
    open_coco,
    (Option("root", "the folder of the images (found beside the file)"),),
)
