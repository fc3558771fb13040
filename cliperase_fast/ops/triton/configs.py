"""Launch configurations of the sweep's kernels, by architecture, dtype and width.

They compile without register spills and fit the shared memory of each architecture (`benchmarks/kernel_report.py`).
Their speed has not been measured on hardware yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NARROW = 64  # up to this width, the depth of a tile is one or two blocks


@dataclass(frozen=True)
class Config:
    """A tile of BLOCK_M x BLOCK_N similarities, formed in steps of BLOCK_K features."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configs:
    """The configurations of the forward and the backward kernel."""

    forward: Config
    backward: Config
    backward_groups: Config  # with group_ids: the second softmax takes more registers


_HALF = Configs(Config(64, 128, 64, 8, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 4))
_HALF_AMPERE = Configs(Config(128, 64, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(64, 64, 32, 8, 4))
_HALF_NARROW = Configs(Config(64, 128, 32, 8, 2), Config(128, 64, 32, 8, 2), Config(64, 64, 32, 8, 2))
_SINGLE_TILE = Config(64, 64, 16, 8, 3)
_SINGLE = Configs(_SINGLE_TILE, Config(64, 64, 32, 8, 3), _SINGLE_TILE)
_SINGLE_AMPERE = Configs(_SINGLE_TILE, Config(32, 32, 16, 4, 3), Config(32, 32, 16, 4, 3))
_SINGLE_BLACKWELL = Configs(_SINGLE_TILE, Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 2))

# Major number of the compute capability (8: A100, 9: H100 and H200, 10: B200) -> (half precision, narrow).
TABLE: dict[int, dict[tuple[bool, bool], Configs]] = {
    major: {(True, False): wide, (True, True): _HALF_NARROW, (False, False): single, (False, True): single}
    for major, wide, single in ((8, _HALF_AMPERE, _SINGLE_AMPERE), (9, _HALF, _SINGLE), (10, _HALF, _SINGLE_BLACKWELL))
}
DEFAULT = 8  # for architectures that are not in the table: needs the least shared memory

# The interpreter runs programs one after the other in Python: large blocks, but small enough for tests to have several.
_INTERPRETED = Config(32, 32, 32, 1, 1)
INTERPRETER = Configs(_INTERPRETED, _INTERPRETED, _INTERPRETED)


def configs_for(architecture: int, dtype: torch.dtype, width: int) -> Configs:
    """Return the shipped configurations.

    architecture: major number of the compute capability; dtype, width: the widest of the features.
    """
    return TABLE.get(architecture, TABLE[DEFAULT])[dtype.itemsize == 2, width <= NARROW]
