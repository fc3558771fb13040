"""Checkpoints that are complete or absent: written beside, flushed, renamed; verified by digest when read.

checkpoints/step-00000120/   student.safetensors    trained parameters and buffers
                             optimizer.safetensors  its moments, as MOMENT/PARAMETER
                             trainer.pt             optimizer step, scaler, random states; read with weights_only=True
                             metrics.jsonl          the lines of the steps so far
                             best.safetensors       the best weights so far, unless they are the student's own
                             state.json             all other fields, the digest of each file, and its own
checkpoints/best.safetensors  the best weights of the run in progress

`TrainState` names every field. A checkpoint does not depend on files of another one.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.evaluation import Divergence
from cliperase_fast.storage import draft_of, file_digest, flush_folder, write_file
from cliperase_fast.tensor_files import FileTensors, join, read_tensors, write_tensors
from cliperase_fast.unlearning.advice import advice
from cliperase_fast.unlearning.checkpoint_upgrades import UPGRADES
from cliperase_fast.unlearning.selection import Candidate

FORMAT = 7
STUDENT, OPTIMIZER, TRAINER, METRICS = "student.safetensors", "optimizer.safetensors", "trainer.pt", "metrics.jsonl"
BEST, STATE = "best.safetensors", "state.json"
_FILES = {STUDENT, OPTIMIZER, TRAINER, METRICS, BEST, STATE}
_NAME = re.compile(r"step-(\d{8,})")
_TYPES = {
    "step": int, "seconds": float, "identity": dict, "evaluations": list, "evaluations_without_improvement": int,
    "stopped_early": bool, "probes": list, "rate": float, "stop": str,
}  # fmt: skip


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, truncated or altered."""


class UnsupportedFormat(Exception):
    """A checkpoint in a format that this version cannot read. The message names the format and the remedy."""

    def __init__(self, path: Path, found: object) -> None:
        newer = isinstance(found, int) and found > FORMAT
        remedy = "upgrade cliperase_fast" if newer else "resume with the version that wrote it"
        super().__init__(
            f"the checkpoint {path} has format {found!r} and this version reads {_READABLE}: {remedy}, or "
            f"{advice().afresh}"
        )


@dataclass
class OptimizerState:
    """State of the optimizer and of the gradient scaler, whole and by parameter name."""

    step: int = 0
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # by moment, then by parameter
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainState:
    """All that a run needs to continue from a step.

    The trainer updates the scalar fields in place. `weights`, `optimizer` and `random` are filled in when a checkpoint
    is written or read.
    """

    step: int = 0  # optimizer steps done, or edits of a method without training
    seconds: float = 0.0  # spent on them
    identity: dict[str, Any] = field(default_factory=dict)  # what a run that resumes must share
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    evaluations: list[Candidate] = field(default_factory=list)  # on the validation split
    evaluations_without_improvement: int = 0
    stopped_early: bool = False
    probes: list[dict[str, Any]] = field(default_factory=list)  # of learning rates, see `Probe`
    rate: float = 0.0  # the learning rate that they led to, 0 until then
    stop: str = ""  # why training ended, if its number of steps was open
    best: Candidate | None = None
    best_weights: str | None = None  # their SHA-256
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # trained parameters and buffers
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    random: dict[str, Any] = field(default_factory=dict)  # states of the global generators

    def to_json(self) -> dict[str, Any]:
        """Return the fields that state.json holds."""
        best = None
        if self.best is not None:
            best = {"candidate": self.best.to_dict(), "sha256": self.best_weights}
        found = {name: getattr(self, name) for name in _TYPES}
        return {**found, "evaluations": [candidate.to_dict() for candidate in self.evaluations], "best": best}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> TrainState:
        """Build from the fields of state.json, whose types have been checked."""
        best = state["best"] or {"candidate": None, "sha256": None}
        found = {name: state[name] for name in _TYPES}
        return cls(
            **{**found, "evaluations": [_candidate(candidate) for candidate in state["evaluations"]]},
            best=_candidate(best["candidate"]) if best["candidate"] else None,
            best_weights=best["sha256"],
        )


@dataclass
class Checkpoint:
    """A `TrainState` and the folder that it was read from."""

    path: Path
    state: TrainState


