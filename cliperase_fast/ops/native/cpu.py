"""Run the backend "native" on the CPU: `csrc/cpu`, tiles of S and S° with one exponential for row and column.

Gradients are computed in float32, from features of any dtype except float64, and rounded once, to the dtype of the
features. keep="similarities" stores the exponentials of the first rows in float32, so that S and S° need not be formed
again: four products instead of six.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.autograd import as_sweep, cache_budget
from cliperase_fast.ops.calibrated import CalibratedInputs, Edit, Pull
from cliperase_fast.ops.calibrated_autograd import as_calibrated
from cliperase_fast.ops.calibrated_sweep import FORGET, SortedPairs
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.extension import as_buffer_or_none
from cliperase_fast.ops.sigmoid import SigmoidParts, as_sigmoid
from cliperase_fast.ops.spec import NUM_SAVED, GradientTerms, Need, SavedStats, SimilarityInputs, Stats, Weights

_FLOAT = 4  # bytes
# What "auto" keeps depends on the cost of forming it again, which grows with the width. In a step of 8192 pairs with
# AVX-512, keeping saves a quarter of the CPU time at width 64, a fifth at 32 and a seventh at 16. It takes some 500 MiB
# instead of 27, and the first step, which touches this memory, takes 1.5 to 6 times as long. For narrow features "auto"
# keeps no more than a strip of dS takes anyway.
_NARROW = 48  # widths below are narrow
_KEPT_OF_NARROW = 16 << 20
_TERMS = 4  # of the calibrated loss
_SCRATCH = 256 << 20  # unused memory of this size stays in the pool, beside that for kept similarities
_CPU = torch.device("cpu")


class CpuKernels:
    """Implement `ops.spec.SweepKernels` and `ops.calibrated.CalibratedKernels`.

    Memory: O(N D), a strip of dS (16 MiB at most for N <= 16,384), the cache.
    """

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu
        # plain numbers, so that torch.compile can trace cache_size
        self._tile_rows: int = self._cpu.TILE_ROWS
        self._tile_columns: int = self._cpu.TILE_COLUMNS
        self._tile_head: int = self._cpu.TILE_HEADER
        self._told = False
        self._pool = 0  # the limit of the pool's unused memory

    def cache_size(self, inputs: SimilarityInputs) -> int:
        return self._cache_size(inputs, 0)

    def blocks_cache_size(self, inputs: SimilarityInputs) -> int:
        return self._cache_size(inputs, 1)  # two kinds of rows or columns may begin one tile more

    def _cache_size(self, inputs: SimilarityInputs, extra: int) -> int:
        if inputs.keep == "nothing":
            return 0
        row_bytes = self._tile_row_bytes(inputs, extra)
        tile_rows = -(-inputs.n // self._tile_rows) + extra
        budget = cache_budget(inputs.image.device)
        if inputs.keep == "auto" and _narrow(inputs):
            budget = min(budget, _KEPT_OF_NARROW)
        return row_bytes * min(tile_rows, budget // row_bytes)

    def _tile_row_bytes(self, inputs: SimilarityInputs, extra: int = 0) -> int:
        """Return the bytes that are kept for each `_tile_rows` rows; extra: more blocks of columns."""
        tiles = 2 if inputs.want_consistency else 1
        blocks = -(-inputs.m // self._tile_columns) + extra
        return _FLOAT * blocks * (self._tile_head + tiles * self._tile_rows * self._tile_columns)

    def forward(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Stats, Tensor]:
        cache = self._workspace(cache_size)
        return self._forward(inputs, Call(self._cpu, inputs), cache)[0], cache

    def _forward(self, inputs: SimilarityInputs, call: Call, cache: Tensor) -> tuple[Stats, tuple[float, float]]:
        """Return the statistics, and the two sums of a comparison."""
        diagonals = floats(2, inputs.n)
        rows, columns = floats(inputs.num_stats, inputs.n), floats(inputs.num_stats, inputs.m)
        shift, *sums = self._cpu.forward(
            call.problem,
            diagonal=call.buffer(diagonals[0]),
            teacher_diagonal=call.buffer(diagonals[1]),
            row_stats=call.buffer(rows),
            column_stats=call.buffer(columns),
            cache=call.buffer(cache),
            instruction_set=extension.instruction_set(),
        )
        diagonal = diagonals[0] if inputs.paired else None
        teacher_diagonal = diagonals[1] if inputs.paired and inputs.want_consistency else None
        gap_shift = torch.tensor(shift, dtype=torch.float32, device="cpu") if inputs.want_consistency else None
        return Stats(rows, columns, diagonal, teacher_diagonal, gap_shift), (sums[0], sums[1])

    def workspace(self, size: int, device: torch.device) -> Tensor:
        return self._workspace(size)

    def cache_share(self, inputs: SimilarityInputs, available: int) -> int:
        row_bytes = self._tile_row_bytes(inputs)
        return row_bytes * min(-(-inputs.n // self._tile_rows), available // row_bytes)

    def calibrated_losses(self, inputs: CalibratedInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute `ops.calibrated_sweep.losses_by_blocks` in one call, and so in one sweep."""
        pairs, cache = SortedPairs(inputs), self._workspace(cache_size)
        terms, factors, saved = floats(_TERMS), floats(_TERMS), floats(NUM_SAVED + 1, 2 * len(pairs))
        problem = self._joint_problem(pairs)
        self._cpu.calibrated(
            problem,
            terms=self._buffer(terms),
            factors=self._buffer(factors),
            saved=self._buffer(saved),
            cache=self._buffer(_whole_tiles(problem, cache)),
            instruction_set=extension.instruction_set(),
        )
        return terms, saved, factors, cache

    def calibrated_gradients(
        self, inputs: CalibratedInputs, saved: Tensor, weights: Tensor, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs = SortedPairs(inputs)
        grad_image = gradient_buffer(pairs.image) if need.image else None
        grad_text = gradient_buffer(pairs.text) if need.text else None
        problem = self._joint_problem(pairs)
        scale = self._cpu.calibrated_backward(
            problem,
            saved=self._buffer(saved),
            weights=self._buffer(weights),
            cache=self._buffer(_whole_tiles(problem, cache)),
            grad_image=self._buffer(grad_image),
            grad_text=self._buffer(grad_text),
            instruction_set=extension.instruction_set(),
        )
        image, text = (
            floats(0) if gradient is None else pairs.unsorted(gradient, features.dtype)
            for gradient, features in ((grad_image, pairs.image), (grad_text, pairs.text))
        )
        return image, text, torch.tensor(scale, dtype=torch.float32, device="cpu")

    def _joint_problem(self, pairs: SortedPairs) -> Any:
        ids, forgotten = None, pairs.rows(FORGET)
        scale, teacher_scale = pairs.scale_numbers()
        if pairs.ids is not None:
            ids = self._buffer(pairs.ids.unique(return_inverse=True)[1].to(torch.int32))
        return self._cpu.SimilarityInputs(
            image=self._buffer(pairs.image),
            text=self._buffer(pairs.text),
            pair_offset=0,
            scale=scale,
            teacher_image=self._buffer(pairs.teacher_image),
            teacher_text=self._buffer(pairs.teacher_text),
            teacher_scale=teacher_scale,
            row_groups=ids,
            column_groups=ids,
            threads=torch.get_num_threads(),
            compares=True,
            row_ids=ids,
            column_ids=ids,
            row_levels=self._buffer(pairs.image_levels),
            column_levels=self._buffer(pairs.text_levels),
            forget=(forgotten.start, forgotten.stop),
        )

    def _buffer(self, tensor: Tensor | None) -> Any:
        return as_buffer_or_none(self._cpu, tensor)

    def calibrated_forward(self, inputs: SimilarityInputs, edit: Edit | None, cache: Tensor) -> tuple[Stats, Tensor]:
        stats, sums = self._forward(inputs, Call(self._cpu, inputs, edit, compares=True), cache)
        return stats, torch.tensor(sums, dtype=torch.float32, device="cpu")

    def calibrated_backward(
        self, inputs: SimilarityInputs, edit: Edit | None, terms: GradientTerms, pull: Pull, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(self._cpu, inputs, edit, compares=True)
        softmaxes = [softmax for softmax in (terms.student, terms.teacher, terms.masked) if softmax is not None]
        grad_image = gradient_buffer(inputs.image, partial=True) if need.image else None
        grad_text = gradient_buffer(inputs.text, partial=True) if need.text else None
        dot = self._cpu.compared_backward(
            call.problem,
            terms=call.buffer(torch.stack([torch.cat((*softmax.rows, *softmax.columns)) for softmax in softmaxes])),
            diagonal=call.buffer(terms.diagonal) if inputs.paired else None,
            pull_forget=pull.forget.item(),
            pull_anchor=pull.anchor.item(),
            cache=call.buffer(cache),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            instruction_set=extension.instruction_set(),
        )
        return (
            floats(0) if grad_image is None else grad_image,
            floats(0) if grad_text is None else grad_text,
            torch.tensor(dot, dtype=torch.float32, device="cpu"),
        )

    def losses(self, inputs: SimilarityInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute `ops.spec.losses_from_stats` in one call."""
        cache = self._workspace(cache_size)
        retention, consistency, saved = floats(), floats(), floats(NUM_SAVED, 2 * inputs.n)
        call = Call(self._cpu, inputs)
        self._cpu.losses(
            call.problem,
            want_retention=inputs.want_retention,
            retention=call.buffer(retention),
            consistency=call.buffer(consistency),
            saved_stats=call.buffer(saved),
            cache=call.buffer(cache),
            instruction_set=extension.instruction_set(),
        )
        return retention, consistency, saved, cache

    def backward(
        self, inputs: SimilarityInputs, saved: SavedStats, weights: Weights, need: Need, partial: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(self._cpu, inputs)
        image, text = inputs.image, inputs.text
        grad_image = gradient_buffer(image, partial) if need.image or need.scale else None
        grad_text = gradient_buffer(text, partial) if need.text else None
        grad_scale = self._cpu.backward(
            call.problem,
            saved_stats=call.buffer(saved.both.contiguous()),
            want_retention=inputs.want_retention,
            weight_retention=weights.retention.item(),
            weight_consistency=weights.consistency.item(),
            cache=call.buffer(saved.cache),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            need_scale=need.scale,
            instruction_set=extension.instruction_set(),
        )
        return (
            image.new_empty(0) if grad_image is None or not need.image else grad_image,
            text.new_empty(0) if grad_text is None else grad_text,
            torch.tensor(grad_scale, dtype=inputs.scale.dtype, device="cpu"),
        )

    def _workspace(self, size: int) -> Tensor:
        """Return uint8 [size] from the extension's pool, or [0] if there is not enough memory."""
        limit = cache_budget(_CPU) + _SCRATCH
        if limit != self._pool:
            self._cpu.limit_pooled_bytes(limit)
            self._pool = limit
        if size:
            try:
                return torch.frombuffer(self._cpu.Workspace(size), dtype=torch.uint8)
            except MemoryError:
                if not self._told:
                    warnings.warn(
                        f"no memory to keep the similarities, {size / 2**20:.0f} MiB: they are formed again in the "
                        "backward pass; lower CLIPERASE_KEEP_MIB to keep a part of them",
                        stacklevel=2,
                    )
                    self._told = True
        return torch.empty(0, dtype=torch.uint8, device="cpu")


def release_memory() -> None:
    """Give back to the system what the pool of the extension holds unused. The next call takes new memory."""
    cpu = extension.load().cpu
    cpu.limit_pooled_bytes(0)
    kernels._pool = 0  # the next call sets the limit again


class Call:
    """Convert `SimilarityInputs` for the extension."""

    def __init__(self, cpu: Any, inputs: SimilarityInputs, edit: Edit | None = None, compares: bool = False) -> None:
        self._cpu = cpu
        row_groups = column_groups = None
        if inputs.masked:
            row_groups, column_groups = map(self.buffer, _small_groups(inputs))
        edited: dict[str, Any] = {}
        if edit is not None:
            row_ids, column_ids = _small(edit.row_ids, edit.column_ids)
            edited = {
                "row_ids": self.buffer(row_ids), "column_ids": self.buffer(column_ids),
                "row_levels": self.buffer(edit.row_levels), "column_levels": self.buffer(edit.column_levels),
            }  # fmt: skip
        teacher: dict[str, Any] = {}
        if inputs.teacher is not None:
            image, text, scale = inputs.teacher
            teacher = {
                "teacher_image": self.buffer(image), "teacher_text": self.buffer(text), "teacher_scale": scale.item(),
            }  # fmt: skip
        self.problem = cpu.SimilarityInputs(
            image=self.buffer(inputs.image),
            text=self.buffer(inputs.text),
            pair_offset=inputs.pair_offset,
            scale=inputs.scale.item(),
            row_groups=row_groups,
            column_groups=column_groups,
            threads=torch.get_num_threads(),
            compares=compares,
            **teacher,
            **edited,
        )

    def buffer(self, tensor: Tensor | None) -> Any:
        return as_buffer_or_none(self._cpu, tensor)


def _whole_tiles(problem: Any, cache: Tensor) -> Tensor:
    """Return the part of a cache, made for any joint batch of this size, that this one fills."""
    row_bytes: int = problem.cache_row_bytes
    return cache[: row_bytes * min(problem.row_tiles, len(cache) // row_bytes)]


def _narrow(inputs: SimilarityInputs) -> bool:
    widths = [inputs.image.shape[1]]
    if inputs.want_consistency and inputs.teacher_image is not None:
        widths.append(inputs.teacher_image.shape[1])
    return sum(widths) < _NARROW * len(widths)


def _small_groups(inputs: SimilarityInputs) -> list[Tensor]:
    """Return the ids of rows and columns as int32 numbers that are equal if the ids are."""
    rows, columns = inputs.group_ids, inputs.column_groups
    assert rows is not None and columns is not None
    if rows is columns:
        small = rows.unique(return_inverse=True)[1].to(torch.int32)
        return [small, small]
    return _small(rows, columns)


def _small(rows: Tensor, columns: Tensor) -> list[Tensor]:
    small = torch.cat((rows, columns)).unique(return_inverse=True)[1].to(torch.int32)
    return [small[: len(rows)], small[len(rows) :]]


def floats(*shape: int) -> Tensor:
    """Return uninitialised float32 memory on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def gradient_buffer(features: Tensor, partial: bool = False) -> Tensor:
    """Return memory for the extension to write a gradient to, which it rounds to the dtype of this memory.

    partial: float32, as the gradient is a summand or a factor of something else.
    """
    return torch.empty(features.shape, dtype=torch.float32 if partial else features.dtype, device="cpu")


class _CpuSigmoid:
    """Implement `ops.sigmoid.SigmoidKernels`; computes in float32, takes no float64 and chooses its own strips."""

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        assert inputs.bias is not None
        call = Call(self._cpu, inputs)
        grad_image = gradient_buffer(inputs.image, partial=True) if need.image or need.scale else None
        grad_text = gradient_buffer(inputs.text, partial=True) if need.text else None
        loss, grad_scale, grad_bias = self._cpu.sigmoid(
            call.problem,
            bias=inputs.bias.item(),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            need_scale=need.scale,
            need_bias=need.scale,
            instruction_set=extension.instruction_set(),
        )
        return SigmoidParts(
            torch.tensor(loss, dtype=torch.float32, device="cpu"),
            floats(0) if grad_image is None or not need.image else grad_image,
            floats(0) if grad_text is None else grad_text,
            torch.tensor(grad_scale, dtype=torch.float32, device="cpu"),
            torch.tensor(grad_bias, dtype=torch.float32, device="cpu"),
        )


kernels = CpuKernels()
sweep = as_sweep(kernels)
calibrated = as_calibrated(kernels)
sigmoid = as_sigmoid(_CpuSigmoid())
