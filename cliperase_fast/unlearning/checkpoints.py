"""Checkpoints that are complete or absent: written beside, flushed, renamed; checked by digest when read.

checkpoints/step-00000120/   student.safetensors    trained parameters and buffers
                             optimizer.safetensors  its moments, as MOMENT/PARAMETER
                             trainer.pt             scaler, random states; read with weights_only=True
                             metrics.jsonl          the lines of the steps so far
                             best.safetensors       the best weights so far, where these are not the student's own
                             state.json             everything else, the digest of each file, and its own
checkpoints/best.safetensors  the best weights of the run that is at work

Each checkpoint stands for itself: what happens to another file does not cost it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.storage import draft_of, file_digest, flush_folder, write_file
from cliperase_fast.tensor_files import read_tensors, write_tensors
from cliperase_fast.unlearning.selection import Candidate

FORMAT = 3
STUDENT, OPTIMIZER, TRAINER, METRICS = "student.safetensors", "optimizer.safetensors", "trainer.pt", "metrics.jsonl"
BEST, STATE = "best.safetensors", "state.json"
_FILES = {STUDENT, OPTIMIZER, TRAINER, METRICS, BEST, STATE}
_NAME = re.compile(r"step-(\d{8,})")
_TYPES = {
    "step": int, "seconds": float, "identity": dict, "looks": list, "looks_without_better": int, "stopped_early": bool,
}  # fmt: skip


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, cut short or altered."""


class OtherFormat(Exception):
    """A checkpoint that another version wrote."""


@dataclass
class Checkpoint:
    """state: step, seconds, identity, looks, best ({"candidate", "sha256"} or None), looks_without_better,
    stopped_early, of these types when it comes from a file."""

    path: Path
    state: dict[str, Any]
    student: dict[str, Tensor]
    trainer: dict[str, Any]
    metrics: list[dict[str, Any]]


def save_checkpoint(
    root: Path,
    step: int,
    student: dict[str, Tensor],
    trainer: dict[str, Any],
    state: dict[str, Any],
    metrics: list[dict[str, Any]],
    *,
    keep: int,
) -> Path:
    """Write checkpoint `step` under `root`, then drop the run's own older ones but the newest `keep`.

    trainer: {"optimizer": {"step", MOMENT: tensors by name}, ...}. state["best"] names weights that `save_best` wrote.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    draft = draft_of(final)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        digests = {STUDENT: write_tensors(draft / STUDENT, student)}
        moments, rest = _without_moments(trainer)
        digests[OPTIMIZER] = write_tensors(draft / OPTIMIZER, moments)
        digests[TRAINER] = _write_trainer(draft / TRAINER, rest)
        digests[METRICS] = write_file(draft / METRICS, (line.encode("utf-8") for line in metric_lines(metrics)))
        if state["best"] is not None and state["best"]["sha256"] != digests[STUDENT]:
            digests[BEST] = _copy_best(root, state["best"]["sha256"], draft / BEST)
        files = {name: {"sha256": digest, "bytes": (draft / name).stat().st_size} for name, digest in digests.items()}
        write_file(draft / STATE, [_sealed({**state, "format": FORMAT, "step": step, "files": files})])
        flush_folder(draft)
        _make_way(final)
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush_folder(root)
    remove_drafts(root)
    _prune(root, step, keep)
    return final


def load_newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None where there is none.

    A damaged one is named in a warning and the one before it is tried; so is what is no checkpoint. Raises OtherFormat
    for one that another version wrote.
    """
    for path in sorted(_entries(root), key=_number, reverse=True):
        try:
            return _load(path)
        except DamagedCheckpoint as damage:
            warnings.warn(f"checkpoint {path} is damaged ({damage}); going back to the one before it", stacklevel=2)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints that are whole as far as their state and the sizes of their files tell, oldest first."""
    return [path for path in sorted(_entries(root), key=_number) if _is_whole(path)]


def list_damaged(root: Path) -> list[Path]:
    """What was a checkpoint once: folders of that name that hold any of its files."""
    return [path for path in _entries(root) if not _is_whole(path) and not _is_foreign(path)]


def list_foreign(root: Path) -> list[Path]:
    """What has a checkpoint's name and none of its files; it is left alone and does not count as one."""
    return sorted(path for path in root.glob("step-*") if _is_foreign(path))


