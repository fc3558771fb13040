"""Checkpoints that are complete or absent: written beside, flushed, renamed; checked by digest when read.

checkpoints/step-00000120/   student.safetensors (trained parameters and buffers), trainer.pt (optimizer, scaler,
                             random states; read with weights_only=True), state.json (everything else, and digests)
checkpoints/best-00000080.safetensors   the weights of the best validation so far, named by the states that use it
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2  # the optimizer's state by parameter name


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, cut short or altered."""


@dataclass
class Checkpoint:
    path: Path
    state: dict[str, Any]
    student: dict[str, Tensor]
    trainer: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, student: dict[str, Tensor], trainer: dict[str, Any], state: dict[str, Any], *, keep: int
) -> Path:
    """Write checkpoint `step` under `root`; drop all but the newest `keep` and the best weights none of them names."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    draft = root / f".{final.name}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    _save_tensors(draft / "student.safetensors", student)
    torch.save(trainer, draft / "trainer.pt")
    digests = {name: file_digest(draft / name) for name in ("student.safetensors", "trainer.pt")}
    state = {**state, "format": FORMAT, "step": step, "digests": digests}
    (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in draft.iterdir():
        _flush(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    _flush(root)
    _prune(root, keep)
    return final


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and the one before it is tried."""
    for path in reversed(list_checkpoints(root)):
        try:
            return _load(path)
        except DamagedCheckpoint as damage:
            warnings.warn(f"checkpoint {path} is damaged ({damage}); going back to the one before it", stacklevel=2)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def save_best(root: Path, step: int, weights: dict[str, Tensor]) -> dict[str, str]:
    """Write the best weights so far; returns the {"file", "sha256"} by which a checkpoint's state names them."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"best-{step:08d}.safetensors"
    draft = final.with_suffix(".tmp")
    _save_tensors(draft, weights)
    _flush(draft)
    os.replace(draft, final)
    return {"file": final.name, "sha256": file_digest(final)}


def load_best(root: Path, reference: dict[str, str]) -> dict[str, Tensor]:
    path = root / reference["file"]
    if not path.is_file() or file_digest(path) != reference["sha256"]:
        raise DamagedCheckpoint(f"{path} is missing or altered")
    return load_file(path)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def write_text_atomically(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    _flush(draft)
    os.replace(draft, path)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _load(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, digest in state["digests"].items():
            if file_digest(path / name) != digest:
                raise DamagedCheckpoint(f"{name} does not match its digest")
        if state["best"] is not None:
            load_best(path.parent, state["best"]["weights"])
        student = load_file(path / "student.safetensors")
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(str(error).partition("\n")[0]) from error
    return Checkpoint(path, state, student, trainer)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _prune(root: Path, keep: int) -> None:
    found = list_checkpoints(root)
    for path in found[:-keep]:
        shutil.rmtree(path)
    named = set()
    for path in found[-keep:]:
        try:
            best = json.loads((path / "state.json").read_text(encoding="utf-8"))["best"]
        except (OSError, ValueError, KeyError):
            return  # damaged: what it names is not known, so nothing is removed
        if best is not None:
            named.add(best["weights"]["file"])
    for file in root.glob("best-*.safetensors"):
        if file.name not in named:
            file.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
