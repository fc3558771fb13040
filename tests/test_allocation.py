"""Memory that is freed in a block of `reuse_freed_memory` serves later allocations and is returned at its end."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch

from cliperase_fast import allocation
from cliperase_fast.allocation import reuse_freed_memory

PAGES = 2**26 // resource.getpagesize()  # of the tensor below


def use_memory() -> None:
    """Fill a tensor of 64 MiB, more than glibc keeps, and free it."""
    torch.ones(2**24, dtype=torch.float32, device="cpu")


def faults() -> int:
    """Return how many pages the kernel has to provide for the tensor once the heap has grown to hold it."""
    for _ in range(3):
        use_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.libc_ver()[0] == "glibc"
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def test_freed_memory_is_reused_inside_the_block_only() -> None:
    with reuse_freed_memory():
        assert faults() < PAGES / 50
    assert faults() > PAGES / 2


def test_an_inner_block_leaves_the_outer_one_open() -> None:
    with reuse_freed_memory():
        with reuse_freed_memory():
            pass
        assert faults() < PAGES / 50


def test_memory_is_returned_at_the_end_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), reuse_freed_memory():
        use_memory()
        held = resident()
        _ = 1 / 0
    assert held - resident() > PAGES / 2


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"])
def test_settings_of_the_environment_win(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1000")
    with reuse_freed_memory():
        assert faults() > PAGES / 2


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_glibc", lambda: None)
    with reuse_freed_memory():
        assert faults() > PAGES / 2