def save_checkpoint(root: Path, state: TrainState, *, keep: int, moments: Mapping[str, Tensor] | None = None) -> Path:
    """Write a checkpoint under `root`, then remove this run's older ones except for the newest `keep`.

    moments: those of state.optimizer, if they are joined already. state.best_weights names weights that `save_best`
    wrote. Returns the checkpoint's folder.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{state.step:08d}"
    draft = draft_of(final)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        _write(root, draft, state, join(state.optimizer.moments) if moments is None else moments)
        _make_way(final)
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush_folder(root)
    remove_drafts(root)
    _prune(root, state.step, keep)
    return final


def load_newest(root: Path) -> Checkpoint | None:
    """Read the newest undamaged checkpoint, None if there is none.

    Warns about a damaged one and tries the one before. Raises UnsupportedFormat for one in another format.
    """
    for path in sorted(_entries(root), key=_number, reverse=True):
        try:
            return _load(path)
        except DamagedCheckpoint as damage:
            warnings.warn(f"checkpoint {path} is damaged ({damage}); going back to the one before it", stacklevel=2)
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints whose state is valid and whose files have the right sizes, oldest first."""
    return [path for path in sorted(_entries(root), key=_number) if _is_whole(path)]


def list_damaged(root: Path) -> list[Path]:
    """Return the damaged checkpoints: folders with a checkpoint's name and some of its files."""
    return [path for path in _entries(root) if not _is_whole(path) and not _is_foreign(path)]


def list_foreign(root: Path) -> list[Path]:
    """Return what has a checkpoint's name but none of its files; it is ignored."""
    return sorted(path for path in root.glob("step-*") if _is_foreign(path))


def save_best(root: Path, weights: Mapping[str, Tensor]) -> str:
    """Write the best weights so far; return their SHA-256, by which `TrainState.best_weights` names them."""
    root.mkdir(parents=True, exist_ok=True)
    draft = draft_of(root / BEST)
    digest = write_tensors(draft, weights)
    os.replace(draft, root / BEST)
    return digest


