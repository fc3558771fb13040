"""The registry of backends and the choice among them.

A new backend is one module with a `sweep`, and a record here with the function that imports it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.ops import measured
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.sigmoid import Sigmoid
from cliperase_fast.ops.spec import FeaturesKl, Sweep, SweepKernels
from cliperase_fast.ops.transforms import refuse_on_ranks, transformed

ENVIRONMENT_VARIABLE = "CLIPERASE_BACKEND"


def _load_eager() -> Sweep:
    from cliperase_fast.ops.eager import sweep

    return sweep


def _load_torch() -> Sweep:
    from cliperase_fast.ops.streaming import sweep

    return sweep


def _load_torch_kernels() -> SweepKernels:
    from cliperase_fast.ops.streaming import kernels

    return kernels


def _load_native_kernels() -> SweepKernels:
    from cliperase_fast.ops.native.sweep import kernels

    return kernels


def _load_triton_kernels() -> SweepKernels:
    from cliperase_fast.ops.triton.sweep import kernels

    return kernels


def _load_triton() -> Sweep:
    from cliperase_fast.ops.triton.sweep import sweep

    return sweep


def _load_native() -> Sweep:
    from cliperase_fast.ops.native.sweep import sweep

    return sweep


def _load_eager_sigmoid() -> Sigmoid:
    from cliperase_fast.ops.eager import sigmoid

    return Sigmoid(sigmoid)


def _load_torch_sigmoid() -> Sigmoid:
    from cliperase_fast.ops.sigmoid import sigmoid

    return sigmoid


def _load_native_sigmoid() -> Sigmoid:
    from cliperase_fast.ops.native.sigmoid import sigmoid

    return sigmoid


def _load_triton_sigmoid() -> Sigmoid:
    from cliperase_fast.ops.triton.sigmoid import sigmoid

    return sigmoid


# Looked at once: torch.compile traces `choose`, and a look is an import.
_NO_NATIVE = extension.why_missing()
_NO_NATIVE_CUDA = _NO_NATIVE or extension.why_no_cuda()


def _load_plain_features_kl() -> FeaturesKl:
    from cliperase_fast.ops.eager import features_kl

    return features_kl


def _load_triton_features_kl() -> FeaturesKl:
    from cliperase_fast.ops.triton.features_kl import features_kl

    return features_kl


def _always_available() -> str | None:
    return None


_OLDEST_TRITON = (3, 6)
_OLDEST_GPU = 8  # compute capability, major


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str | None:
    """Looks at what is installed, without importing it."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed; pip install triton (Linux)"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {version} is installed, at least {oldest} is needed; pip install --upgrade triton"
    if _interprets_triton():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    major, minor = torch.cuda.get_device_capability()
    if major < _OLDEST_GPU:
        return f"the GPU has compute capability {major}.{minor}, at least {_OLDEST_GPU}.0 is needed"
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the sweep. `load` imports its module, when first used, for its `sweep`."""

    name: str
    load: Callable[[], Sweep]
    note: str
    devices: tuple[str, ...] | None = None  # device types it runs on; None: any
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    why_missing: Callable[[], str | None] = _always_available  # why it cannot run here; None when it can
    load_features_kl: Callable[[], FeaturesKl] = _load_plain_features_kl
    keeps: bool = False  # whether `keep` makes a difference
    elsewhere: str = ""  # why it does not run on a device type that it could run on
    load_kernels: Callable[[], SweepKernels] | None = None  # what it sweeps the shards of a batch with; None: it cannot
    load_sigmoid: Callable[[], Sigmoid] = _load_torch_sigmoid
    sigmoid_devices: tuple[str, ...] | None = None  # where it has the sigmoid loss, of those it runs on; None: all


_NOT_RUN = "" if measured.TABLE else ", not yet run on one: must be selected explicitly there"
_ON_A_GPU = "" if _NO_NATIVE_CUDA else f", CUDA on a GPU{_NOT_RUN}"

REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "eager",
            _load_eager,
            "plain autograd, the readable reference; holds N x N matrices",
            load_sigmoid=_load_eager_sigmoid,
        ),
        Backend("torch", _load_torch, "strips of rows; never holds an N x N matrix", load_kernels=_load_torch_kernels),
        Backend(
            "native",
            _load_native,
            f"C++ on the CPU{_ON_A_GPU}; never holds an N x N matrix",
            devices=("cpu",) if _NO_NATIVE_CUDA else ("cpu", "cuda"),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            why_missing=lambda: _NO_NATIVE,
            elsewhere=_NO_NATIVE_CUDA or "",
            keeps=True,
            load_kernels=_load_native_kernels,
            load_sigmoid=_load_native_sigmoid,
            sigmoid_devices=("cpu",),
        ),
        Backend(
            "triton",
            _load_triton,
            f"fused kernels for a GPU{_NOT_RUN}; never holds an N x N matrix",
            devices=("cuda", "cpu") if _interprets_triton() else ("cuda",),
            dtypes=(torch.float16, torch.bfloat16, torch.float32),
            why_missing=_why_no_triton,
            load_features_kl=_load_triton_features_kl,
            keeps=True,
            load_kernels=_load_triton_kernels,
            load_sigmoid=_load_triton_sigmoid,
        ),
    )
}


@dataclass(frozen=True)
class BackendStatus:
    """What `backends()` says of one backend. reason: why it is missing; empty when it is available."""

    name: str
    available: bool
    devices: str
    note: str
    reason: str


class BackendTable(Mapping[str, BackendStatus]):
    """name -> BackendStatus; printed as a table."""

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
    """Every backend, whether it is available here, and why a missing one is missing. Prints as a table."""
    statuses = {}
    for backend in REGISTRY.values():
        reason = backend.why_missing()
        statuses[backend.name] = BackendStatus(
            backend.name, reason is None, _devices_here(backend), backend.note, reason or ""
        )
    return BackendTable(statuses)


def _devices_here(backend: Backend) -> str:
    """Those that this machine has; where it has none of them, what the backend would need."""
    if backend.devices is None:
        return "any"
    here = [kind for kind in backend.devices if kind == "cpu" or torch.cuda.is_available()]
    return ", ".join(here) if here else f"needs {' or '.join(backend.devices)}"


def choose(
    requested: str,
    image: Tensor,
    text: Tensor,
    *teacher: Tensor | None,
    sharded: bool = False,
    sigmoid: bool = False,
) -> Backend:
    """The backend for these features. `requested`: a name, or "auto", which CLIPERASE_BACKEND overrides.

    teacher: the teacher's features, where they are used. sharded: the batch is spread over processes. sigmoid: for that
    loss, which not every backend has on every device. Under transforms of `torch.func` every one gives way to "eager".

    Raises InputError when it is unknown, not available here, or cannot take this device or dtype.
    """
    features = [tensor for tensor in (image, text, *teacher) if tensor is not None]
    backend = _asked_for(requested, features, sharded, sigmoid)
    if backend.name == "eager" or not transformed(*features):
        return backend
    if sharded:
        refuse_on_ranks(*features)
    return REGISTRY["eager"]


def _asked_for(requested: str, features: list[Tensor], sharded: bool, sigmoid: bool) -> Backend:
    image = features[0]
    origin = f"backend={requested!r}"
    if requested == "auto":
        from_environment = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        if from_environment in ("", "auto"):
            return _automatic(features, sharded, sigmoid)
        requested, origin = from_environment, f"{ENVIRONMENT_VARIABLE}={from_environment}"
    if not isinstance(requested, str) or requested not in REGISTRY:
        raise InputError(f"{origin} is not a backend; use auto, {', '.join(REGISTRY)}")
    backend = REGISTRY[requested]
    reason = backend.why_missing()
    if reason is not None:
        others = ", ".join(other.name for other in REGISTRY.values() if other.why_missing() is None)
        raise InputError(f"{origin} is not available here: {reason}. Available are auto, {others}")
    if backend.devices is not None and image.device.type not in backend.devices:
        why = f" ({backend.elsewhere})" if backend.elsewhere else ""
        raise InputError(
            f"{origin} runs on {', '.join(backend.devices)}, not on {image.device}{why}; use backend='auto'"
        )
    if sharded and backend.load_kernels is None:
        able = ", ".join(other.name for other in REGISTRY.values() if other.load_kernels is not None)
        raise InputError(f"{origin} does not work with a process_group; use auto, {able}")
    for tensor in features:
        if tensor.dtype not in backend.dtypes:
            raise InputError(f"{origin} does not take {tensor.dtype}; use backend='auto' or convert the features")
    if sigmoid and backend.sigmoid_devices is not None and image.device.type not in backend.sigmoid_devices:
        raise InputError(
            f"backend {backend.name!r} has the sigmoid loss on {', '.join(backend.sigmoid_devices)} only, not on "
            f"{image.device}; use backend='auto', 'torch' or 'triton'"
        )
    return backend


def check_backend_name(requested: object) -> None:
    """Raise InputError unless this names a backend, be it available here or not."""
    if not isinstance(requested, str) or requested not in ("auto", *REGISTRY):
        raise InputError(f"backend={requested!r} is not a backend; use auto, {', '.join(REGISTRY)}")


def auto_shards() -> bool:
    """Whether "auto" sweeps a batch spread over processes: it does, unless CLIPERASE_BACKEND names one that cannot."""
    backend = REGISTRY.get(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    return backend is None or backend.load_kernels is not None


# Measured, forward and backward together on one CPU core: the two are equally fast somewhere between N = 128 and 512
# (D = 64 and 512). Beyond, eager is slower (2.6 times at N = 2048, D = 64), and its memory grows as N².
_EAGER_PAIRS = 256

# As with native's: looked at once, and only where there is a choice.
_ON_GPU = frozenset(name for name in REGISTRY if measured.TABLE and REGISTRY[name].why_missing() is None)


def _automatic(features: list[Tensor], sharded: bool, sigmoid: bool = False) -> Backend:
    image = features[0]
    pairs, kind = image.shape[0], image.device.type
    if kind == "cuda" and _ON_GPU:
        widest = max((tensor.dtype for tensor in features), key=lambda dtype: dtype.itemsize)
        name = measured.fastest(image.device, widest, pairs, image.shape[1])
        if name in _ON_GPU and _serves(REGISTRY[name], kind, features, sharded, sigmoid):
            return REGISTRY[name]
    # On a CPU native was the fastest at every size.
    native = REGISTRY["native"]
    if kind == "cpu" and native.why_missing() is None and _serves(native, kind, features, sharded, sigmoid):
        return native
    return REGISTRY["eager" if pairs <= _EAGER_PAIRS and not sharded else "torch"]


def _serves(backend: Backend, kind: str, features: list[Tensor], sharded: bool, sigmoid: bool) -> bool:
    devices = (backend.devices, backend.sigmoid_devices if sigmoid else None)
    return (
        all(kinds is None or kind in kinds for kinds in devices)
        and all(tensor.dtype in backend.dtypes for tensor in features)
        and not (sharded and backend.load_kernels is None)
    )
