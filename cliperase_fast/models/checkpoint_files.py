"""Read checkpoints of every common format without running code from them.

PyTorch files are read with `weights_only=True`. Objects other than tensors and plain Python values (numpy scalars,
argparse namespaces, classes of a trainer) are replaced by empty stand-ins: no foreign code is imported or called.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError

_SLACK = 2**20  # bytes by which small compressed entries may grow
_SAVE = "torch.save(model.state_dict(), PATH)"
_OLDER = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of torch.save's format before archives
_CLASSES = 100  # most unknown classes in an older file; a trainer's checkpoint has fewer
_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in torch's error about a class
# Files mistaken for checkpoints, by their first bytes, and what to do.
_MISTAKEN = (
    (b"version http", "it is a Git LFS pointer; fetch the file with git lfs pull"),
    (b"<", "it is a web page; download the file itself (on Hugging Face its URL has /resolve/, not /blob/)"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
    (b"\x93NUMPY", "it is a single NumPy array"),
)


def read_checkpoint(path: Path, name: str) -> Any:
    """Read the content of a file: tensors in nested dictionaries, on the CPU.

    path: safetensors, a file of torch.save (zip or older), or a TorchScript archive. name: the model, for errors.
    Raises `InputError` that says what is wrong with the file.
    """
    failed = f"the checkpoint {path} does not load as {name}"
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{failed}: {error.strerror or error}") from error
    try:
        if head[8:9] == b"{":
            return _read_safetensors(path)
        if head.startswith(b"PK"):
            return _read_archive(path)
        if head.startswith(_OLDER):
            return _read_older(path)
        raise InputError(_describe_other(path, head))
    except InputError as error:
        raise InputError(f"{failed}: {error}") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{failed}: {_refused(error)}") from error
    except Exception as error:  # damaged files raise errors of several libraries
        raise InputError(f"{failed}: it is damaged or cut short ({_line(error)})") from error


def _describe_other(path: Path, head: bytes) -> str:
    """Return what a file of none of the formats is, and what to do."""
    if not head:
        return "it is empty; copy or download it again"
    if head.startswith(b"\x80"):
        return f"it is a plain pickle, which can only be read by running code; load it where it was made, then {_SAVE}"
    for start, told in _MISTAKEN:
        if head.lstrip().startswith(start):
            return told
    size = path.stat().st_size
    return f"it ({size} bytes) is not a file of safetensors, torch.save or torch.jit.save"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries if "/code/" not in entry.filename)  # code is not read
        if claimed > path.stat().st_size + _SLACK:
            raise InputError(
                f"it is compressed and claims {claimed} bytes; save it with torch.save, which does not compress"
            )
        names = [entry.filename for entry in entries]
        if any(name.endswith("/constants.pkl") for name in names):
            return _read_torchscript(archive, next(name for name in names if name.endswith("/constants.pkl")))
    return _read_with_stand_ins(path, torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _read_older(path: Path) -> Any:
    """Read an older file, which does not list its classes: each is found when it stops the reader."""
    unknown: list[str] = []
    told: pickle.UnpicklingError | None = None  # the last error that names a class
    while True:
        try:
            return _read_with_stand_ins(path, unknown)
        except pickle.UnpicklingError as error:
            found = _GLOBAL.search(str(error))
            if found is None:
                raise told or error from error
            if found[1] in unknown or len(unknown) >= _CLASSES:
                raise
            unknown.append(found[1])
            told = error


def _read_with_stand_ins(path: Path, unknown: list[str]) -> Any:
    stand_ins: list[Any] = [(type(name, (StandIn,), {}), name) for name in unknown]
    # A file, because torch judges a path by its suffix.
    with path.open("rb") as file, torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", weights_only=True)


class StandIn(list):
    """Stand in for an object of an unknown class: keep its state and do nothing."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> Any:
        # torch fills only plain dictionaries, and other dictionary classes are common among hyperparameters
        return {} if cls.__name__.lower().endswith("dict") else super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    @property
    def is_array(self) -> bool:
        return type(self).__name__.startswith("numpy.") and type(self).__name__.endswith("._reconstruct")

    @property
    def is_module(self) -> bool:
        return isinstance(self.state, dict) and {"_parameters", "_modules"} <= set(self.state)


def describe_module(name: str) -> str:
    """Return what to do about a checkpoint with a whole pickled model."""
    return (
        f"it holds a whole pickled model ({name}), which can only be read by running its code; load it where that code "
        f"is and save only its weights with {_SAVE}"
    )


# The TorchScript reader. An archive is a pickle of scripted objects whose attributes are tensors and other objects. The
# code that would be executed is in other files, which are not read.


class _Scripted:
    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def _read_torchscript(archive: zipfile.ZipFile, constants: str) -> dict[str, Tensor]:
    root = constants.removesuffix("constants.pkl")
    with archive.open(f"{root}data.pkl") as file:
        scripted = _ScriptedUnpickler(file, archive, root).load()
    state: dict[str, Tensor] = {}
    _collect(scripted, "", state, set())
    return state


def _collect(scripted: Any, prefix: str, state: dict[str, Tensor], seen: set[int]) -> None:
    if id(scripted) in seen:
        return
    seen.add(id(scripted))
    attributes = getattr(scripted, "attributes", None)
    for name, value in attributes.items() if isinstance(attributes, dict) else ():
        if isinstance(value, Tensor):
            state[prefix + name] = value
        elif isinstance(value, _Scripted):
            _collect(value, f"{prefix}{name}.", state, seen)


class _ScriptedUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Scripted
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _first
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in a TorchScript archive")

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, *_ = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{key}"))
            dtype = _STORAGES[kind]
            empty = torch.empty(0, dtype=dtype, device="cpu")
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
        return self.storages[key]


_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _rebuilt(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *others: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _first(value: Any, *others: Any) -> Any:
    return value


def _refused(error: Exception) -> str:
    found = _GLOBAL.search(str(error))
    what = f"it holds {found[1]}, which is not a tensor" if found else _line(error)
    return f"it cannot be read without running code ({what}); save only the weights where it was made, with {_SAVE}"


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
