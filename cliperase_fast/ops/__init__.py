"""The loss sweep: one contract (`sweep.py`), its backends, and the choice among them (`dispatch.py`)."""

from __future__ import annotations

from cliperase_fast.ops.registry import BackendStatus, BackendTable, auto_shards, backends, check_backend_name, choose
from cliperase_fast.ops.spec import Sweep, compute_dtype, no_autocast
from cliperase_fast.ops.transforms import refuse_on_ranks, savable

__all__ = [
    "BackendStatus",
    "BackendTable",
    "Sweep",
    "auto_shards",
    "backends",
    "check_backend_name",
    "choose",
    "compute_dtype",
    "no_autocast",
    "refuse_on_ranks",
    "savable",
]
