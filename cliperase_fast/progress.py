"""How far long work is: a bar where one can be seen, and now and then a line through Python's logging elsewhere.

The logger is "cliperase_fast". The library adds no handler: `logging.basicConfig(level=logging.INFO)` shows the lines.
"""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

log = logging.getLogger("cliperase_fast")
log.addHandler(logging.NullHandler())

SECONDS = 15.0  # between two lines of work that goes on

_said = time.monotonic()  # when the last line was written, by any work


def say(message: str, *values: object) -> None:
    """A line for a new phase, or for something to be known."""
    global _said
    _said = time.monotonic()
    log.info(message, *values)


class Steps:
    """Counts the steps of one piece of work. A context manager.

    what: the work, in a word or two. unit: of a step. bar: draw a bar on standard error; otherwise lines are logged,
    at most one in `SECONDS`. leave: whether a full bar stays on the screen.
    """

    def __init__(self, total: int, what: str, unit: str, *, bar: bool, initial: int = 0, leave: bool = False) -> None:
        self.total, self.what, self.unit, self.lines = total, what, unit, not bar
        self.done = self.first = initial
        self.note = ""
        self._began = time.monotonic()
        self._bar = tqdm(
            total=total, initial=initial, desc=what, unit=unit, leave=leave, disable=not bar or initial >= total
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more steps are done; `note` is what to know of the last one, such as its loss."""
        self.done += count
        if self.lines:
            if time.monotonic() - _said >= SECONDS:
                say("%s", self.line(note))
            return
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def line(self, note: str = "") -> str:
        parts = [f"{self.what}: {self.unit} {self.done} of {self.total}"]
        if note:
            parts.append(note)
        if self.first < self.done < self.total:
            rate = (time.monotonic() - self._began) / (self.done - self.first)
            parts.append(f"about {duration(rate * (self.total - self.done))} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time span for a reader."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
