"""A batch spread over processes: agreeing on it (`group.py`), moving rows (`collectives.py`, `ring.py`), the sweeps."""

from __future__ import annotations

from cliperase_fast.distributed.collectives import sum_over_ranks
from cliperase_fast.distributed.group import GATHER_MODES, Group, Shards
from cliperase_fast.distributed.sigmoid import sharded_sigmoid
from cliperase_fast.distributed.sweep import sharded_sweep

__all__ = ["GATHER_MODES", "Group", "Shards", "sharded_sigmoid", "sharded_sweep", "sum_over_ranks"]
