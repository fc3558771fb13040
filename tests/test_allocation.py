"""Memory that is freed in a block of `reuse_freed_memory` serves later allocations and is returned at its end.

Each test measures a new process: one in which an allocation has failed may use another of glibc's arenas, which
always maps large allocations.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from cliperase_fast import allocation

# Loaded from its file, as the package would import torch. A bytearray of 64 MiB is more than glibc keeps.
SCRIPT = """
import importlib.util, resource, sys

spec = importlib.util.spec_from_file_location("allocation", sys.argv[1])
allocation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(allocation)
reuse_freed_memory = allocation.reuse_freed_memory
SIZE = 2**26
PAGES = SIZE // resource.getpagesize()

def faults():
    for _ in range(3):
        bytearray(SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(SIZE)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / PAGES

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / PAGES

"""


def measured(code: str, **environment: str) -> list[float]:
    """Run code after `SCRIPT` and return the numbers that it prints, as shares of the pages of the bytearray."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ours.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-I", "-c", SCRIPT + code, allocation.__file__]
    done = subprocess.run(command, env={**ours, **environment}, capture_output=True, text=True, check=True, timeout=60)
    return [float(word) for word in done.stdout.split()]


@pytest.fixture(autouse=True)
def on_glibc() -> None:
    assert platform.libc_ver()[0] == "glibc"


def test_freed_memory_is_reused_inside_the_block_only() -> None:
    inside, outside = measured("""
with reuse_freed_memory():
    print(faults())
print(faults())
""")
    assert inside < 0.02 and outside > 0.5


def test_an_inner_block_leaves_the_outer_one_open() -> None:
    (inside,) = measured("""
with reuse_freed_memory():
    with reuse_freed_memory():
        pass
    print(faults())
""")
    assert inside < 0.02


def test_memory_is_returned_at_the_end_even_after_an_error() -> None:
    held, left = measured("""
try:
    with reuse_freed_memory():
        bytearray(SIZE)
        print(resident())
        1 / 0
except ZeroDivisionError:
    print(resident())
""")
    assert held - left > 0.5


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"])
def test_settings_of_the_environment_win(name: str) -> None:
    (inside,) = measured("with reuse_freed_memory():\n    print(faults())\n", **{name: "1000"})
    assert inside > 0.5


def test_other_c_libraries_are_left_alone() -> None:
    (inside,) = measured("""
allocation._glibc = lambda: None
with reuse_freed_memory():
    print(faults())
""")
    assert inside > 0.5
