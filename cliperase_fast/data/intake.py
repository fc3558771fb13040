"""Refuse the items of a source that cannot be used, or leave them out and count them by reason."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cliperase_fast.errors import InputError
from cliperase_fast.reading import has_surrogates, printable

ON_ERROR = ("raise", "skip")
MAX_CAPTION = 1 << 20  # bytes


class ItemError(InputError):
    """One item cannot be used. `reason` is the same for all items with this kind of fault."""

    def __init__(self, message: str, reason: str = "image cannot be read") -> None:
        super().__init__(message)
        self.reason = reason


class Tally:
    """Count items by reason, with the first example of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, reason: str, example: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, printable(example))

    def update(self, other: Tally) -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def take(self) -> Tally:
        """Return the counts so far, and count from zero again."""
        taken = Tally()
        taken.counts, taken.examples, self.counts, self.examples = self.counts, self.examples, {}, {}
        return taken

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {reason: {"count": n, "example": self.examples[reason]} for reason, n in self.counts.items()}


@dataclass
class Intake:
    """Decide what happens to items that cannot be used, and count them.

    on_error: "raise" refuses the first one, "skip" leaves them out.
    skipped: the items left out. ignored: what is never part of the pairs, such as hidden files.
    """

    on_error: str = "raise"
    skipped: Tally = field(default_factory=Tally)
    ignored: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise InputError(f"on_error={self.on_error!r} is not one of {', '.join(ON_ERROR)}")

    def fault(self, reason: str, message: str, count: int = 1) -> None:
        """Report an item that cannot be used. The message names it and the fix."""
        if self.on_error == "raise":
            raise InputError(f"{message}, or pass on_error='skip' to leave it out and count it")
        self.skipped.add(reason, message, count)

    def require_some(self, left: int, name: str, nothing: str) -> None:
        """Raise `InputError` with the first fault if nothing is left."""
        if left == 0:
            first = next(iter(self.skipped.examples.values()), None)
            skipped = f": all {len(self.skipped)} were left out (the first: {first})" if first else ""
            raise InputError(f"{name} {nothing}{skipped}")

    @classmethod
    def merged(cls, parts: Iterable[Intake]) -> Intake:
        """Return the counts of all parts; a part that occurs twice counts once."""
        whole = cls()
        for part in {id(part): part for part in parts}.values():
            whole.skipped.update(part.skipped)
            whole.ignored.update(part.ignored)
        return whole


def _is_invisible(text: str) -> bool:
    """Return whether a text has only spaces, zero-width and control characters."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def caption_fault(caption: Any) -> tuple[str, str] | None:
    """Return (reason, what is wrong) for a text that cannot be a caption, else None."""
    if isinstance(caption, float) and math.isnan(caption):
        return "caption is missing", "is NaN, pandas' mark of a missing text (dropna() removes such rows)"
    if not isinstance(caption, str):
        return "caption is not text", f"is a {type(caption).__name__}"
    if not caption.strip() or (not caption.isascii() and _is_invisible(caption)):
        return "empty caption", "is empty"
    if len(caption) > MAX_CAPTION:
        return "caption too long", f"has {len(caption)} characters, more than {MAX_CAPTION}"
    if not caption.isascii() and has_surrogates(caption):
        return "caption is not Unicode", "contains half a character (a lone surrogate)"
    return None
