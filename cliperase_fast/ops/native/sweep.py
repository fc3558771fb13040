"""The sweep of the backend "native": which half serves a batch is decided by its device."""

from __future__ import annotations

from cliperase_fast.ops.engine import as_sweep
from cliperase_fast.ops.native.cpu import CpuEngine

engine = CpuEngine()
sweep = as_sweep(engine)
