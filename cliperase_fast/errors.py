"""The two kinds of error a user meets; every message names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class InputError(ValueError):
    """Something the caller gave is wrong (exit code 2). Raised before work starts and anything is written."""


class UnlearningError(RuntimeError):
    """The work itself failed (exit code 1), for example a loss that became NaN. What was saved before stays."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, for which torch has a class of error on a GPU and a plain RuntimeError on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator:" in str(error)


@contextmanager
def tell_out_of_memory(doing: str, remedy: str) -> Iterator[None]:
    """Make an UnlearningError of memory that runs out inside, which says what was being done and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, UnlearningError) or not is_out_of_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise UnlearningError(f"out of memory while {doing}: {remedy} ({said})") from error
