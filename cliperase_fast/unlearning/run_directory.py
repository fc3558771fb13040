"""The run directory, and whether an interrupted run in it can resume."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.progress import say
from cliperase_fast.storage import (
    Locked,
    check_room,
    check_writable,
    explain,
    lock,
    write_text_atomically,
    writing,
)
from cliperase_fast.unlearning.advice import advice
from cliperase_fast.unlearning.checkpoints import (
    Checkpoint,
    UnsupportedFormat,
    list_damaged,
    list_foreign,
    load_newest,
    remove_drafts,
)
from cliperase_fast.unlearning.engines.base import MOMENTS

_LOCK = ".lock"
_DRAFTS = (
    ".config.json.",
    ".metrics.jsonl.",
    ".result.json.",
    ".report.html.",
    ".audit.json.",
    ".audit.html.",
    ".model.",
    ".probe-",
)

# Settings that a resumed run may change, as they do not affect the weights.
_FREE = {
    "num_workers", "report", "keep_checkpoints", "checkpoint_every", "deepspeed", "rank_timeout", "image_cache_mib",
    "logger", "audit", "on_error",
}  # fmt: skip


class RunDirectory:
    """The folder that a run writes to (path None: none). It checks it, locks it, and removes drafts of killed runs.

    A context manager, which releases the lock. On several ranks the first one holds it.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path, self.resume = path, resume
        self._stack = ExitStack()
        self._locked = False

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raise InputError if the folder cannot be used. Leaves nothing behind."""
        if self.path is None:
            if self.resume:
                raise InputError("resume=True needs output_dir, the run directory to go on with")
            return
        if "\0" in str(self.path):
            raise InputError(f"output_dir={str(self.path)!r} contains a NUL character; give another folder")
        with _readable(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{advice().place}{self.path} is a file; give a folder")
        check_writable(self.path, advice().place)
        if self.path.is_dir():
            self._lock()
        self._check_use()
        if self.resume and not holds_run(self.path):
            say("nothing to resume in %s yet: starting from the beginning", self.path)

    def check_room(
        self, parameters: list[tuple[str, nn.Parameter]], student: ClipAdapter, original: ClipAdapter, keep: int
    ) -> None:
        """Raise InputError unless the disk has room for all that the run can write.

        parameters: the trained ones. keep: how many checkpoints stay while another one is written.
        """
        if self.path is None:
            return
        trained = _bytes_of(parameter for _, parameter in parameters)
        weights = trained + _bytes_of(student.module.buffers())
        model = _bytes_of(original.module.state_dict().values())
        checkpoint = 2 * weights + 2 * trained  # the best weights, and two moments
        there = sum(file.stat().st_size for file in self.path.glob("checkpoints/*/*") if file.is_file())
        needed = max(checkpoint, (keep + 1) * checkpoint - there) + 2 * weights + model
        remedy = f"free some space, {advice().room.format(keep=keep)}"
        check_room(self.path, needed, max(weights, 2 * trained, model), remedy)

    def open(self, settings: UnlearnConfig) -> Path:
        """Create the folder and return it; without a path, a temporary folder that is removed on exit."""
        if self.path is None:
            with writing(tempfile.gettempdir(), "TMPDIR names the folder for temporary files"):
                return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cliperase-")))
        with writing(self.path, f"or {advice().elsewhere}"):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._locked:  # another process may have created it meanwhile
                self._lock()
                self._check_use()
            self._clean()
            write_text_atomically(self.path / "config.json", json.dumps(settings.to_dict(), indent=2) + "\n")
        return self.path

    def save(self, result: Any) -> None:
        """Write the result. A failing disk costs none of the training."""
        assert self.path is not None
        with writing(self.path, f"the training is done and saved: {advice().go_on}"):
            result.write(self.path)

    def save_audit(self, result: Any) -> None:
        """Write the result's audit, and what mentions it, beside the saved result."""
        assert self.path is not None
        with writing(self.path, "the model and its result are saved"):
            result.save_evidence(self.path)

    def _lock(self) -> None:
        assert self.path is not None
        try:
            with writing(self.path / _LOCK):
                self._stack.enter_context(lock(self.path / _LOCK))
        except Locked as holder:
            raise InputError(
                f"{advice().place}{self.path} is in use by {holder}: wait for it to end, or {advice().elsewhere}"
            ) from None
        self._locked = True

    def _check_use(self) -> None:
        """Raise InputError if the folder holds a run that is not resumed, or other files. Drafts do not count."""
        path = self.path
        assert path is not None
        with _readable(path):
            used = path.is_dir() and any(not _is_draft(entry.name) for entry in path.iterdir())
            ours = used and holds_run(path)
        if used and not self.resume:
            go_on = ", or resume=True to go on with it" if ours else ""
            raise InputError(f"output_dir={path} is already used: give another folder{go_on}")
        if used and not ours:
            raise InputError(
                f"{advice().place}{path} holds other files but no run, so there is nothing to resume; "
                f"{advice().elsewhere}"
            )

    def _clean(self) -> None:
        """Remove the drafts of a killed run; the lock ensures that no process is writing them."""
        assert self.path is not None
        for entry in self.path.iterdir():
            if _is_draft(entry.name) and entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        remove_drafts(self.path / "checkpoints")
        for foreign in list_foreign(self.path / "checkpoints"):
            warnings.warn(f"{foreign} is not a checkpoint and is left alone", stacklevel=2)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def holds_run(path: Path) -> bool:
    """Whether the folder holds a run: checkpoints, or the settings of a run that was killed before the first one.

    Other folders may have a config.json too, such as those of transformers models, and must not be written to.
    """
    if any((path / "checkpoints").glob("step-*/state.json")):
        return True
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and {"lambda_forget", "lambda_consistency"} <= settings.keys()