def save_best(root: Path, weights: dict[str, Tensor]) -> str:
    """Write the best weights so far; returns the SHA-256 by which a checkpoint's state names them."""
    root.mkdir(parents=True, exist_ok=True)
    draft = draft_of(root / BEST)
    digest = write_tensors(draft, weights)
    os.replace(draft, root / BEST)
    return digest


def load_best(root: Path, sha256: str) -> dict[str, Tensor]:
    """The weights of that digest, from wherever they are still whole."""
    for path in _places_of_best(root):
        try:
            weights, digest = read_tensors(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if digest == sha256:
            return weights
    raise DamagedCheckpoint(f"the best weights are missing or altered in {root / BEST} and in every checkpoint")


def take_up(checkpoint: Checkpoint, *, keep: int) -> None:
    """Make the folder what it was once this checkpoint was written: its best weights there, older ones dropped."""
    root, best = checkpoint.path.parent, checkpoint.state["best"]
    if best is not None:
        draft = draft_of(root / BEST)
        _copy_best(root, best["sha256"], draft)
        os.replace(draft, root / BEST)
    _prune(root, checkpoint.state["step"], keep)


def remove_drafts(root: Path) -> None:
    """Remove what a run that was killed was about to write, or to drop."""
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)
    for path in (draft_of(root / BEST), *root.glob("best-*.tmp")):
        path.unlink(missing_ok=True)


