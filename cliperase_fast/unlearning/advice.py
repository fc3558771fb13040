"""What the errors of a run tell its caller to do. Callers that make runs for their own users have other arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """The words that name a run's folder and what to do, by default those for users of `unlearn()`.

    place: what comes before the path of the folder. room: what makes room beside freeing space; {keep} is the number of
    checkpoints. elsewhere: how to use another folder. afresh: how to begin again. go_on: how to go on with the run.
    """

    place: str = "output_dir="
    room: str = "use an output_dir on another disk, or fewer keep_checkpoints (now {keep})"
    elsewhere: str = "give another folder"
    afresh: str = "start again in another output_dir"
    go_on: str = "go on with resume=True"


_DEFAULT = Advice()
_given: ContextVar[Advice] = ContextVar("_given", default=_DEFAULT)


def advice() -> Advice:
    return _given.get()


@contextmanager
def advising(given: Advice) -> Iterator[None]:
    """Give this advice in the errors of the runs inside the block."""
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)
