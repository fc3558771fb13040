"""Write and read tensors in the safetensors format in one pass, with their digest.

Files are not mapped into memory, so a file that another process truncates is an error and not a SIGBUS, and a full disk
is an OSError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.storage import write_file

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LONGEST_HEADER = 100 << 20  # the format's own limit


Form = tuple[torch.Size, torch.dtype]


class Pieces(Mapping[str, Tensor]):
    """Tensors by name that all ranks assemble together, so that only one of them is whole at a time.

    forms: of each. assemble: returns a tensor by its name. Each is read once, in the order of the names, which is that
    of `write_tensors`; `skip_rest` assembles and drops those that were not read.
    """

    def __init__(self, forms: Mapping[str, Form], assemble: Callable[[str], Tensor]) -> None:
        self.forms, self.assemble = forms, assemble
        self._left = _ordered(forms)[::-1]

    def __getitem__(self, name: str) -> Tensor:
        if not self._left or self._left.pop() != name:
            raise KeyError(name)
        return self.assemble(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_ordered(self.forms))

    def __len__(self) -> int:
        return len(self.forms)

    def skip_rest(self) -> None:
        while self._left:
            self.assemble(self._left.pop())


def join(groups: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the tensors of several groups under the names GROUP/NAME."""
    parts = {f"{group}/{name}": (tensors, name) for group, tensors in groups.items() for name in tensors}
    pieces = {group: tensors for group, tensors in groups.items() if isinstance(tensors, Pieces)}
    if not pieces:
        return {key: tensors[name] for key, (tensors, name) in parts.items()}
    forms = {f"{group}/{name}": form for group, tensors in pieces.items() for name, form in tensors.forms.items()}

    def assemble(key: str) -> Tensor:
        group, _, name = key.partition("/")
        return pieces[group].assemble(name)

    return Pieces(forms, assemble)


def _ordered(forms: Mapping[str, Form]) -> list[str]:
    """Return the names in the order of a file, in which each tensor is aligned."""
    return sorted(forms, key=lambda name: (-forms[name][1].itemsize, name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors by name and return the file's SHA-256. Equal tensors give equal files."""
    if isinstance(tensors, Pieces):
        forms = tensors.forms
    else:
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    ordered = _ordered(forms)
    header: dict[str, Any] = {}
    end = 0
    for name in ordered:
        shape, dtype = forms[name]
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode("utf-8")
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[Any]:
        yield len(head).to_bytes(8, "little")
        yield head
        for name in ordered:
            tensor = tensors[name]
            if tensor.numel():
                yield _bytes_of(tensor.detach().cpu().contiguous())

    return write_file(path, chunks())


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for. Raises `ValueError` if the file is invalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._header: dict[str, Any] = header
        self._start = 8 + length

    def __getitem__(self, name: str) -> Tensor:
        form = self._header[name]
        found = torch.empty(form["shape"], dtype=_TYPES[form["dtype"]], device="cpu")
        if found.numel():
            raw = _bytes_of(found)
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + form["data_offsets"][0])
                if file.readinto(raw) < len(raw):
                    raise ValueError(f"{self.path.name} is cut short")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read the tensors of a file and its SHA-256. Raises `ValueError` if the file is invalid or truncated."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def take(count: int) -> bytes:
            found = file.read(count)
            if len(found) < count:
                raise ValueError(f"{path.name} is cut short")
            digest.update(found)
            return found

        length = int.from_bytes(take(8), "little")
        if length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{path.name} is not a safetensors file")
        header = json.loads(take(length))
        header.pop("__metadata__", None)
        tensors: dict[str, Tensor] = {}
        end = 0
        for name, form in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = _TYPES[form["dtype"]], form["shape"], form["data_offsets"]
            if start != end or stop - start != prod(shape) * dtype.itemsize or stop > size - 8 - length:
                raise ValueError(f"{path.name} does not match its header for {name!r}")
            end = stop
            tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            if start < stop:
                raw = _bytes_of(tensors[name])
                if file.readinto(raw) < len(raw):
                    raise ValueError(f"{path.name} is cut short")
                digest.update(raw)
        if file.read(1):
            raise ValueError(f"{path.name} has data after its end")
    return tensors, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
