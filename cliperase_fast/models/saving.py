"""Write model folders so that a crash never leaves half a model in one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from cliperase_fast.errors import InputError


def write_directory(directory: str | Path, marker: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `directory`, then move the result there.

    marker: the file that makes the folder a model. If `directory` exists, its marker is removed first and the new one
    moved last; other files in the folder stay.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; a model is saved as a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        write(work)
        work.chmod(0o777 & ~_umask())  # mkdtemp makes the folder private
        if not directory.exists():
            work.rename(directory)
            return
        (directory / marker).unlink(missing_ok=True)
        for path in sorted(work.iterdir(), key=lambda path: path.name == marker):
            target = directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors; tensors that share memory are written separately."""
    from safetensors.torch import save_file

    save_file(apart(state), path, metadata={"format": "pt"})


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, without shared memory."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        tensors[name] = tensor
    return tensors


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
