"""Rows of float32 features in a file whose note records what they were made from, and their digest.

The file is read and written, not memory-mapped: a full disk or a truncated file is then an error, not a SIGBUS.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.errors import UnlearningError
from cliperase_fast.storage import file_digest, reserve, write_all, write_text_atomically, writing
from cliperase_fast.unlearning.advice import advice

_REMEDY = "or keep the features in memory (teacher_cache='memory'), or compute them in every step (teacher_cache='off')"


class FeatureFile:
    """Features [rows, D] stored in `path`; a .json file beside it names their inputs and holds their digest.

    remedy: what to do if they cannot be written.
    """

    def __init__(self, path: Path, shape: tuple[int, int], made_from: dict[str, Any], *, remedy: str = _REMEDY) -> None:
        self._handle: int | None = None
        self.path, self.shape, self.made_from, self.remedy = path, shape, made_from, remedy
        self.note = path.with_suffix(".json")

    @property
    def size(self) -> int:
        return self.shape[0] * self._row

    @property
    def _row(self) -> int:  # bytes
        return self.shape[1] * 4

    def state(self) -> str:
        """Return "whole", "absent" (also if made from other inputs) or "damaged"."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            if not isinstance(note, dict) or "sha256" not in note:
                return "damaged"
            if note.get("made_from") != self.made_from:
                return "absent"
            return "whole" if file_digest(self.path) == note["sha256"] else "damaged"
        except FileNotFoundError:
            return "damaged" if self.note.exists() else "absent"  # without a note it was not finished
        except (OSError, ValueError, RecursionError):
            return "damaged"

    def noted(self) -> dict[str, Any]:
        """Return what the features in the file were made from; empty if its note cannot be read."""
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))["made_from"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}

    def foreign(self) -> Path | None:
        """Return a file in its place that holds something else; None if it may be created.

        A process that was killed leaves a file of the right size without a note.
        """
        if os.path.lexists(self.note):
            try:
                note = json.loads(self.note.read_text(encoding="utf-8"))
                return None if isinstance(note, dict) and {"made_from", "sha256"} <= note.keys() else self.note
            except (OSError, ValueError, RecursionError):
                return self.note
        if not os.path.lexists(self.path) or (self.path.is_file() and self.path.stat().st_size in (0, self.size)):
            return None
        return self.path

    def create(self) -> None:
        """Start a new file and reserve its whole size on the disk."""
        with writing(self.path, self.remedy):
            self.note.unlink(missing_ok=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                reserve(self._handle, self.size)
            except BaseException:
                self.discard()
                raise

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write rows [n, D] at row `start`. Parts may come in any order, each row once."""
        assert self._handle is not None
        with writing(self.path, self.remedy):
            os.lseek(self._handle, start * self._row, os.SEEK_SET)
            write_all(self._handle, np.ascontiguousarray(rows, dtype=np.float32).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Flush the file and write the note that it is complete."""
        assert self._handle is not None
        with writing(self.path, self.remedy):
            os.fsync(self._handle)
            note = {"made_from": self.made_from, "sha256": file_digest(self.path)}
            write_text_atomically(self.note, json.dumps(note))
        os.close(self._handle)
        self._handle = None

    def discard(self) -> None:
        """Close and remove the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self.path.unlink(missing_ok=True)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the features [n, D] of rows [n]."""
        out = np.empty((len(rows), self.shape[1]), dtype=np.float32)
        for row, target in zip(rows.tolist(), out, strict=True):
            self._read(row, target)
        return out

    def part(self, start: int, stop: int) -> np.ndarray:
        """Return the features [n, D] of the rows from `start` to `stop`, excluded, in one read."""
        out = np.empty((stop - start, self.shape[1]), dtype=np.float32)
        self._read(start, out)
        return out

    def _read(self, row: int, out: np.ndarray) -> None:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY)
        if os.preadv(self._handle, [out.data], row * self._row) < out.nbytes:
            raise UnlearningError(
                f"{self.path} was cut short while it was used: make sure that nothing else writes there, and "
                f"{advice().go_on}"
            )

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
