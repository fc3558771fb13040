"""Opening data by name: `demo`, `shapes`, `cifar100:DIR`, `csv:FILE` and so on."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from cliperase_fast.data import cifar, shapes
from cliperase_fast.data.checks import split
from cliperase_fast.data.classes import DEFAULT_TEMPLATES, ClassSpace, check_templates, readable
from cliperase_fast.data.flickr import open_flickr30k
from cliperase_fast.data.folders import open_folder
from cliperase_fast.data.images import ArrayStore
from cliperase_fast.data.intake import Intake
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.shards import open_shards
from cliperase_fast.data.tables import open_csv
from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable, user_path


@dataclass
class Source:
    """What a name opens: training pairs, and test pairs where the data has a split of its own."""

    name: str
    train: PairDataset
    test: PairDataset | None


@dataclass(frozen=True)
class _Request:
    spec: str
    path: str
    options: Mapping[str, str]
    templates: tuple[str, ...] | None
    seed: int
    intake: Intake

    @property
    def name(self) -> str:
        return printable(self.spec)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "a handwritten {}",
    "the number {}",
    "a scan of a handwritten {}",
)


def _demo(request: _Request) -> Source:
    """scikit-learn's handwritten digits, 8 x 8; always the same fifth of them is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], from values 0 to 16
    labels = digits.target.astype(np.int64)
    space = ClassSpace.from_templates(DIGITS, request.templates or DIGIT_TEMPLATES)
    everything = PairDataset(
        request.spec,
        ArrayStore(np.repeat(pixels[:, :, :, None], 3, axis=3), "demo"),
        [space.prompts[label] for label in labels],
        [f"digit/{number}" for number in range(len(labels))],
        labels=labels,
        space=space,
    )
    train, test = (everything.subset(indices) for indices in split(everything, 0.2, seed=0))
    train.name, test.name = f"{request.spec} train", f"{request.spec} test"
    return Source(request.spec, train, test)


def _shapes(request: _Request) -> Source:
    """Rendered shapes, 10 colours x 10 kinds; options train and test (images per class), size, seed."""
    number = {"train": 100, "test": 20, "size": 32, "seed": request.seed}
    for key, text in request.options.items():
        if not text.isdigit() or (key != "seed" and int(text) < 1) or (key == "size" and int(text) < 16):
            least = {"seed": 0, "size": 16}.get(key, 1)
            raise InputError(f"{request.spec!r}: {key}={text!r} must be a whole number of at least {least}")
        number[key] = int(text)
    space = ClassSpace.from_templates(shapes.CLASSES, request.templates or ("a {}",))
    parts = []
    for part, split_name in enumerate(("train", "test")):
        count = number[split_name]
        pixels, labels = shapes.render_split(count, number["size"], number["seed"], part)
        origin = f"shapes/{number['size']}px-seed{number['seed']}/{split_name}"
        parts.append(
            PairDataset(
                f"{request.spec} {split_name}",
                ArrayStore(pixels, origin),
                [space.prompts[label] for label in labels],
                [f"{origin}/{space.names[label]}/{index % count}" for index, label in enumerate(labels)],
                labels=labels,
                space=space,
            )
        )
    return Source(request.spec, *parts)


def _cifar(request: _Request, layout: cifar.Layout) -> Source:
    folder = cifar.find_folder(user_path(request.path), layout)
    names = [readable(name) for name in cifar.class_names(folder, layout)]
    space = ClassSpace.from_templates(names, request.templates or DEFAULT_TEMPLATES)
    parts = []
    for split_name, files in (("train", layout.train), ("test", layout.test)):
        pixels, labels = cifar.read_batches(folder, files, layout, len(names))
        parts.append(
            PairDataset(
                f"{request.name} {split_name}",
                ArrayStore(pixels, f"{os.path.realpath(folder)}/{split_name}"),
                [space.prompts[label] for label in labels],
                [f"{split_name}/{index}" for index in range(len(labels))],
                labels=labels,
                space=space,
            )
        )
    return Source(request.name, *parts)


def _folder(request: _Request) -> Source:
    templates = request.templates or DEFAULT_TEMPLATES
    return Source(request.name, *open_folder(request.path, request.name, templates, request.intake, **request.options))


def _csv(request: _Request) -> Source:
    pairs = open_csv(request.path, request.name, request.intake, **request.options)
    return Source(request.name, _prompted(pairs, request), None)


def _flickr30k(request: _Request) -> Source:
    train, test = open_flickr30k(request.path, request.name, request.intake)
    return Source(request.name, _prompted(train, request), test)


def _wds(request: _Request) -> Source:
    pairs = open_shards(request.path, request.name, request.intake)
    return Source(request.name, _prompted(pairs, request), None)


