"""The defaults of torch that users set for their own code, and which no result of the package may depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DEFAULTS = ("float64", "bfloat16", "float16", "meta")  # dtypes, and a device on which nothing can be computed


@contextmanager
def torch_default(name: str) -> Iterator[None]:
    """With that default dtype, or that default device, and nothing else changed."""
    if name == "meta":
        torch.set_default_device("meta")
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        if name == "meta":
            torch.set_default_device(None)
        else:
            torch.set_default_dtype(before)


def assert_independent(name: str, run: Callable[[], Sequence[Tensor]]) -> None:
    """`run` gives the same bits, dtypes and devices with the default `name` as without."""
    expected = run()
    with torch_default(name):
        found = run()
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert (ours.dtype, ours.device, ours.shape) == (theirs.dtype, theirs.device, theirs.shape), place
        assert torch.equal(ours, theirs), place
