"""Write and read tensors in the safetensors format in one pass, with their digest.

Files are not mapped into memory, so a file that another process truncates is an error and not a SIGBUS, and a full disk
is an OSError.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors by name and return the file's SHA-256. Equal tensors give equal files."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode("utf-8")
    head += b" " * (-len(head) % 8)

    def chunks() -> Iterator[Any]:
        yield len(head).to_bytes(8, "little")
        yield head
        for _, tensor in ordered:
            if tensor.numel():
                yield _bytes_of(tensor.detach().cpu().contiguous())

    return write_file(path, chunks())


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
