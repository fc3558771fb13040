"""Files of requests that did not finish: they are written before the line that names them.

Before a delta or an audit is written, its name is noted in the folder of unfinished runs. The next line that is
recorded removes the noted files that no line names, so that nothing is removed that the ledger did not write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cliperase_fast.ledger.log import Log
from cliperase_fast.storage import draft_of, write_all

AUDITS, DELTAS, WORK = "audits", "deltas", "work"
_NOTED = "files.txt"  # in WORK: names relative to the ledger, one a line
_NAME = re.compile(rf"({AUDITS}|{DELTAS})/\d{{4,}}-[A-Za-z0-9._-]+\.(json|safetensors)")
_LARGEST = 1 << 24  # bytes of the list that are read


def note_file(folder: Path, file: str) -> None:
    """Note the name of a file that is about to be written, and flush it to disk."""
    (folder / WORK).mkdir(exist_ok=True)
    handle = os.open(folder / WORK / _NOTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        write_all(handle, f"\n{file}\n".encode())  # a crash may have cut the line before
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, log: Log) -> None:
    """Remove the noted files that no line names. The ledger must be locked."""
    named = _named(log)
    for file in noted_files(folder):
        if file not in named:
            for path in (folder / file, draft_of(folder / file)):
                with suppress(OSError):  # `verify` names what is still there
                    path.unlink(missing_ok=True)


def unnamed_files(folder: Path, log: Log) -> list[str]:
    """Return the files beside deltas and audits that no line names, relative to the ledger."""
    named, found = _named(log), []
    for part in (DELTAS, AUDITS):
        with suppress(FileNotFoundError):
            found += [f"{part}/{path.name}" for path in (folder / part).iterdir()]
    return sorted(file for file in found if file not in named)


def noted_files(folder: Path) -> set[str]:
    """Return the names of the files that requests have written since the last line was recorded."""
    try:
        with (folder / WORK / _NOTED).open("rb") as file:
            lines = file.read(_LARGEST).decode("utf-8", "replace").split("\n")
    except OSError:
        return set()
    return {line for line in lines if _NAME.fullmatch(line)}


def _named(log: Log) -> set[str]:
    found: set[str] = set()
    for entry in log.entries:
        found.update(entry.content.get("deltas", {}))
        found.update(step.file for step in entry.steps)
        found.update(_audit_files(entry.audits))
        for state in entry.prepared.values():
            found.update(step["file"] for step in state["steps"])
            found.update(_audit_files(state["audits"]))
    return found


def _audit_files(audits: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    return (audit["file"] for audit in audits.values())
