"""Define the table of backends and the status that `backends()` returns.

To add a backend, write a module with a `sweep`, and add a loader and an entry here.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from packaging.version import Version

from cliperase_fast.ops import measured
from cliperase_fast.ops.calibrated import Calibrated
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.sigmoid import Sigmoid
from cliperase_fast.ops.spec import DTYPES, FeaturesKl, Sweep, SweepKernels


class Implementation(NamedTuple):
    """Hold what a backend's modules provide."""

    sweep: Sweep
    sigmoid: Sigmoid
    features_kl: FeaturesKl
    kernels: SweepKernels | None = None  # for a sharded batch; None: not supported
    calibrated: Calibrated | None = None  # None: the backend does not have this loss


# The imports are statements in functions, because torch.compile traces the first call and can trace these.
def _eager(device: str) -> Implementation:
    from cliperase_fast.ops import eager

    return Implementation(
        eager.sweep, Sigmoid(eager.sigmoid), eager.features_kl, calibrated=Calibrated(eager.calibrated)
    )


def _torch(device: str) -> Implementation:
    from cliperase_fast.ops import eager, sigmoid, streaming

    return Implementation(streaming.sweep, sigmoid.sigmoid, eager.features_kl, streaming.kernels, streaming.calibrated)


def _native(device: str) -> Implementation:
    from cliperase_fast.ops import eager
    from cliperase_fast.ops.native import cpu, cuda

    if device == "cuda":
        sweep = cuda.sweep
        if extension.wants_graphs():
            from cliperase_fast.ops.native import graphs

            sweep = graphs.sweep
        return Implementation(sweep, _torch(device).sigmoid, eager.features_kl, cuda.kernels, cuda.calibrated)
    return Implementation(cpu.sweep, cpu.sigmoid, eager.features_kl, cpu.kernels, cpu.calibrated)


def _triton(device: str) -> Implementation:
    from cliperase_fast.ops.triton.features_kl import features_kl
    from cliperase_fast.ops.triton.sigmoid import sigmoid
    from cliperase_fast.ops.triton.sweep import calibrated, kernels, sweep

    return Implementation(sweep, sigmoid, features_kl, kernels, calibrated)


# Looked up once, because torch.compile traces the choice of a backend.
_NO_NATIVE = extension.why_missing()
WRONG_INSTRUCTIONS = extension.wrong_instruction_set()
_NO_NATIVE_CUDA = _NO_NATIVE or extension.why_no_cuda()
_OLDEST_TRITON = "3.6"
_OLDEST_GPU = 8  # compute capability, major


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str | None:
    """Return why Triton cannot run here, without importing it; None if it can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed; pip install triton (Linux)"
    if Version(version) < Version(_OLDEST_TRITON):
        return f"triton {version} is installed, at least {_OLDEST_TRITON} is needed; pip install --upgrade triton"
    if _interprets_triton():
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    major, minor = torch.cuda.get_device_capability()
    if major < _OLDEST_GPU:
        return f"the GPU has compute capability {major}.{minor}, at least {_OLDEST_GPU}.0 is needed"
    return None


_NO_FLOAT64 = tuple(dtype for dtype in DTYPES if dtype != torch.float64)


@dataclass(frozen=True)
class Backend:
    """Describe one implementation of the losses. `load` imports it for a device type, on first use."""

    name: str
    load: Callable[[str], Implementation]
    note: str
    devices: tuple[str, ...] | None = None  # device types it runs on; None: any
    dtypes: tuple[torch.dtype, ...] = DTYPES
    why_missing: Callable[[], str | None] | None = None  # returns why it cannot run here; None if it can
    widest: float = math.inf  # the largest width of features
    keeps: bool = False  # whether `keep` makes a difference
    elsewhere: str = ""  # why it does not run on a device type that it supports in principle
    shards: bool = True  # whether it supports a batch that is spread over processes
    # the device types on which it has the losses "sigmoid", "calibrated", "bernoulli"; a loss left out: all `devices`
    loss_devices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loaded: dict[str, Implementation] = field(default_factory=dict, compare=False, repr=False)  # by device type

    @property
    def missing(self) -> str | None:
        """The reason why it cannot run here; None if it can."""
        return self.why_missing() if self.why_missing else None


_NOT_RUN = "" if measured.TABLE else ", not yet run on one: must be selected explicitly there"
_ON_A_GPU = "" if _NO_NATIVE_CUDA else f", CUDA on a GPU{_NOT_RUN}"

REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("eager", _eager, "plain autograd, the readable reference; holds N x N matrices", shards=False),
        Backend("torch", _torch, "strips of rows; never holds an N x N matrix"),
        Backend(
            "native",
            _native,
            f"C++ on the CPU{_ON_A_GPU}; never holds an N x N matrix",
            devices=("cpu",) if _NO_NATIVE_CUDA else ("cpu", "cuda"),
            dtypes=_NO_FLOAT64,
            why_missing=None if _NO_NATIVE is None else lambda: _NO_NATIVE,
            elsewhere=_NO_NATIVE_CUDA or "",
            widest=extension.LARGEST_WIDTH,
            keeps=True,
            loss_devices={"sigmoid": ("cpu",), "bernoulli": ()},
        ),
        Backend(
            "triton",
            _triton,
            f"fused kernels for a GPU{_NOT_RUN}; never holds an N x N matrix",
            devices=("cuda", "cpu") if _interprets_triton() else ("cuda",),
            dtypes=_NO_FLOAT64,
            why_missing=_why_no_triton,
            keeps=True,
            loss_devices={"bernoulli": ()},
        ),
    )
}


@dataclass(frozen=True)
class BackendStatus:
    """Hold the status of one backend. reason: why it is missing; empty if it is available."""

    name: str
    available: bool
    devices: str
    note: str
    reason: str


class BackendTable(Mapping[str, BackendStatus]):
    """Map each name to its BackendStatus; prints as a table."""

    def __init__(self, statuses: dict[str, BackendStatus]) -> None:
        self._statuses = statuses

    def __getitem__(self, name: str) -> BackendStatus:
        return self._statuses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statuses)

    def __len__(self) -> int:
        return len(self._statuses)

    def __repr__(self) -> str:
        rows = [("backend", "available", "devices", "note")]
        for status in self._statuses.values():
            rows.append(
                (
                    status.name,
                    "yes" if status.available else "no",
                    status.devices,
                    status.reason or status.note,
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = (
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )
        return "\n".join(lines)


def backends() -> BackendTable:
    """Return every backend, whether it is available here, and why not. Prints as a table."""
    statuses = {}
    for backend in REGISTRY.values():
        reason = backend.missing
        statuses[backend.name] = BackendStatus(
            backend.name, reason is None, _devices_here(backend), backend.note, reason or ""
        )
    return BackendTable(statuses)


def _devices_here(backend: Backend) -> str:
    """Return the backend's device types that this machine has; if it has none, those that the backend needs."""
    if backend.devices is None:
        return "any"
    here = [kind for kind in backend.devices if kind == "cpu" or torch.cuda.is_available()]
    return ", ".join(here) if here else f"needs {' or '.join(backend.devices)}"
