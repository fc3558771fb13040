"""The source `folder`: class folders DIR/CLASS/**/*.jpg, with or without splits."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cliperase_fast.data.class_files import WORDNET, read_names
from cliperase_fast.data.classes import DEFAULT_TEMPLATES, ClassSpace, readable
from cliperase_fast.data.decoding import image_suffixes, is_other_image
from cliperase_fast.data.images import FileStore
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import has_surrogates, printable, user_path

_SYSTEM = frozenset({"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db"})
# Names of split folders, the preferred one first.
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")
_OF_RUN = ("config.json", "metrics.jsonl")  # files of a run directory, whose plots are not images of a class
_SHOWN = ".jpg, .png, .webp or another format that Pillow reads"


def is_system_file(name: str) -> bool:
    """Return whether a file or folder belongs to the system rather than to the data."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def open_folder(
    path: str, name: str, templates: Sequence[str], intake: Intake, *, classnames: str | None = None
) -> tuple[PairDataset, PairDataset | None]:
    """Open DIR/CLASS/**/*.jpg, or DIR/train/CLASS/... with DIR/test (else DIR/val), in any case.

    classnames: a file that names the class of each folder, see `class_files.read_names`; by default the folder's own
        name is used.
    """
    root = user_path(path)
    if not root.is_dir():
        raise InputError(f"{root} is not a directory; 'folder:' needs one with a folder of images for each class")
    train_root, test_root = _find_splits(root, intake)
    folders = _class_folders(train_root, intake)
    if not folders:
        raise InputError(f"{train_root} has no folders; put the images of each class into {train_root}/CLASS/")
    names = _named(folders, train_root, None if classnames is None else read_names(classnames, root))
    found = [_find_images(train_root / folder, intake) for folder in folders]
    for folder in [folder for folder, images in zip(folders, found, strict=True) if not images]:
        intake.fault(
            "class folder without images", f"{train_root / folder} holds no images ({_SHOWN}); fill or remove it"
        )
    kept = [number for number, images in enumerate(found) if images]
    intake.require_some(len(kept), str(train_root), "has no images")
    folders, found = [folders[number] for number in kept], [found[number] for number in kept]
    space = ClassSpace.from_templates([names[number] for number in kept], templates)
    train = _pairs(found, root, f"{name} train" if test_root else name, space, intake)
    if test_root is None:
        return train, None
    unknown = [folder for folder in _class_folders(test_root, intake) if folder not in folders]
    for folder in unknown:
        intake.fault(
            "test class that is not trained on",
            f"{test_root} has the class {printable(folder)!r}, which {train_root} does not have; rename or remove it",
        )
    tested = [_find_images(test_root / folder, intake) if (test_root / folder).is_dir() else [] for folder in folders]
    if not any(tested):
        raise InputError(f"{test_root} holds no images; fill or remove it")
    return train, _pairs(tested, root, f"{name} {test_root.name}", space, intake)


def _find_splits(root: Path, intake: Intake) -> tuple[Path, Path | None]:
    # A class called "train" would hold images, not folders.
    there = {name.casefold(): name for name in _class_folders(root, Intake())}
    train = next(
        (there[name] for name in _TRAIN if name in there and _class_folders(root / there[name], Intake())), None
    )
    test = next((there[name] for name in _TEST if name in there), None)
    if train is None:
        _refuse_other_levels(root, there)
        return root, None
    for entry in _entries(root):
        if entry.name not in (train, test):
            intake.ignored.add("beside the splits that are used", entry.path)
    return root / train, None if test is None else root / test


def _refuse_other_levels(root: Path, there: Mapping[str, str]) -> None:
    """Raise `InputError` if the class folders are one level deeper, so that other folders would become the classes."""
    if there and set(there) <= {*_TRAIN, *_TEST}:
        split = next((name for name in there.values() if _holds_folders_only(root / name)), None)
        if split is not None:
            raise InputError(
                f"{root} holds the split {split!r} but none called 'train', so the splits would become the classes; "
                f"name the folder with the class folders, folder:{printable(str(root / split))}"
            )
    if len(there) == 1 and _holds_folders_only(only := root / next(iter(there.values()))):
        raise InputError(
            f"{root} holds the single folder {printable(only.name)!r}, which holds folders; name the folder with the "
            f"class folders, folder:{printable(str(only))}"
        )