def load_best(root: Path, sha256: str, whole: bool = True) -> Mapping[str, Tensor]:
    """Return the weights with that digest from the first undamaged copy. whole: read all of them now."""
    for path in _places_of_best(root):
        try:
            weights, digest = read_tensors(path) if whole else (FileTensors(path), file_digest(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if digest == sha256:
            return weights
    raise DamagedCheckpoint(f"the best weights are missing or altered in {root / BEST} and in every checkpoint")


def rewind_to(checkpoint: Checkpoint, *, keep: int) -> None:
    """Bring the folder back to when this checkpoint was written: restore its best weights, remove older checkpoints."""
    root, best = checkpoint.path.parent, checkpoint.state.best_weights
    if best is not None:
        draft = draft_of(root / BEST)
        _copy_best(root, best, draft)
        os.replace(draft, root / BEST)
    _prune(root, checkpoint.state.step, keep)


def remove_drafts(root: Path) -> None:
    """Remove files that a killed run was writing or removing."""
    for path in root.glob(".step-*.tmp"):
        shutil.rmtree(path)
    for path in (draft_of(root / BEST), *root.glob("best-*.tmp")):
        path.unlink(missing_ok=True)


def metric_lines(metrics: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of metrics.jsonl."""
    return (json.dumps(line) + "\n" for line in metrics)


def _write(root: Path, draft: Path, state: TrainState, moments: Mapping[str, Tensor]) -> None:
    """Write all files of a checkpoint into the folder `draft`."""
    trainer = {
        "optimizer": {"step": state.optimizer.step},
        "scaler": state.optimizer.scaler,
        "random": state.random,
    }
    digests = {
        STUDENT: write_tensors(draft / STUDENT, state.weights),
        OPTIMIZER: write_tensors(draft / OPTIMIZER, moments),
        TRAINER: _write_trainer(draft / TRAINER, trainer),
        METRICS: write_file(draft / METRICS, (line.encode("utf-8") for line in metric_lines(state.metrics))),
    }
    if state.best_weights is not None and state.best_weights != digests[STUDENT]:
        digests[BEST] = _copy_best(root, state.best_weights, draft / BEST)
    files = {name: {"sha256": digest, "bytes": (draft / name).stat().st_size} for name, digest in digests.items()}
    write_file(draft / STATE, [_sealed({**state.to_json(), "format": FORMAT, "files": files})])
    flush_folder(draft)


def _load(path: Path) -> Checkpoint:
    try:
        fields = _read_state(path)
        state = TrainState.from_json(fields)
        state.weights = _read_tensors(path, STUDENT, fields)
        if state.best_weights is not None and BEST in fields["files"]:
            _require(BEST, file_digest(path / BEST), fields)
        elif state.best_weights not in (None, fields["files"][STUDENT]["sha256"]):
            raise DamagedCheckpoint(f"{BEST} is missing")
        trainer = torch.load(io.BytesIO(_read_checked(path, TRAINER, fields)), map_location="cpu", weights_only=True)
        for name in ("random", "scaler"):
            if not isinstance(trainer[name], dict):
                raise DamagedCheckpoint(f"{TRAINER} holds no {name} state")
        state.random = trainer["random"]
        state.optimizer = OptimizerState(trainer["optimizer"]["step"], scaler=trainer["scaler"])
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _read_tensors(path, OPTIMIZER, fields).items():
            moment, _, parameter = name.partition("/")
            moments.setdefault(moment, {})[parameter] = tensor
        state.optimizer.moments = moments
        lines = _read_checked(path, METRICS, fields).decode("utf-8").splitlines()
        state.metrics = [json.loads(line) for line in lines]
    except (DamagedCheckpoint, UnsupportedFormat):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise DamagedCheckpoint(str(error).partition("\n")[0] or type(error).__name__) from error
    return Checkpoint(path, state)


def _read_state(path: Path) -> dict[str, Any]:
    """Read state.json in today's format, and check its digest and the type of every field."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{STATE} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{STATE} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{STATE} holds no state")
    if "digest" not in state and "format" in state and state["format"] not in _READS:
        raise UnsupportedFormat(path, state["format"])
    if json.loads(_sealed({key: value for key, value in state.items() if key != "digest"})) != state:
        raise DamagedCheckpoint(f"{STATE} does not match its digest")
    if state["format"] not in _READS:
        raise UnsupportedFormat(path, state["format"])
    state = _up_to_date(state)
    _check_fields(path, state)
    return state


_READS = (*UPGRADES, FORMAT)
_READABLE = f"formats {_READS[0]} to {FORMAT}"


def _up_to_date(state: dict[str, Any]) -> dict[str, Any]:
    """Bring the fields of state.json of a readable format up to date."""
    for number in range(state["format"], FORMAT):
        state = UPGRADES[number](state)
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
    for found in (*state["evaluations"], *([best["candidate"]] if best is not None else ())):
        if not _is_candidate(found):
            raise DamagedCheckpoint(f"{STATE} has the evaluation {found!r}")


def _is_candidate(found: Any) -> bool:
    fields = dataclasses.fields(Candidate)
    optional = {"moved"}  # of runs that hold hidden states
    if not isinstance(found, dict) or found.keys() | optional != {spec.name for spec in fields}:
        return False
    numbers = [spec for spec in fields if spec.name != "divergence" and spec.name in found]
    if not all(type(found[spec.name]) in ((int,) if spec.type == "int" else (int, float)) for spec in numbers):
        return False
    divergence, known = found["divergence"], {spec.name for spec in dataclasses.fields(Divergence)}
    return divergence is None or (isinstance(divergence, dict) and divergence.keys() == known)


def _candidate(found: dict[str, Any]) -> Candidate:
    divergence = found["divergence"]
    return Candidate(**{**found, "divergence": None if divergence is None else Divergence(**divergence)})


def _sealed(state: dict[str, Any]) -> bytes:
    """Encode state.json with its own digest."""
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


def _write_trainer(path: Path, trainer: dict[str, Any]) -> str:
    packed = io.BytesIO()  # torch's own writer raises a RuntimeError, among others, on a full disk
    torch.save(trainer, packed)
    return write_file(path, [packed.getbuffer()])


def _copy_best(root: Path, sha256: str, target: Path) -> str:
    """Copy the weights with that digest to `target` from the first undamaged copy."""
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
    """Return the folders with a checkpoint's name and any of its files."""
    return [path for path in root.glob("step-*") if not _is_foreign(path)]


def _is_foreign(path: Path) -> bool:
    if not _NAME.fullmatch(path.name) or not path.is_dir():
        return True
    return not any((path / name).exists() for name in _FILES)


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def _is_whole(path: Path) -> bool:
    """Check the state and the sizes of the files; their digests are verified on loading."""
    try:
        files = _read_state(path)["files"]
        return all((path / name).stat().st_size == files[name]["bytes"] for name in files)
    except (DamagedCheckpoint, UnsupportedFormat, OSError, LookupError, TypeError):
        return False


def _make_way(final: Path) -> None:
    """Move away what already has the name of the checkpoint to be written."""
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
    """Remove this run's older checkpoints, each by a rename first, so that a crash leaves no half of one."""
    for path in [path for path in list_checkpoints(root) if _number(path) <= step][:-keep]:
        aside = draft_of(path)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)