def _is_draft(name: str) -> bool:
    return name == _LOCK or (name.startswith(_DRAFTS) and name.endswith(".tmp"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{advice().place}{explain(error, path)}") from error


def identity_settings(settings: UnlearnConfig) -> dict[str, Any]:
    return {key: value for key, value in settings.to_dict().items() if key not in _FREE}


def resume_from(directory: Path | None, identity: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """Return the newest undamaged checkpoint on every rank; the first rank reads it."""
    found: list[Checkpoint] = []

    def read() -> Checkpoint | None:
        """Return the checkpoint without its large tensors."""
        checkpoint = _newest(directory, identity)
        if checkpoint is None:
            return None
        found.append(checkpoint)
        small = replace(checkpoint.state.optimizer, moments={})
        return Checkpoint(checkpoint.path, replace(checkpoint.state, weights={}, optimizer=small))

    checkpoint = ranks.run_on_first(read)
    if checkpoint is None:
        return None
    own = found[0].state if found else None
    checkpoint.state.weights = ranks.broadcast_tensors(own.weights if own else None)
    checkpoint.state.optimizer.moments = {
        moment: ranks.broadcast_tensors(own.optimizer.moments.get(moment, {}) if own else None) for moment in MOMENTS
    }
    return checkpoint


def _newest(directory: Path | None, identity: dict[str, Any]) -> Checkpoint | None:
    """Return the newest undamaged checkpoint, None if the run stopped before it wrote one.

    Raises InputError if the checkpoint does not belong to this run.
    """
    assert directory is not None
    root = directory / "checkpoints"
    try:
        checkpoint = load_newest(root)
    except UnsupportedFormat as error:
        raise InputError(str(error)) from None
    if checkpoint is None:
        if list_damaged(root):
            raise InputError(f"every checkpoint in {root} is damaged; {advice().afresh}")
        return None
    saved = checkpoint.state.identity
    for name, what in (("model", "another model"), ("teacher", "another teacher")):
        if saved.get(name) != identity[name]:
            raise _made_with(what, checkpoint)
    settings = saved.get("config")
    settings = settings if isinstance(settings, dict) else {}
    differing = [
        f"{key} {settings.get(key)!r} -> {value!r}"
        for key, value in identity["config"].items()
        if settings.get(key) != value
    ]
    if differing:
        raise InputError(
            f"cannot resume from {checkpoint.path}: the settings differ ({'; '.join(differing)}); give the old ones, "
            f"or {advice().afresh}"
        )
    for name, what in (  # behind the settings, which decide what is drawn and held out
        ("data", "other data"),
        ("tokenizer", "another tokenizer (the captions give other tokens)"),
        ("transform", "another transform or other images (an image gives other pixels)"),
    ):
        older = name == "transform" and saved.get(name) == "none"  # for tensors, which were not compared
        if saved.get(name) != identity[name] and not older:
            raise _made_with(what, checkpoint)
    return checkpoint


def _made_with(what: str, checkpoint: Checkpoint) -> InputError:
    return InputError(f"cannot resume from {checkpoint.path}: it was made with {what}; {advice().afresh}")