def _prompted(pairs: PairDataset, request: _Request) -> PairDataset:
    """Data with captions of its own keeps them; templates only replace what stands for a class."""
    if request.templates is None:
        return pairs
    if pairs.space is None:
        raise InputError(f"{pairs.name} has no classes for the templates to name: leave the templates out")
    pairs.space = ClassSpace.from_templates(pairs.space.names, request.templates)
    return pairs


@dataclass(frozen=True)
class _Kind:
    usage: str
    open: Callable[[_Request], Source]
    options: tuple[str, ...] = ()

    @property
    def needs_path(self) -> bool:
        return ":" in self.usage


_KINDS = {
    "demo": _Kind("demo", _demo),
    "shapes": _Kind("shapes", _shapes, ("train", "test", "size", "seed")),
    "cifar10": _Kind("cifar10:DIR", lambda request: _cifar(request, cifar.CIFAR10)),
    "cifar100": _Kind("cifar100:DIR", lambda request: _cifar(request, cifar.CIFAR100)),
    "folder": _Kind("folder:DIR", _folder, ("classnames",)),
    "csv": _Kind("csv:FILE", _csv, ("sep", "img", "caption", "root", "quotes")),
    "flickr30k": _Kind("flickr30k:DIR", _flickr30k),
    "wds": _Kind("wds:SHARDS", _wds),
}


def open_source(
    spec: str, *, templates: Sequence[str] | str | None = None, seed: int = 0, on_error: str = "raise"
) -> Source:
    """Open a source by name. `InputError` says what is missing or malformed, and where.

    demo            scikit-learn's handwritten digits, classes zero to nine
    shapes          rendered shapes, classes "red circle" and so on; options ?train=100&test=20 (images per
    class),
                    &size=32 (pixels), &seed=0 (default: `seed`)
    cifar10:DIR     the python version, unpacked; DIR may be the folder above. Likewise cifar100:DIR (fine
    labels)
    folder:DIR      DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg with DIR/test or DIR/val; option ?classnames=FILE
    csv:FILE        a table, by default tab-separated with columns filepath and title;
                    options ?sep=,&img=COLUMN&caption=COLUMN&root=DIR&quotes=none (%26 for '&')
    flickr30k:DIR   dataset_flickr30k.json, flickr_annotations_30k.csv, results.csv, captions.txt or a .token file;
                    images in DIR/flickr30k_images, DIR/Images or DIR
    wds:SHARDS      local webdataset shards with braces; jpg, png, webp ... + txt

    docs/data.md shows the layouts.

    templates: caption templates with "{}" for the class name. Where the data has classes but no captions they
    make the captions; where captions come with the data they only make the prompts of zero-shot
    classification.
    on_error: "raise" refuses the first item that cannot be used, "skip" leaves such items out and counts them in the
    `intake` of the pairs.
    """
    if "\0" in spec:
        raise InputError(f"the source {spec!r} holds a NUL character, which no path can")
    match = re.fullmatch(r"([^:?]*)(:?)(.*)", spec, flags=re.DOTALL)
    assert match is not None
    kind, colon, rest = match.groups()
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1)
        hint = f"did you mean {_KINDS[near[0]].usage!r}? " if near else _path_hint(spec)
        raise InputError(
            f"unknown source {spec!r}; {hint}There are {', '.join(known.usage for known in _KINDS.values())}"
        )
    found = _KINDS[kind]
    path, options = _options(rest, found, spec) if found.options else (rest, {})
    if found.needs_path != bool(path) or found.needs_path != bool(colon):
        raise InputError(f"{spec!r} is not a source: write {found.usage}")
    request = _Request(spec, path, options, check_templates(templates), seed, Intake(on_error))
    try:
        return found.open(request)
    except OSError as error:  # a folder without permission, a name that is too long, a disk that fails
        where = "" if error.filename is None else f": {printable(os.fsdecode(error.filename))[:200]}"
        raise InputError(f"cannot open {request.name[:200]!r}: {error.strerror or error}{where}") from error


def _path_hint(spec: str) -> str:
    """What a path without a kind before it may be."""
    file = spec.partition("?")[0].lower()
    if file.endswith(".tar"):
        kind = "wds"
    elif file.endswith((".csv", ".tsv", ".txt")):
        kind = "csv"
    else:
        kind = "folder" if os.path.isdir(os.path.expanduser(spec)) else ""
    return f"did you mean '{kind}:{printable(spec)}'? " if kind else ""


def _options(rest: str, kind: _Kind, spec: str) -> tuple[str, dict[str, str]]:
    """Split "path?key=value&key=value"; a '?' that no such list follows belongs to the path."""
    match = re.search(r"\?((?:\w+=[^&]*)(?:&\w+=[^&]*)*)$", rest)
    if match is None:
        return rest, {}
    options = {}
    for item in match.group(1).split("&"):
        key, _, value = item.partition("=")
        if key not in kind.options:
            raise InputError(f"unknown option {key!r} in {spec!r}; there are {', '.join(kind.options)}")
        options[key] = unquote(value)
    return rest[: match.start()], options
