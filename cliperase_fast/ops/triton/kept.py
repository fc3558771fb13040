"""What the forward kernels keep of the similarities for the backward kernels: float32 numbers, or 16 bits for each.

16 bits: S and S° - S are fixed-point numbers. An entry is a number of steps below the largest of its tile, and 65535
steps span the tile, so it is off by half a step: S by 2^-16 times the largest |S| at the most. S° is the sum of both.
The student's error is common to S and S°, so it does not turn the difference of their softmaxes into noise.

The memory is, in this order: for each tile the largest S, the step, and the same of S° - S, float32; S and then S° - S,
int16 [n, m] each; one byte, so that an odd size tells the two forms apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops.spec import SimilarityInputs

# The values of WRITE_CACHE and READ_CACHE; 0: nothing is kept
WHOLE, COMPACT = 1, 2
_TILE = 32  # no configuration has a lower or narrower tile
_LEAST_TILE = tl.constexpr(_TILE)
_STEPS = tl.constexpr(65535.0)
_LARGEST = tl.constexpr(1.0e30)


@triton.jit
def _place(p_cache, o_row, o_column, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (where a tile's four numbers are, where S is)."""
    i_tile = (tl.min(o_row) // BLOCK_M) * tl.cdiv(m, BLOCK_N) + tl.min(o_column) // BLOCK_N
    tiles = tl.cdiv(n, _LEAST_TILE).to(tl.int64) * tl.cdiv(m, _LEAST_TILE)
    return p_cache.to(tl.pointer_type(tl.float32)) + 4 * i_tile.to(tl.int64), p_cache + 8 * tiles


@triton.jit
def _store_steps(p_values, p_range, b_x, o_cache, m_tile, m_off):
    b_top = tl.max(tl.where(m_off, b_x, -_LARGEST))  # []
    b_bottom = tl.min(tl.where(m_off, b_x, _LARGEST))
    b_step = tl.maximum((b_top - b_bottom) / _STEPS, 1.0 / _LARGEST)
    tl.store(p_range, b_top)
    tl.store(p_range + 1, b_step)
    b_steps = tl.minimum(tl.maximum((b_top - b_x) * (1.0 / b_step), 0.0), _STEPS)  # [M, N]; pairs may be out of range
    tl.store(p_values + o_cache, ((b_steps + 0.5).to(tl.int32) - 32768).to(tl.int16), mask=m_tile)


@triton.jit
def _load_steps(p_values, p_range, o_cache, m_tile):
    b_steps = tl.load(p_values + o_cache, mask=m_tile, other=0).to(tl.float32) + 32768.0  # [M, N]
    return tl.load(p_range) - b_steps * tl.load(p_range + 1)


@triton.jit
def store_compact(
    p_cache, p_teacher_cache, b_s, b_t, o_row, o_column, o_cache, m_tile, m_off, n, m, TEACHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keep a tile of S and S° in 16 bits each. o_cache: places in [n, m]; m_off: the entries that must be exact."""
    p_range, p_values = _place(p_cache, o_row, o_column, n, m, BLOCK_M, BLOCK_N)
    _store_steps(p_values, p_range, b_s, o_cache, m_tile, m_off)
    if TEACHER:
        _store_steps(p_teacher_cache, p_range + 2, b_t - b_s, o_cache, m_tile, m_off)


@triton.jit
def load_compact(
    p_cache, p_teacher_cache, o_row, o_column, o_cache, m_tile, n, m, TEACHER: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return S and S° of a tile that `store_compact` has kept; without a teacher S twice."""
    p_range, p_values = _place(p_cache, o_row, o_column, n, m, BLOCK_M, BLOCK_N)
    b_s = _load_steps(p_values, p_range, o_cache, m_tile)
    b_t = b_s
    if TEACHER:
        b_t = b_s + _load_steps(p_teacher_cache, p_range + 2, o_cache, m_tile)
    return b_s, b_t


def compact_bytes(inputs: SimilarityInputs) -> int:
    """Return the bytes of all similarities in 16 bits each; 0 if the features are not in half precision.

    dS of float32 features is not rounded, so the error would show.
    """
    if torch.promote_types(inputs.image.dtype, inputs.text.dtype).itemsize != 2:
        return 0
    return 16 * _tiles(inputs.n, inputs.m) + 2 * inputs.n * inputs.m * (1 + inputs.want_consistency) + 1


def is_compact(cache: Tensor) -> bool:
    return len(cache) % 2 == 1


def new_cache(size: int, n: int, m: int, device: torch.device) -> Tensor:
    """Return memory for `size` bytes of similarities; equal calls fill it with equal bytes."""
    cache = torch.empty(size, dtype=torch.uint8, device=device)
    if is_compact(cache):  # not all of these are used
        cache[: 16 * _tiles(n, m)] = 0
        cache[-1:] = 0
    return cache


def compact_parts(cache: Tensor, n: int, m: int, teacher: bool) -> tuple[Tensor, Tensor | None]:
    """Return p_cache and p_teacher_cache of the kernels, int16."""
    numbers = cache[:-1].view(torch.int16)
    return numbers, numbers[8 * _tiles(n, m) + n * m :] if teacher else None


def _tiles(n: int, m: int) -> int:
    return -(-n // _TILE) * -(-m // _TILE)
