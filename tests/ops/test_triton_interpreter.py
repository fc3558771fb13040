"""Run `interpreted_*.py` in a separate process, as Triton reads TRITON_INTERPRET only when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def passes(pattern: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "CLIPERASE_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, HERE.glob(pattern))]
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_triton_kernels_in_the_interpreter():
    passes("interpreted_*.py")


@pytest.mark.long
def test_the_variants_of_the_kernels_in_the_interpreter():
    passes("long_interpreted_*.py")
