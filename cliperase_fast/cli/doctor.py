"""`cliperase-fast doctor`: what is installed, what can compute here, and whether it computes correctly."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement
from torch import Tensor

from cliperase_fast._version import __version__
from cliperase_fast.contrastive import sigmoid_loss
from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import is_out_of_memory
from cliperase_fast.extras import EXTRAS, install_hint
from cliperase_fast.functional import calibrated_loss, cliperase_loss
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.registry import REGISTRY, Backend
from cliperase_fast.reading import in_bytes
from cliperase_fast.validation import computes

TOLERANCE = 1e-4  # largest error of float32 losses and gradients, relative to the largest value
_PACKAGE = "cliperase_fast"
_PAIRS, _WIDTH = 67, 48  # odd, so that blocks have remainders
_MOST_LINES = 3  # of an error in the table
_MODULES = {"open_clip_torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


@plain_torch()
def examine() -> dict[str, Any]:
    """Return versions, compilers, devices, and the self-test of each backend, as JSON data.

    problems: a line for each thing that is broken; empty if everything that is installed works.
    """
    libraries = list(_libraries())
    tests = [test for backend in REGISTRY.values() for test in _tests(backend)]
    problems = [
        f"{one['name']} {one['version'] or 'is missing'}: {_PACKAGE} needs {one['needs']}"
        for one in libraries
        if one["state"] == "wrong" or (one["state"] == "missing" and one["extra"] is None)
    ]
    problems += [
        f"{one['name']} {one['version']} cannot be imported: {one['reason']}" for one in libraries if "reason" in one
    ]
    problems += [
        f"the backend {test['name']} fails on {test['device']}: {test['reason']}"
        for test in tests
        if test["state"] == "failed"
    ]
    return {
        "version": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": libraries,
        "compilers": _compilers(),
        "devices": _devices(),
        "backends": tests,
        "problems": problems,
    }


def report(found: dict[str, Any]) -> str:
    """Write the findings of `examine` as text."""
    lines = [f"cliperase_fast {found['version']} in {found['folder']}", f"Python {found['python']}, {found['system']}"]
    for title in ("libraries", "compilers", "devices", "backends"):
        lines += ["", title, *_aligned(_ROWS[title](found[title]))]
    lines.append("")
    if found["problems"]:
        lines += ["Problems:", *(f"  {problem}" for problem in found["problems"])]
    else:
        lines.append("Everything that is installed works.")
    return "\n".join(lines)


def _library_rows(libraries: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for one in libraries:
        remedy = f'pip install "{one["name"]}{one["needs"]}"' if one["extra"] is None else install_hint(one["extra"])
        notes = {
            "ok": "",
            "wrong": f"needs {one['needs']}: {remedy}",
            "missing": remedy,
            "broken": f"cannot be imported: {remedy.replace('install', 'install --force-reinstall', 1)}",
        }
        note = notes[one["state"]]
        optional = f"optional, for {one['extra']}" if one["extra"] else ""
        yield one["name"], one["version"] or "missing", note or optional


def _compiler_rows(compilers: dict[str, str]) -> Iterator[tuple[str, ...]]:
    yield from compilers.items()


def _device_rows(devices: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for device in devices:
        details = [f"{key} {value}" for key, value in device.items() if key not in ("device", "name")]
        yield device["device"], ", ".join([device["name"], *details])


def _test_rows(tests: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for test in tests:
        measured = f"largest error {test['error']:.1e}, {test['seconds']:.1f} s" if test["error"] is not None else ""
        yield test["name"], test["device"], test["state"], test["reason"] or measured


_ROWS: dict[str, Callable[[Any], Iterator[tuple[str, ...]]]] = {
    "libraries": _library_rows,
    "compilers": _compiler_rows,
    "devices": _device_rows,
    "backends": _test_rows,
}


def _aligned(rows: Iterator[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    if not table:
        return ["  none"]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]


def _libraries() -> Iterator[dict[str, Any]]:
    """Yield each library that the package's metadata requires, with the version that is installed."""
    try:
        requirements = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        requirements = []
    seen = set()
    for text in requirements:
        extra, requirement = _parsed(text)
        if requirement is None or requirement.name in seen:
            continue
        seen.add(requirement.name)
        needs = str(requirement.specifier)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield {"name": requirement.name, "version": None, "needs": needs, "extra": extra, "state": "missing"}
            continue
        found = {"name": requirement.name, "version": version, "needs": needs, "extra": extra}
        if not requirement.specifier.contains(version, prereleases=True):
            yield {**found, "state": "wrong"}
            continue
        reason = _why_broken(requirement.name) if extra is None else None
        yield {**found, "state": "ok"} if reason is None else {**found, "state": "broken", "reason": reason}


def _why_broken(name: str) -> str | None:
    """Import a library. Returns why that fails, as with a torchvision that was built for another torch."""
    try:
        importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever a library raises
        return _said(error)
    return None


