"""Describe where and when something was measured, for every result file, and locate this package."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cliperase_fast._version import installed_versions
from cliperase_fast.ops.native import extension

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # what is committed; there in a checkout only
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()  # else installed, as cliperase_fast.benchmarks


def own_folder() -> Path:
    """Where a record goes that nobody gave a place: out of git's sight in a checkout, else the current folder."""
    return ROOT / "runs" / "bench" if IN_CHECKOUT else Path()


def run_module(name: str, *words: str, timeout: float | None = None) -> str:
    """What a module of this package prints in a process of its own.

    Raises MemoryError where the process was killed, TimeoutExpired, and RuntimeError with its last words.
    """
    command = [sys.executable, "-m", f"{__package__}.{name}", *words]
    done = subprocess.run(
        command, cwd=ROOT if IN_CHECKOUT else None, capture_output=True, text=True, check=False, timeout=timeout
    )
    if done.returncode < 0:
        raise MemoryError(f"ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no words"])[-1])
    return done.stdout


def resident(field: str) -> int:
    """Return a size of this process in bytes, as Linux has it: VmRSS now, VmHWM at its peak, RssAnon without files."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def describe() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "machine": {
            "processor": _processor(),
            "abilities": _abilities(),
            "native": _instruction_set(),
            "torch_cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "capability": _capability(),
            "system": platform.system(),
        },
        "versions": installed_versions("torch", "triton", "open_clip_torch", "numpy"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _capability() -> str | None:
    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


# Linux's names of the instructions that decide how fast matrix products are.
_DECISIVE = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


def abilities_text(machine: Mapping[str, Any]) -> str:
    """For a table's foot: what the processor can do, and whose code ran. Older records do not say."""
    if "abilities" not in machine:
        return "processor's abilities not recorded"
    able = " ".join(machine["abilities"]) or "none of those that matter"
    return (
        f"{able}; native: {machine['native']}; torch: {machine['torch_cpu']}; "
        f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    )


def _abilities() -> list[str]:
    there = _cpu_field("flags").split() or _cpu_field("Features").split()
    return [name for name in _DECISIVE if name in there]


def _instruction_set() -> str:
    """That of the extension's code which runs here, or why none does."""
    if extension.why_missing() is not None:
        return "not available"
    return extension.load().cpu.instruction_set(extension.instruction_set())


def _processor() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    """Of the first processor, as Linux says it; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.partition(":")[0].strip() == name:
                return line.partition(":")[2].strip()
    return ""


def _commit() -> str:
    """The commit measured; `+` after it says that the working tree had changes. An installed version has none."""
    if not IN_CHECKOUT:
        return "unknown"
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
