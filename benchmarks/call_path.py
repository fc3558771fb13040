"""Count the Python files that one `clip_loss` call enters, and how often it goes from one to another.

    python -m benchmarks.call_path

A warm forward call of 512 pairs that require a gradient. A file counts once a function of it runs; a switch is a call
of a function in another file of the package than the caller's last one. Frames outside the package are skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

import cliperase_fast
from cliperase_fast.functional import clip_loss

_PACKAGE = Path(cliperase_fast.__file__).parent


def call_path(call: Callable[[], object]) -> tuple[list[str], int]:
    """Return the package files that `call` enters, in order of first entry, and the number of switches."""
    entered: list[str] = []
    switches = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal switches
        if event != "call" or not (path := frame.f_code.co_filename).startswith(str(_PACKAGE)):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(str(_PACKAGE)):
            caller = caller.f_back
        switches += caller is None or caller.f_code.co_filename != path
        if path not in entered:
            entered.append(path)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [str(Path(path).relative_to(_PACKAGE)) for path in entered], switches


def of_backend(backend: str) -> tuple[list[str], int]:
    """Return the path of a warm call of `clip_loss` with that backend."""
    image, text = (
        torch.nn.functional.normalize(torch.randn(512, 64, dtype=torch.float32, device="cpu"), dim=1).requires_grad_()
        for _ in range(2)
    )

    def call() -> torch.Tensor:
        return clip_loss(image, text, 20.0, backend=backend)

    call()
    return call_path(call)


def main() -> None:
    for backend in ("torch", "native"):
        files, switches = of_backend(backend)
        print(f"{backend}: {len(files)} files, {switches} switches: {', '.join(files)}")


if __name__ == "__main__":
    main()
