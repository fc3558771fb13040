"""Reuse freed memory inside a block, instead of returning it to the operating system and asking for it again."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# In a block: no mappings of single allocations, and no trimming of the heap.
_REUSE = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# Afterwards: glibc's default number of mappings, and the thresholds at which its own adjustment stops.
_RETURN = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}

_lock = threading.Lock()
_open_blocks = 0


@contextmanager
def reuse_freed_memory() -> Iterator[None]:
    """Let the C library keep freed memory of the CPU for later allocations, in a block or a decorated function.

    glibc maps every allocation above 32 MiB anew and unmaps it when it is freed, and it returns the free end of the
    heap. The kernel then clears the pages of each activation in every training step. In the block, memory stays with
    the process; afterwards it is returned. The setting belongs to the process. It is not changed where the environment
    sets malloc's parameters (MALLOC_*, GLIBC_TUNABLES), and other C libraries have none.
    """
    global _open_blocks
    library = _glibc()
    if library is None or _set_by_user():
        yield
        return
    with _lock:
        _open_blocks += 1
        if _open_blocks == 1:
            _set(library, _REUSE)
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if _open_blocks == 0:
                _set(library, _RETURN)
                library.malloc_trim(0)


@cache
def _glibc() -> Any:
    """Return the C library of the process if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return (
        library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    )


def _set_by_user() -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
    return any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _set(library: Any, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        library.mallopt(parameter, value)
