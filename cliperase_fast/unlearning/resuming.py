"""The run directory, and whether an interrupted run in it can go on."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.checkpoints import (
    FORMAT,
    Checkpoint,
    list_checkpoints,
    load_newest,
    write_text_atomically,
)
from cliperase_fast.unlearning.engine import MOMENTS

# Settings that a resumed run may change: they do not touch the weights that come out.
_FREE = {
    "num_workers", "report", "keep_checkpoints", "checkpoint_every", "deepspeed", "rank_timeout", "image_cache_mib",
}  # fmt: skip


def check_directory(directory: Path | None, resume: bool) -> None:
    if directory is None:
        if resume:
            raise InputError("resume=True needs output_dir, the run directory to go on with")
        return
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir={directory} is a file; give a folder")
    used = directory.is_dir() and any(directory.iterdir())
    if used and not resume:
        raise InputError(
            f"output_dir={directory} is already used: give another folder, or resume=True to go on with it"
        )
    if used and not (directory / "config.json").is_file():
        raise InputError(f"output_dir={directory} holds no run (no config.json), so there is nothing to resume")


def work_directory(directory: Path | None, settings: UnlearnConfig, stack: ExitStack) -> Path:
    if directory is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cliperase-")))
    directory.mkdir(parents=True, exist_ok=True)
    write_text_atomically(directory / "config.json", json.dumps(settings.to_dict(), indent=2) + "\n")
    return directory


def fixed_settings(settings: UnlearnConfig) -> dict[str, Any]:
    return {key: value for key, value in settings.to_dict().items() if key not in _FREE}


def resume_from(directory: Path | None, identity: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """The newest whole checkpoint, read by the first rank, on all."""
    found: list[Checkpoint] = []

    def read() -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
        checkpoint = _newest(directory, identity)
        if checkpoint is None:
            return None
        found.append(checkpoint)
        small = {**checkpoint.trainer, "optimizer": {"step": checkpoint.trainer["optimizer"]["step"]}}
        return checkpoint.path, checkpoint.state, small

    told = ranks.from_first(read)
    if told is None:
        return None
    path, state, trainer = told
    own = found[0] if found else None
    student = ranks.from_first_tensors(own.student if own else None)
    for moment in MOMENTS:
        trainer["optimizer"][moment] = ranks.from_first_tensors(own.trainer["optimizer"][moment] if own else None)
    return Checkpoint(path, state, student, trainer)


def _newest(directory: Path | None, identity: dict[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint, or None when the run was stopped before it wrote one."""
    assert directory is not None
    checkpoint = load_newest(directory / "checkpoints")
    if checkpoint is None:
        found = list_checkpoints(directory / "checkpoints")
        if found:
            raise InputError(
                f"every checkpoint in {directory / 'checkpoints'} is damaged; start again in another folder"
            )
        return None
    if checkpoint.state["format"] != FORMAT:
        raise InputError(f"{checkpoint.path} was written by another version; start again in another output_dir")
    saved = checkpoint.state["identity"]
    for name, remedy in (
        ("model", "it was made with another model"),
        ("teacher", "it was made with another teacher"),
        ("data", "it was made with other data"),
    ):
        if saved[name] != identity[name]:
            raise InputError(f"cannot resume from {checkpoint.path}: {remedy}; start again in another output_dir")
    differing = [
        f"{key} {saved['config'].get(key)!r} -> {value!r}"
        for key, value in identity["config"].items()
        if saved["config"].get(key) != value
    ]
    if differing:
        raise InputError(
            f"cannot resume from {checkpoint.path}: the settings differ ({'; '.join(differing)}); give the old ones, "
            "or start again in another output_dir"
        )
    return checkpoint
