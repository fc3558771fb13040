"""Batches from loader processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from cliperase_fast.errors import InputError


def load_batches(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches; an `InputError` of a loader process in its own words, without torch's copy of the trace."""
    try:
        yield from loader
    except InputError as error:
        text = str(error).rstrip()
        if "Original Traceback" not in text:
            raise
        raise InputError(text.rpartition("\n")[2].partition(": ")[2]) from error
