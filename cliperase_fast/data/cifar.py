"""The sources `cifar10` and `cifar100`: the published pickles, read without running code from them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.data.classes import DEFAULT_TEMPLATES, ClassSpace, readable
from cliperase_fast.data.images import ArrayStore
from cliperase_fast.data.pairs import PairDataset
from cliperase_fast.data.source_types import Request, Source, SourceType
from cliperase_fast.errors import InputError
from cliperase_fast.reading import in_bytes, open_regular, user_path


@dataclass(frozen=True)
class Layout:
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names: str
    labels: str
    archive: str


_LAYOUT_10 = Layout(
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    names="label_names",
    labels="labels",
    archive="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
_LAYOUT_100 = Layout(
    folder="cifar-100-python",
    train=("train",),
    test=("test",),
    meta="meta",
    names="fine_label_names",
    labels="fine_labels",
    archive="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
)


def find_folder(directory: Path, layout: Layout) -> Path:
    """Return `directory` or the layout's folder in it, with all files present."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; unpack {layout.archive} there")
    folder = directory if (directory / layout.meta).is_file() else directory / layout.folder
    for name in (layout.meta, *layout.train, *layout.test):
        if not (folder / name).is_file():
            raise InputError(
                f"neither {directory} nor its {layout.folder} has {name}; unpack {layout.archive} "
                "there (the python version, not the binary one)"
            )
    return folder


def class_names(folder: Path, layout: Layout) -> list[str]:
    path = folder / layout.meta
    names = _read(path).get(layout.names)
    if not isinstance(names, list) or not names or not all(isinstance(name, (str, bytes)) for name in names):
        raise InputError(f"{path} has no list of class names under {layout.names!r}; is it a CIFAR file?")
    try:
        return [_text(name) for name in names]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} has a class name that is not UTF-8: {error}; unpack it again") from error


def read_batches(folder: Path, files: tuple[str, ...], layout: Layout, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 [n, 32, 32, 3] and labels int64 [n] of some batches."""
    pixels, labels = [], []
    for name in files:
        content = _read(folder / name)
        data, targets = content.get("data"), content.get(layout.labels)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise InputError(f"{folder / name} has no uint8 images [n, 3072] under 'data'; is it a CIFAR file?")
        targets = targets.tolist() if isinstance(targets, np.ndarray) else targets
        if not isinstance(targets, list) or not all(isinstance(label, int) for label in targets):
            raise InputError(f"{folder / name} has no list of labels under {layout.labels!r}; is it a CIFAR file?")
        if len(targets) != len(data) or not all(0 <= label < classes for label in targets):
            raise InputError(
                f"the labels in {folder / name} do not fit: {len(targets)} of them, {len(data)} images, "
                f"{classes} classes"
            )
        pixels.append(data)
        labels.append(np.array(targets, dtype=np.int64))
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), np.concatenate(labels)


_MAX_FILE = 512 << 20  # CIFAR-100's largest file has 155 MB


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_FILE:
                raise InputError(f"{path} is larger than {in_bytes(_MAX_FILE)}; is it a CIFAR file?")
            content = _Unpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        raise InputError(f"cannot read {path}: {type(error).__name__}: {error}; unpack it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where a CIFAR file has a dict")
    return {_text(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


class _Unpickler(pickle.Unpickler):
    """Unpickle with stand-ins for the few globals that pickled numpy arrays and bytes need, and no others."""

    def __init__(self, file: Any, path: os.PathLike[str]) -> None:
        super().__init__(file, encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise InputError(
            f"{self.path} asks for {module}.{name}, which a CIFAR file does not need; this pickle would run "
            "code, so it was not loaded. Do not use this file"
        )


class _Dtype:
    """Stand in for numpy.dtype; integers only."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.dtype = np.dtype(_text(code))
        if self.dtype.kind not in "iu":
            raise ValueError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order in "<>":
            self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]


class _Array:
    """Stand in for numpy.ndarray while its state is read."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _from_buffer(raw, dtype, shape, "F" if fortran else "C")


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any = "C") -> np.ndarray:
    return np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes that Python 3 pickled for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes encoded with {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def _open(request: Request, layout: Layout) -> Source:
    folder = find_folder(user_path(request.path), layout)
    names = [readable(name) for name in class_names(folder, layout)]
    space = ClassSpace.from_templates(names, request.templates or DEFAULT_TEMPLATES)
    parts = []
    for split_name, files in (("train", layout.train), ("test", layout.test)):
        pixels, labels = read_batches(folder, files, layout, len(names))
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


CIFAR10 = SourceType("cifar10:DIR", "CIFAR-10, the python version unpacked in DIR", partial(_open, layout=_LAYOUT_10))
CIFAR100 = SourceType(
    "cifar100:DIR",
    "CIFAR-100, fine labels, the python version unpacked in DIR",
    partial(_open, layout=_LAYOUT_100),
)
