"""Cut the similarities into blocks within a memory budget, and form the gradients from blocks of dS; for GPUs.

dI = s dS T and dT = s dSᵀ I. A block is large in both directions: each of the two products then has enough tiles for
all multiprocessors, and their accumulators are read and written seldom.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import cache_budget
from cliperase_fast.ops.matmul import add_product, product
from cliperase_fast.ops.spec import Need, SimilarityInputs

_CACHED_ROWS = 256  # rows are kept in multiples of this, which every block of rows divides
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 128, 256  # the tiles of cuBLAS's largest products


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def full_wave(device: torch.device, width: int) -> int:
    """Return the rows for which a product [rows, width] has a tile for each multiprocessor; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    tiles = -(-width // _PRODUCT_COLUMNS)
    return _PRODUCT_ROWS * max(1, torch.cuda.get_device_properties(device).multi_processor_count // tiles)


def block_shape(
    n: int,
    m: int,
    pair_bytes: float,
    budget: int,
    units: tuple[int, int] = (64, 128),
    wave: int = 0,
    strip_rows: int = 0,
    columns: int = 0,
) -> tuple[int, int]:
    """Return (rows, columns) of a block of n x m whose entries take `pair_bytes` each, in `budget` bytes.

    Both are multiples of `units`, at least one each. A block is about a square; where the budget allows, its rows, and
    then its columns, are a multiple of `wave`. strip_rows, columns: given numbers; 0: free.
    """
    pairs = max(1, int(budget / pair_bytes))
    if strip_rows:
        rows = _multiple(strip_rows, units[0], n)
        return rows, _multiple(columns or pairs // rows, units[1], m)
    free = not columns
    if free:  # one wave of rows leaves room for one of columns, or the block is a square
        columns = pairs // wave if 0 < wave <= isqrt(pairs) else isqrt(pairs)
    columns = _multiple(columns, units[1], m, wave)
    rows = _multiple(pairs // columns, units[0], n, wave)
    if free and rows < pairs // columns:  # few rows, so more columns fit
        columns = _multiple(pairs // rows, units[1], m, wave)
    return rows, columns


def _multiple(count: int, unit: int, largest: int, wave: int = 0) -> int:
    """Round `count` down to waves or units, at least one unit and at most what holds `largest`."""
    step = wave if 0 < wave <= count and wave % unit == 0 else unit
    return min(max(unit, count // step * step), round_up(largest, unit))


def in_blocks(n: int, m: int, shape: tuple[int, int], cached_rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each block, row by row; none has both cached rows and others."""
    for first, last in ((0, cached_rows), (cached_rows, n)):
        for start in range(first, last, shape[0]):
            for begin in range(0, m, shape[1]):
                yield slice(start, min(start + shape[0], last)), slice(begin, min(begin + shape[1], m))


def kept_bytes(inputs: SimilarityInputs, row_bytes: int) -> int:
    """Return the bytes of similarities that a GPU backend keeps; row_bytes: of one row.

    "similarities" keeps as many first rows as CLIPERASE_KEEP_MIB holds. "auto" keeps all rows or none: all where they
    fit both CLIPERASE_KEEP_MIB and half of the memory that is free at the call.
    """
    if inputs.keep == "nothing":
        return 0
    device = inputs.image.device
    budget, whole = cache_budget(device), row_bytes * inputs.n
    if inputs.keep == "auto":
        return whole if whole <= budget and whole <= free_bytes(device, 2 * whole) // 2 else 0
    return kept_share(inputs.n, row_bytes, budget)


def kept_share(n: int, row_bytes: int, available: int) -> int:
    """Return the bytes of those of n rows that fit `available`: of all, or of a number that blocks of rows divide."""
    return row_bytes * (n if row_bytes * n <= available else available // row_bytes // _CACHED_ROWS * _CACHED_ROWS)


def free_bytes(device: torch.device, enough: int) -> int:
    """Return the memory that torch can still allocate on a GPU, or a part of it that is `enough`, without waiting.

    Returns 0 without a GPU, and while torch.compile traces: what is free then is not what is free at a call.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return 0
    if torch.cuda.is_current_stream_capturing():  # the driver must not be asked, and unused memory is not reused
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_reserved(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if unused >= enough:
        return unused
    return torch.cuda.mem_get_info(device)[0] + unused


class FeatureGradients:
    """Accumulates the gradients of image, text and scale from blocks of dS, in float32.

    image [n, D'], text [m, D']: with the padding of `matmul.as_pair`; width: D, that of the gradients. factor: [], of
    dI and dT. dtypes: of the gradients of image and text.
    """

    def __init__(
        self, image: Tensor, text: Tensor, width: int, factor: Tensor, need: Need, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        self._image, self._text, self._width, self._factor, self._need = image, text, width, factor, need
        self._text_dtype = dtypes[1]
        self.image = image.new_empty((len(image), width) if need.image else (0,), dtype=dtypes[0])
        self._sum = factor.new_zeros(text.shape if need.text else (0,))  # of dT, [m, D']
        self.scale = factor.new_zeros(())  # before the factor, which may be 0

    def add(self, rows: slice, columns: slice, gradient: Tensor) -> None:
        """Add a block of dS, [rows, columns]. Blocks come in the order of `in_blocks`."""
        image = self._image[rows]
        if self._need.image or self._need.scale:
            if columns.start == 0:
                self._towards_text = product(gradient, self._text[columns])  # [rows, D']
            else:
                add_product(self._towards_text, gradient, self._text[columns])
            if columns.stop == len(self._text):
                self._finish_rows(rows, image)
        if self._need.text:
            add_product(self._sum[columns], gradient.T, image)

    def _finish_rows(self, rows: slice, image: Tensor) -> None:
        if self._need.scale:
            self.scale += (self._towards_text * image).sum()
        if self._need.image:
            self.image[rows] = self._towards_text.mul_(self._factor)[:, : self._width]

    @property
    def text(self) -> Tensor:
        """The gradient of text, once all blocks have been added; read it once."""
        if not self._need.text:
            return self._sum.to(self._text_dtype)
        return self._sum.mul_(self._factor)[:, : self._width].to(self._text_dtype).contiguous()
