"""Runs `interpreted_triton.py` in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_triton_sweep_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "CLIPERASE_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=environment, cwd=file.parents[2], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
