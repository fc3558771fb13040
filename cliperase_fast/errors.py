"""The two kinds of error that users see. Each message says what is wrong, the value, and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class InputError(ValueError):
    """An input is wrong (exit code 2). Raised before work starts and before anything is written."""


class UnlearningError(RuntimeError):
    """The work failed (exit code 1), for example because the loss became NaN. What was saved before stays."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. On the CPU torch raises a plain RuntimeError for that."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator:" in str(error)


@contextmanager
def tell_out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory inside the block into an `UnlearningError` with what was being done and the fix."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, UnlearningError) or not is_out_of_memory(error):
            raise
        raise UnlearningError(f"out of memory while {doing}: {remedy} ({first_line(error)})") from error
