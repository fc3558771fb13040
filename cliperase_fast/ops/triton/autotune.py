"""Search for faster launch configurations on the current GPU, on request, and save them.

With CLIPERASE_AUTOTUNE=1, a sweep that first needs a configuration for a dtype and width searches for it; this takes
minutes and prints its progress. The result is saved in $CLIPERASE_CACHE (by default ~/.cache/cliperase_fast) and also
used when the variable is unset. CLIPERASE_AUTOTUNE=0 selects the shipped configurations.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from cliperase_fast.errors import InputError
from cliperase_fast.ops.triton.configs import Config, Configs
from cliperase_fast.storage import cache_root

VARIABLE = "CLIPERASE_AUTOTUNE"

# Returns the time of one kernel, which is a field of Configs, with these configurations, in ms.
Timer = Callable[[Configs, str], float]


def configs(device: torch.device, dtype: torch.dtype, width: int, shipped: Configs, timer: Timer) -> Configs:
    """Return the configurations saved for this GPU, or `shipped`. width: that of the widest features."""
    asked = os.environ.get(VARIABLE) or ""
    if asked not in ("", "0", "1"):
        raise InputError(
            f"{VARIABLE}={asked} must be 1 (search), 0 (use the shipped configurations) or unset (use saved ones)"
        )
    if asked == "0":
        return shipped
    path, key = saved_path(device), f"{str(dtype).removeprefix('torch.')}, width {triton.next_power_of_2(width)}"
    found = load(path)
    if key not in found and asked == "1" and not torch.cuda.is_current_stream_capturing():
        properties: Any = torch.cuda.get_device_properties(device)  # not every torch declares the field
        limit = properties.shared_memory_per_block_optin
        found = {**found, key: search(key, shipped, dtype.itemsize, limit, timer)}
        save(path, found)
    return found.get(key, shipped)


def search(
    what: str, shipped: Configs, itemsize: int, shared_bytes: int, timer: Timer, seconds: float = float("inf")
) -> Configs:
    """Return the fastest configuration of each kernel; prints progress to stderr.

    itemsize: bytes a feature. seconds: for each kernel, after which no other configuration is tried.
    """
    best = shipped
    for field in fields(Configs):
        start: Config = getattr(shipped, field.name)
        times: dict[Config, float] = {}
        began = time.monotonic()
        for config in (start, *(other for other in candidates(itemsize, shared_bytes) if other != start)):
            if time.monotonic() - began > seconds:
                break
            try:
                times[config] = timer(replace(shipped, **{field.name: config}), field.name)
            except OutOfResources:
                continue  # needs more shared memory than estimated
            fastest = min(times, key=lambda c: times[c])
            _show(
                f"\rtuning {what}, {field.name}: {len(times)} tried, best {times[fastest]:.3f} ms, "
                f"shipped {times.get(start, float('nan')):.3f} ms "
            )
        _show("\n")
        best = replace(best, **{field.name: min(times, key=lambda c: times[c])})
    return best


def _show(text: str) -> None:
    """Write to standard error, if there is one; `print` would take standard output in its place."""
    if sys.stderr is not None:
        print(text, end="", file=sys.stderr, flush=True)


def candidates(itemsize: int, shared_bytes: int) -> Iterator[Config]:
    """Yield configurations to try, whose tiles fit the shared memory of a block."""
    deep = 128 // itemsize  # 128 bytes of each row, the widest swizzle of the copy engines
    for block_m, block_n in ((64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (128, 256), (256, 128)):
        # With 4 warps two blocks of threads can be on a multiprocessor, and one computes while the other loads.
        for warps in (4, 8) if block_m * block_n <= 64 * 128 else (8,):
            for block_k, stages in product((deep // 2, deep), (2, 3, 4)):
                tiles_bytes = (block_m + block_n) * block_k * itemsize * stages
                if tiles_bytes <= shared_bytes:
                    yield Config(block_m, block_n, block_k, warps, stages)
                if 2 * tiles_bytes <= shared_bytes:  # tiles of student and teacher at a time
                    yield Config(block_m, block_n, block_k, warps, stages, shared=True)


def saved_path(device: torch.device) -> Path:
    gpu = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device)).lower()
    return cache_root() / "triton" / f"{gpu}-torch{torch.__version__}-triton{triton.__version__}.json"


@lru_cache(maxsize=8)
def load(path: Path) -> dict[str, Configs]:
    """Return what `save` wrote; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: Configs(**{way: Config(**config) for way, config in ways.items()}) for key, ways in content.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a valid list of kernel configurations ({error}); delete it") from error


def save(path: Path, found: dict[str, Configs]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps({key: asdict(value) for key, value in found.items()}, indent=1), encoding="utf-8")
    partial.replace(path)  # complete or absent
    load.cache_clear()
