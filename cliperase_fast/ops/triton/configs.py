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
    shared: bool = False  # one exponential for an entry's row and column: see `shared.py`


@dataclass(frozen=True)
class Configs:
    """The configurations of the forward and the backward kernel.

    With group_ids a kernel has a configuration of its own, and the forward kernel uses it also to store similarities:
    the second softmax, and the addresses, take more registers.
    """

    forward: Config
    backward: Config
    backward_groups: Config
    forward_groups: Config

    def calibrated_forward(self, dtype: torch.dtype) -> Config:
        """Return the configuration of the calibrated loss, whose backward kernel has that of `backward`."""
        return self.forward if dtype.itemsize == 2 else self.backward  # larger tiles of float32 spill

    def compact(self, groups: bool) -> Config:
        """Return the configuration of both kernels for similarities in 16 bits, whose tiles must be the same."""
        narrow = self.forward_groups.stages <= 2  # for narrow features, where larger tiles spill too
        return self.backward_groups if groups or narrow else self.forward_groups


def _configs(forward: Config, backward: Config, backward_groups: Config) -> Configs:
    return Configs(forward, backward, backward_groups, forward)


_HALF = _configs(Config(64, 128, 64, 8, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 64, 8, 4))
_HALF_AMPERE = _configs(Config(128, 64, 32, 8, 4), Config(128, 64, 32, 8, 4), Config(64, 64, 32, 8, 4))
_HALF_NARROW = _configs(Config(64, 128, 32, 8, 2), Config(128, 64, 32, 8, 2), Config(64, 64, 32, 8, 2))
_SINGLE_TILE = Config(64, 64, 16, 8, 3)
_SINGLE = _configs(_SINGLE_TILE, _SINGLE_TILE, _SINGLE_TILE)
_SINGLE_AMPERE = _configs(_SINGLE_TILE, Config(32, 32, 16, 4, 3), Config(32, 32, 16, 4, 3))
_SINGLE_BLACKWELL = _configs(_SINGLE_TILE, Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 2))

# Major number of the compute capability (8: A100, 9: H100 and H200, 10: B200) -> (half precision, narrow).
TABLE: dict[int, dict[tuple[bool, bool], Configs]] = {
    major: {(True, False): wide, (True, True): _HALF_NARROW, (False, False): single, (False, True): single}
    for major, wide, single in ((8, _HALF_AMPERE, _SINGLE_AMPERE), (9, _HALF, _SINGLE), (10, _HALF, _SINGLE_BLACKWELL))
}
# Variants for wide features in half precision that have not been compared with the above on a GPU yet, by architecture.
# Select them with `TritonKernels(SHARED[9])`; `python -m benchmarks.tournament` measures them.
SHARED: dict[int, Configs] = {
    8: Configs(
        Config(64, 128, 32, 8, 4, True), Config(128, 64, 32, 8, 4, True), Config(64, 64, 32, 8, 4, True),
        Config(128, 64, 32, 8, 4, True),
    ),
    9: Configs(
        Config(128, 128, 64, 8, 3, True), Config(128, 128, 64, 8, 3, True), Config(128, 64, 64, 8, 4, True),
        Config(128, 64, 64, 8, 4, True),
    ),
    10: Configs(
        Config(128, 64, 64, 8, 4, True), Config(128, 64, 64, 8, 4, True), Config(64, 64, 64, 8, 4, True),
        Config(64, 64, 64, 8, 4, True),
    ),
}  # fmt: skip
DEFAULT = 8  # for architectures that are not in the table: needs the least shared memory

# The interpreter runs programs one after the other in Python: large blocks, but small enough for tests to have several.
_INTERPRETED = Config(32, 32, 32, 1, 1)
INTERPRETER = _configs(_INTERPRETED, _INTERPRETED, _INTERPRETED)


def configs_for(architecture: int, dtype: torch.dtype, width: int) -> Configs:
    """Return the shipped configurations.

    architecture: major number of the compute capability; dtype, width: the widest of the features.
    """
    return TABLE.get(architecture, TABLE[DEFAULT])[dtype.itemsize == 2, width <= NARROW]