def _parsed(text: str) -> tuple[str | None, Requirement | None]:
    """Return (extra, requirement); the latter is None if it does not concern users of this system."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return None, None
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return None, requirement
    extra = next((name for name in EXTRAS if requirement.marker.evaluate({"extra": name})), None)
    return extra, None if extra is None or requirement.name == _PACKAGE else requirement


def _compilers() -> dict[str, str]:
    missing = extension.why_missing()
    if missing is None:
        cuda = extension.why_no_cuda()
        built = f"runs {extension.load().cpu.instruction_set(extension.instruction_set())}"
        built += ", with CUDA" if cuda is None else ", without CUDA"
    else:
        built = f"missing: {missing}"
    found = {"extension": built}
    for name in ("c++", "cmake", "nvcc"):
        path = shutil.which(name)
        found[name] = "not on PATH" if path is None else f"{_first_version(path)} ({path})"
    return found


def _first_version(path: str) -> str:
    """Return the line of `PROGRAM --version` that has the version."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    lines = [line.strip() for line in done.stdout.splitlines() if any(letter.isdigit() for letter in line)]
    return next((line for line in lines if "release" in line), lines[0] if lines else "of unknown version")


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "torch finds no GPU" if built else "torch was built without CUDA"
        return [*devices, {"device": "gpu", "name": reason}]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": in_bytes(properties.total_memory),
                "CUDA": torch.version.cuda or torch.version.hip,
            }
        )
    return devices


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _tests(backend: Backend) -> Iterator[dict[str, Any]]:
    """Yield the self-test of a backend on each kind of device that it can use here."""
    if backend.missing is not None:
        yield {
            "name": backend.name, "device": "none", "state": "not available", "error": None, "seconds": None,
            "reason": backend.missing,
        }  # fmt: skip
        return
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [kind for kind in here if backend.devices is None or kind in backend.devices]:
        began = time.perf_counter()
        error, reason = None, ""
        try:
            error = _largest_error(backend, device)
            if not math.isfinite(error):
                error, reason = None, "its results are not finite"
            elif error > TOLERANCE:
                reason = f"its results differ from float64 by {error:.1e} of the largest value"
        except Exception as fault:  # of a compiler, a driver or a damaged library
            reason = _said(fault)
        yield {
            "name": backend.name, "device": device, "state": "failed" if reason else "ok", "error": error,
            "seconds": time.perf_counter() - began, "reason": reason,
        }  # fmt: skip


def _said(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory; end other programs that use the device"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:_MOST_LINES])}"


def _largest_error(backend: Backend, device: str) -> float:
    """Return the largest error of losses and gradients against float64, relative to the largest value of each."""
    errors = []
    for loss, compute in _LOSSES.items():
        if not computes(backend, loss, device):
            continue
        expected = _outcome(compute, "eager", torch.float64, "cpu")
        found = _outcome(compute, backend.name, torch.float32, device)
        errors += [
            (ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in zip(found, expected, strict=True)
        ]
    return float(torch.stack(errors).max())  # NaN if one is


Features = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outcome(
    compute: Callable[[Features, Tensor, str], Tensor], backend: str, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Return the loss of fixed random features and its gradients, in float64 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (5, _PAIRS, _WIDTH)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    rows = torch.nn.functional.normalize(rows, dim=-1).float().to(dtype=dtype, device=device)
    image, text, teacher_image, teacher_text, forget_image = rows.unbind()
    scale = torch.tensor(20.0, dtype=dtype, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
    features = (leaves[0], leaves[1], teacher_image, teacher_text, forget_image)
    loss = compute(features, leaves[2], backend)
    gradients = torch.autograd.grad(loss, leaves)
    return [tensor.detach().to(device="cpu", dtype=torch.float64) for tensor in (loss, *gradients)]


def _softmax(features: Features, scale: Tensor, backend: str) -> Tensor:
    image, text, teacher_image, teacher_text, forget = features
    return cliperase_loss(
        forget, text, image, text, teacher_image, teacher_text, scale, 20.0, group_ids=_ids(image), backend=backend
    ).total


def _calibrated(features: Features, scale: Tensor, backend: str) -> Tensor:
    image, text, teacher_image, teacher_text, _ = features
    forget_mask = _ids(image) == 1
    return calibrated_loss(
        image, text, teacher_image, teacher_text, scale, 20.0, forget_mask=forget_mask, group_ids=_ids(image),
        backend=backend,
    ).total  # fmt: skip


def _sigmoid(features: Features, scale: Tensor, backend: str) -> Tensor:
    return sigmoid_loss(features[0], features[1], scale, -10.0, backend=backend)


def _ids(image: Tensor) -> Tensor:
    return torch.arange(len(image), dtype=torch.int64, device=image.device) // 8


_LOSSES: dict[str, Callable[[Features, Tensor, str], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "calibrated": _calibrated,
}
