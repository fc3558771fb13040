"""Spread a batch over processes: the group and its checks, collectives, and the sharded losses.

`world.py` serves whole runs: it joins the processes, shares work between them and propagates errors.
"""

from __future__ import annotations

from cliperase_fast.distributed.collectives import over_ranks, sum_over_ranks
from cliperase_fast.distributed.gradients import GradientExchange
from cliperase_fast.distributed.process_group import (
    GATHER_MODES,
    LOCAL,
    WORLD,
    Group,
    Shards,
    check_process_group,
    resolve_group,
)
from cliperase_fast.distributed.sharded_bernoulli import bernoulli_terms
from cliperase_fast.distributed.sharded_calibrated import sharded_calibrated
from cliperase_fast.distributed.sharded_sigmoid import sharded_sigmoid
from cliperase_fast.distributed.sharded_softmax import sharded_sweep
from cliperase_fast.distributed.world import SINGLE_PROCESS, Ranks, init_distributed

__all__ = [
    "GATHER_MODES",
    "LOCAL",
    "SINGLE_PROCESS",
    "WORLD",
    "GradientExchange",
    "Group",
    "Ranks",
    "Shards",
    "bernoulli_terms",
    "check_process_group",
    "init_distributed",
    "over_ranks",
    "resolve_group",
    "sharded_calibrated",
    "sharded_sigmoid",
    "sharded_sweep",
    "sum_over_ranks",
]
