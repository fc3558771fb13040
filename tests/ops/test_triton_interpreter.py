"""Run `interpreted_*.py` in a separate process, as Triton reads TRITON_INTERPRET only when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_triton_kernels_in_the_interpreter():
    here = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "CLIPERASE_BACKEND": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, here.glob("interpreted_*.py"))]
    done = subprocess.run(
        command, env=environment, cwd=here.parents[1], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