def metric_lines(metrics: list[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(line) + "\n" for line in metrics)


def _load(path: Path) -> Checkpoint:
    try:
        state = _read_state(path)
        student = _read_tensors(path, STUDENT, state)
        best = state["best"]
        if best is not None and BEST in state["files"]:
            _require(BEST, file_digest(path / BEST), state)
        elif best is not None and best["sha256"] != state["files"][STUDENT]["sha256"]:
            raise DamagedCheckpoint(f"{BEST} is missing")
        trainer = torch.load(io.BytesIO(_read_checked(path, TRAINER, state)), map_location="cpu", weights_only=True)
        for name, tensor in _read_tensors(path, OPTIMIZER, state).items():
            moment, _, parameter = name.partition("/")
            trainer["optimizer"][moment][parameter] = tensor
        lines = _read_checked(path, METRICS, state).decode("utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        for name in ("random", "scaler"):
            if not isinstance(trainer[name], dict):
                raise DamagedCheckpoint(f"{TRAINER} holds no {name} state")
    except (DamagedCheckpoint, OtherFormat):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise DamagedCheckpoint(str(error).partition("\n")[0] or type(error).__name__) from error
    return Checkpoint(path, state, student, trainer, metrics)


def _read_state(path: Path) -> dict[str, Any]:
    """state.json, checked: its digest, and that every field is there and of its type."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{STATE} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{STATE} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{STATE} holds no state")
    if "digest" not in state and "format" in state and state["format"] != FORMAT:
        raise OtherFormat
    if json.loads(_sealed({key: value for key, value in state.items() if key != "digest"})) != state:
        raise DamagedCheckpoint(f"{STATE} does not match its digest")
    if state["format"] != FORMAT:
        raise OtherFormat
    _check_fields(path, state)
    return state


def _check_fields(path: Path, state: dict[str, Any]) -> None:
    for name, kind in _TYPES.items():
        value = state.get(name)
        if not (isinstance(value, kind) or (kind is float and type(value) is int)) or (
            kind is not bool and isinstance(value, bool)
        ):
            raise DamagedCheckpoint(f"{STATE} has {name}={value!r}")
    if state["step"] != _number(path) and not path.name.startswith("."):
        raise DamagedCheckpoint(f"{STATE} is of step {state['step']}")
    best, files = state.get("best"), state.get("files")
    if not isinstance(files, dict) or not {STUDENT, OPTIMIZER, TRAINER, METRICS} <= files.keys() <= _FILES:
        raise DamagedCheckpoint(f"{STATE} does not name its files")
    if best is not None and (not isinstance(best, dict) or not isinstance(best.get("sha256"), str)):
        raise DamagedCheckpoint(f"{STATE} has best={best!r}")
    for look in (*state["looks"], *([best["candidate"]] if best is not None else ())):
        if not _is_candidate(look):
            raise DamagedCheckpoint(f"{STATE} has the look {look!r}")


def _is_candidate(look: Any) -> bool:
    fields = dataclasses.fields(Candidate)
    return (
        isinstance(look, dict)
        and look.keys() == {field.name for field in fields}
        and all(type(look[field.name]) in ((int,) if field.type == "int" else (int, float)) for field in fields)
    )


def _sealed(state: dict[str, Any]) -> bytes:
    """state.json with its own digest in it."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()
    return json.dumps({**state, "digest": digest}).encode("utf-8")


def _read_checked(path: Path, name: str, state: dict[str, Any]) -> bytes:
    content = (path / name).read_bytes()
    _require(name, hashlib.sha256(content).hexdigest(), state)
    return content


def _read_tensors(path: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    tensors, digest = read_tensors(path / name)
    _require(name, digest, state)
    return tensors


def _require(name: str, digest: str, state: dict[str, Any]) -> None:
    if state["files"][name]["sha256"] != digest:
        raise DamagedCheckpoint(f"{name} does not match its digest")


def _without_moments(trainer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(all moments as MOMENT/PARAMETER, the trainer's state without them)."""
    optimizer = trainer["optimizer"]
    moments = {key: value for key, value in optimizer.items() if isinstance(value, dict)}
    flat = {f"{key}/{name}": tensor for key, of_moment in moments.items() for name, tensor in of_moment.items()}
    return flat, {**trainer, "optimizer": {**optimizer, **{key: {} for key in moments}}}


def _write_trainer(path: Path, trainer: dict[str, Any]) -> str:
    packed = io.BytesIO()  # torch's own writer ends in a RuntimeError, and more, where the disk is full
    torch.save(trainer, packed)
    return write_file(path, [packed.getbuffer()])


def _copy_best(root: Path, sha256: str, target: Path) -> str:
    """Copy the weights of that digest to `target`, from wherever they are still whole."""
    for path in _places_of_best(root):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            if write_file(target, iter(lambda file=file: file.read(1 << 20), b"")) == sha256:  # type: ignore[misc]
                return sha256
    target.unlink(missing_ok=True)
    raise DamagedCheckpoint(f"the best weights are missing or altered in {root / BEST} and in every checkpoint")


def _places_of_best(root: Path) -> list[Path]:
    newest_first = sorted(_entries(root), key=_number, reverse=True)
    return [root / BEST, *(path / name for path in newest_first for name in (BEST, STUDENT))]


def _entries(root: Path) -> list[Path]:
    """Folders with a checkpoint's name and something of a checkpoint in them."""
    return [path for path in root.glob("step-*") if not _is_foreign(path)]


def _is_foreign(path: Path) -> bool:
    if not _NAME.fullmatch(path.name) or not path.is_dir():
        return True
    return not any((path / name).exists() for name in _FILES)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _is_whole(path: Path) -> bool:
    """Whether the state and the files' sizes are right; the files' digests are looked at when it is loaded."""
    try:
        files = _read_state(path)["files"]
        return all((path / name).stat().st_size == files[name]["bytes"] for name in files)
    except (DamagedCheckpoint, OtherFormat, OSError, LookupError, TypeError):
        return False


def _make_way(final: Path) -> None:
    """Take away what has the name of the checkpoint to be written: a damaged or older one of that step."""
    if not os.path.lexists(final):
        return
    ours = final.is_dir() and not final.is_symlink() and {path.name for path in final.iterdir()} <= _FILES
    if ours:
        aside = final.with_name(f".{final.name}.old.tmp")  # `remove_drafts` drops it once the new one is there
        shutil.rmtree(aside, ignore_errors=True)
    else:
        names = (final.with_name(f"old-{number}-{final.name}") for number in range(1, 1 << 20))
        aside = next(path for path in names if not os.path.lexists(path))
        warnings.warn(f"{final} is not a checkpoint of this run; it is now {aside}", stacklevel=3)
    os.replace(final, aside)


def _prune(root: Path, step: int, keep: int) -> None:
    """Drop this run's own older checkpoints; each leaves by a rename, so that a crash does not leave half of it."""
    for path in [path for path in list_checkpoints(root) if _number(path) <= step][:-keep]:
        aside = draft_of(path)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)
