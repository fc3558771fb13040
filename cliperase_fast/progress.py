"""Show the progress of long work: a bar on a terminal or in a notebook, or lines through Python's logging.

The logger is "cliperase_fast". The library adds no handler; `logging.basicConfig(level=logging.INFO)` shows the lines.
"""

from __future__ import annotations

import logging
import sys
import time

from tqdm.auto import tqdm

log = logging.getLogger("cliperase_fast")
log.addHandler(logging.NullHandler())

SECONDS = 15.0  # between two lines of the same work

_said = time.monotonic()  # when the last line was logged, by any work


def say(message: str, *values: object) -> None:
    """Log a line, for a new phase or an event."""
    global _said
    _said = time.monotonic()
    log.info(message, *values)


def bars_by_default() -> bool:
    """Return whether progress bars are shown where the caller did not say: whether standard error is a terminal.

    There is none in a process without standard error, and an object that replaces it may lack the method.
    """
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, OSError, ValueError):  # ValueError: it was closed
        return False


class Steps:
    """Count the steps of one piece of work. A context manager.

    what: the work, in a word or two. unit: the name of a step. bar: draw a bar, on standard error or as a notebook's
    widget; otherwise, and in a process without standard error, log at most one line per `SECONDS`. leave: keep the
    finished bar on the screen.
    """

    def __init__(self, total: int, what: str, unit: str, *, bar: bool, initial: int = 0, leave: bool = False) -> None:
        bar = bar and sys.stderr is not None
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
        """Report `count` more steps. note: shown beside them, such as the last loss."""
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
    """Return a time span in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
