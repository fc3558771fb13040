"""What a source holds and a data set does not: refused, or left out and counted by reason."""

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
    """Counts by reason, each with its first example."""

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

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {reason: {"count": n, "example": self.examples[reason]} for reason, n in self.counts.items()}


@dataclass
class Intake:
    """Decides what becomes of items that cannot be used, and counts them.

    on_error: "raise" refuses the first of them, "skip" leaves them out.
    skipped: items that were left out. ignored: what is beside the pairs by its nature, such as hidden files.
    """

    on_error: str = "raise"
    skipped: Tally = field(default_factory=Tally)
    ignored: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise InputError(f"on_error={self.on_error!r} is not one of {', '.join(ON_ERROR)}")

    def fault(self, reason: str, message: str, count: int = 1) -> None:
        """An item cannot be used. The message names it and a remedy."""
        if self.on_error == "raise":
            raise InputError(f"{message}, or pass on_error='skip' to leave it out and count it")
        self.skipped.add(reason, message, count)

    def require_some(self, left: int, name: str, nothing: str) -> None:
        """Raise InputError, with the first fault, where nothing is left."""
        if left == 0:
            first = next(iter(self.skipped.examples.values()), None)
            skipped = f": all {len(self.skipped)} were left out (the first: {first})" if first else ""
            raise InputError(f"{name} {nothing}{skipped}")

    @classmethod
    def merged(cls, parts: Iterable[Intake]) -> Intake:
        """The counts of all parts; a part that occurs twice counts once."""
        whole = cls()
        for part in {id(part): part for part in parts}.values():
            whole.skipped.update(part.skipped)
            whole.ignored.update(part.ignored)
        return whole


def _is_invisible(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, zero-width and control characters."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def caption_fault(caption: Any) -> tuple[str, str] | None:
    """(reason, what is wrong) for a text that cannot be a caption, else None."""
    if isinstance(caption, float) and math.isnan(caption):
        return "caption is missing", "is NaN, by which pandas marks a missing text (dropna() leaves such rows out)"
    if not isinstance(caption, str):
        return "caption is not text", f"is a {type(caption).__name__}"
    if not caption.strip() or (not caption.isascii() and _is_invisible(caption)):
        return "empty caption", "is empty"
    if len(caption) > MAX_CAPTION:
        return "caption too long", f"has {len(caption)} characters, more than {MAX_CAPTION}"
    if not caption.isascii() and has_surrogates(caption):
        return "caption is not Unicode", "holds half of a character (a lone surrogate)"
    return None