def _holds_folders_only(folder: Path) -> bool:
    """Return whether a folder has several folders and no images in it."""
    entries = [entry for entry in _entries(folder) if not is_system_file(entry.name)]
    images = any(os.path.splitext(entry.name)[1].lower() in image_suffixes() for entry in entries)
    return not images and sum(_is_folder(entry) for entry in entries) > 1


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot list the folder {printable(str(folder))}: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder. A link that cannot be followed is a file: reading it says what is wrong."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _holds_run(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in _OF_RUN)


def _class_folders(folder: Path, intake: Intake) -> list[str]:
    """Return the names of the class folders, sorted; count everything else beside them."""
    names = []
    for entry in _entries(folder):
        if is_system_file(entry.name):
            intake.ignored.add("hidden or system file", entry.path)
        elif _is_folder(entry):
            if _holds_run(entry.path):
                intake.ignored.add("run directory", entry.path)
            else:
                names.append(entry.name)
        else:
            intake.ignored.add("file outside of the class folders", entry.path)
    return names


def _named(folders: list[str], root: Path, known: dict[str, str] | None) -> list[str]:
    """Return the class name of each folder; raise `InputError` for empty, unreadable or duplicate names."""
    names = []
    for folder in folders:
        if known is not None and folder not in known:
            raise InputError(f"the file of class names has no line for the folder {printable(folder)!r} in {root}")
        name = readable(folder if known is None else known[folder])
        shown = printable(folder)
        if has_surrogates(name):
            encoding = sys.getfilesystemencoding()
            if encoding == "utf-8":
                raise InputError(f"the name of the folder {shown!r} in {root} is not UTF-8; rename it")
            raise InputError(
                f"the name of the folder {shown!r} in {root} cannot be read as {encoding}, the encoding of the locale; "
                "set PYTHONUTF8=1, or a locale with UTF-8"
            )
        if not name:
            raise InputError(f"the folder {shown!r} in {root} has no class name; rename it")
        if known is None and WORDNET.fullmatch(folder):
            raise InputError(
                f"the folder {shown!r} in {root} is a WordNet id, which would appear in the captions; name the classes "
                "with '?classnames=FILE' after the folder (a line 'n01440764 tench' for each)"
            )
        names.append(name)
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise InputError(f"two folders in {root} stand for the class {double!r}; rename one")
    return names


def _find_images(folder: Path, intake: Intake) -> list[Path]:
    """Return the images in a class folder and below, sorted; count everything else.

    Each directory is read once, and links to parent folders are not followed.
    """
    resolved = folder.resolve()
    seen = {_identity(parent) for parent in (resolved, *resolved.parents)}
    found: list[Path] = []
    todo = [str(folder)]
    while todo:
        for entry in _entries(todo.pop()):
            suffix = os.path.splitext(entry.name)[1].lower()
            if is_system_file(entry.name):
                intake.ignored.add("hidden or system file", entry.path)
            elif _is_folder(entry):
                identity = _identity(entry.path)
                if identity in seen:
                    intake.ignored.add("link to a folder that is read already", entry.path)
                elif _holds_run(entry.path):
                    intake.ignored.add("run directory", entry.path)
                else:
                    seen.add(identity)
                    todo.append(entry.path)
            elif suffix in image_suffixes():
                found.append(Path(entry.path))
            elif is_other_image(suffix):
                intake.fault(
                    f"{suffix} images are not read",
                    f"{printable(entry.path)} is an image that Pillow does not read here; convert it to .png or .jpg",
                )
            else:
                intake.ignored.add(f"not an image by its suffix ({suffix or 'none'})", entry.path)
    return sorted(found)


def _identity(path: Path | str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"cannot read the folder {printable(str(path))}: {error.strerror or error}") from error
    return status.st_dev, status.st_ino


def _pairs(found: list[list[Path]], root: Path, name: str, space: ClassSpace, intake: Intake) -> PairDataset:
    paths = [path for images in found for path in images]
    labels = np.repeat(np.arange(len(found)), [len(images) for images in found])
    return PairDataset(
        name,
        FileStore([str(path) for path in paths], os.path.realpath(root)),
        [space.prompts[label] for label in labels],
        [printable(path.relative_to(root).as_posix()) for path in paths],
        labels=labels.astype(np.int64),
        space=space,
        intake=intake,
    )


def _open(request: Request) -> Source:
    templates = request.templates or DEFAULT_TEMPLATES
    return Source(request.name, *open_folder(request.path, request.name, templates, request.intake, **request.options))


SOURCE = SourceType(
    "folder:DIR",
    "a folder of images per class (ImageFolder): DIR/CLASS, or DIR/train/CLASS with DIR/test or DIR/val",
    _open,
    (Option("classnames", "a file with the names of the classes"),),
)
