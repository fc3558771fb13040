"""The log of a ledger: JSON lines, each of which holds the SHA-256 of the line before it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.reading import printable_data, read_text
from cliperase_fast.storage import write_text_atomically, writing

FORMAT = 1
FILE = "log.jsonl"
_LARGEST = 1 << 28  # bytes of a file that is read
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_START = "0" * 64  # what the first line holds as the digest of the line before it
_ALWAYS = {
    "base": ("reference", "weights"),
    "forget": ("id", "date", "selection", "settings", "before", "weights", "steps", "audits"),
    "undo": ("id", "date", "of", "how", "before", "weights", "steps", "audits"),
}  # the keys that the lines of each kind must have, besides "kind" and "previous"


@dataclass(frozen=True)
class Step:
    """A stored delta.

    id: the request that it is of. file: relative to the ledger. sha256: of the file. accepted: the association at
    which the run called the request forgotten, see `work._accepted`.
    """

    id: str
    file: str
    sha256: str
    kind: str = "forget"  # or "merge", the delta that takes a request back
    accepted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class Entry:
    """A line of the log.

    number: of the line, from 0 for the base. hash: SHA-256 of the line's bytes; that of the last one is the head.
    content: what the line holds.
    """

    number: int
    hash: str
    content: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Entry {self.number}: {self.kind} {self.id}>"

    @property
    def kind(self) -> str:
        """ "base", "forget" or "undo"."""
        return self.content["kind"]

    @property
    def id(self) -> str:
        return self.content.get("id", "base")

    @property
    def of(self) -> str | None:
        """The request that this line takes back, if it takes one back."""
        return self.content.get("of")

    @property
    def weights(self) -> str:
        """SHA-256 of the weights after this line."""
        return self.content["weights"]

    @property
    def steps(self) -> list[Step]:
        """The deltas that lead from the base to the weights after this line, in their order."""
        return [Step(**step) for step in self.content.get("steps", [])]

    @property
    def audits(self) -> dict[str, dict[str, Any]]:
        """What was measured after this line, by request; see `measuring.summarise`."""
        return self.content.get("audits", {})

    @property
    def prepared(self) -> dict[str, dict[str, Any]]:
        """The states after this line without an earlier request, by that request; see `Ledger.forget`."""
        return self.content.get("prepared", {})

    @property
    def returned(self) -> list[str]:
        """The requests whose pairs were above the target after this line, although they must be forgotten."""
        return returned(self.audits)


@dataclass
class Log:
    """All lines of a ledger's log."""

    path: Path
    entries: list[Entry] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read the log and check its chain. Raises `UnlearningError` for a line that was changed or cut."""
        text = read_text(path, _LARGEST, "the log ")
        if not text.endswith("\n"):
            raise UnlearningError(f"{path} is damaged: its last line is cut; restore the file from a copy")
        entries: list[Entry] = []
        previous = _START
        for number, line in enumerate(text.split("\n")[:-1]):
            content = _parsed(line, path, number)
            if content["previous"] != previous:
                raise UnlearningError(
                    f"{path} was changed: line {number + 1} continues {content['previous'][:12]}… and line {number} "
                    f"has {previous[:12]}…; restore the file from a copy"
                )
            previous = hashlib.sha256(line.encode("utf-8")).hexdigest()
            entries.append(Entry(number, previous, content))
        return cls(path, entries)

    @property
    def base(self) -> Entry:
        return self.entries[0]

    @property
    def last(self) -> Entry:
        return self.entries[-1]

    @property
    def head(self) -> str:
        return self.last.hash

    def append(self, content: Mapping[str, Any]) -> Entry:
        """Add a line and flush it to disk. A crash leaves the log with or without all of it."""
        lines = self.path.read_text(encoding="utf-8") if self.entries else ""
        previous = self.head if self.entries else _START
        line = json.dumps({**printable_data(dict(content)), "previous": previous}, allow_nan=False)
        with writing(self.path):
            write_text_atomically(self.path, f"{lines}{line}\n")
        found = Entry(len(self.entries), hashlib.sha256(line.encode("utf-8")).hexdigest(), json.loads(line))
        self.entries.append(found)
        return found

    def requests(self) -> Iterator[Entry]:
        """Yield the lines that forget, undone ones too."""
        return (entry for entry in self.entries if entry.kind == "forget")

    def undone(self) -> dict[str, Entry]:
        """Return the lines that take a request back, by that request."""
        return {entry.of: entry for entry in self.entries if entry.of is not None}

    def active(self) -> list[Entry]:
        """Return the requests that are in force, in their order."""
        undone = self.undone()
        return [entry for entry in self.requests() if entry.id not in undone]

    def find(self, id: str) -> Entry:
        """Return the line of a request. Raises `InputError` for an unknown one."""
        for entry in self.requests():
            if entry.id == id:
                return entry
        known = ", ".join(entry.id for entry in self.requests()) or "none yet"
        raise InputError(f"{self.path.parent} has no request {id!r}; its requests are: {known}")


def returned(audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the requests that must be forgotten and are above the target. audits: of a line, by request."""
    return [id for id, found in audits.items() if not found["undone"] and found["at_target"] is False]


def check_id(id: str) -> str:
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise InputError(
            f"id={id!r} is not usable: give 1 to 64 of a-z, A-Z, 0-9, '.', '_' and '-', the first a letter or digit"
        )
    return id


def checked_date(date: str | None) -> str:
    """Return a date or time in ISO 8601 as it is given; the time now in UTC for None."""
    if date is None:
        return datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        datetime.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise InputError(f"date={date!r} is not a date: write it as 2026-03-01 or 2026-03-01T12:00:00+00:00") from error
    return date


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UnlearningError(
            f"{path} is damaged: line {number + 1} is not JSON ({error}); restore it from a copy"
        ) from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if number == 0 and isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} has format {content['format']!r}, and this version reads {FORMAT}: use a newer cliperase_fast"
        )
    missing = [key for key in ("previous", *_ALWAYS.get(kind, ())) if key not in content] if kind in _ALWAYS else [kind]
    if missing or (number == 0) != (kind == "base"):
        raise UnlearningError(
            f"{path} is damaged: line {number + 1} is not a line of a ledger; restore the file from a copy"
        )
    return content
