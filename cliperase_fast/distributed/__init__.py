"""A batch spread over processes: agreeing on it (`group.py`), moving rows (`collectives.py`, `ring.py`), the sweeps.

`ranks.py` is for whole runs: joining the processes, sharing work between them, hearing of one that is gone.
"""

from __future__ import annotations

from cliperase_fast.distributed.collectives import sum_over_ranks
from cliperase_fast.distributed.group import (
    GATHER_MODES,
    LOCAL,
    WORLD,
    Group,
    Shards,
    check_process_group,
    resolve_group,
)
from cliperase_fast.distributed.ranks import ALONE, Ranks, joined
from cliperase_fast.distributed.sigmoid import sharded_sigmoid
from cliperase_fast.distributed.sweep import sharded_sweep

__all__ = [
    "ALONE",
    "GATHER_MODES",
    "LOCAL",
    "WORLD",
    "Group",
    "Ranks",
    "Shards",
    "check_process_group",
    "joined",
    "resolve_group",
    "sharded_sigmoid",
    "sharded_sweep",
    "sum_over_ranks",
]
