"""The CPU half of the backend "native": `csrc/cpu`, tiles of S and S° with one exponential for row and column.

The gradients are computed in float32, from features of any dtype but float64. keep="similarities" stores the
exponentials of the first rows, in float32, and saves forming S and S° again: four products in place of six.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops import softmax_stats
from cliperase_fast.ops.autograd import cache_budget
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.buffers import as_buffer_or_none
from cliperase_fast.ops.spec import SavedStats, SimilarityInputs, Stats

_FLOAT = 4  # bytes
# What "auto" keeps depends on what forming it again would cost, which grows with the width. CPU time of a step of 8192
# pairs with AVX-512: keeping saves a quarter of it at width 64, a fifth at 32, a seventh at 16, for some 500 MiB in
# place of 27, and the first step, which touches them, takes 1.5 to 6 times as long. Narrow features are kept within
# what a strip of dS takes anyway.
_NARROW = 48  # widths below
_KEPT_OF_NARROW = 16 << 20


class CpuKernels:
    """See `ops.autograd.SweepKernels`. Memory: O(N D), a strip of dS, at most 16 MiB (N up to 16,384), what is kept."""

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu
        # plain numbers, so that torch.compile can trace cache_size
        self._tile_rows: int = self._cpu.TILE_ROWS
        self._tile_columns: int = self._cpu.TILE_COLUMNS
        self._tile_head: int = self._cpu.TILE_HEADER
        self._told = False

    def check(self, problem: SimilarityInputs) -> None:
        """Takes everything that the backend's record allows."""

    def cache_size(self, problem: SimilarityInputs, keep: str) -> int:
        if keep == "nothing":
            return 0
        row_bytes = self._tile_row_bytes(problem)
        tile_rows = -(-problem.n // self._tile_rows)
        budget = cache_budget(problem.image.device)
        if keep == "auto" and _narrow(problem):
            budget = min(budget, _KEPT_OF_NARROW)
        return row_bytes * min(tile_rows, budget // row_bytes)

    def _tile_row_bytes(self, problem: SimilarityInputs) -> int:
        """What is kept of each `_tile_rows` rows."""
        tiles = 2 if problem.want_consistency else 1
        blocks = -(-problem.m // self._tile_columns)
        return _FLOAT * blocks * (self._tile_head + tiles * self._tile_rows * self._tile_columns)

    def forward(self, problem: SimilarityInputs, strip_rows: int, cache_size: int) -> tuple[Stats, Tensor]:
        kept = self._workspace(cache_size)
        call = Call(self._cpu, problem)
        diagonals = floats(2, problem.n)
        rows, columns = floats(problem.planes, problem.n), floats(problem.planes, problem.m)
        shift = self._cpu.forward(
            call.problem,
            diagonal=call.buffer(diagonals[0]),
            teacher_diagonal=call.buffer(diagonals[1]),
            row_stats=call.buffer(rows),
            column_stats=call.buffer(columns),
            cache=call.buffer(kept),
            instruction_set=extension.instruction_set(),
        )
        diagonal = diagonals[0] if problem.paired else None
        teacher_diagonal = diagonals[1] if problem.paired and problem.want_consistency else None
        gap_shift = torch.tensor(shift, dtype=torch.float32, device="cpu") if problem.want_consistency else None
        return Stats(rows, columns, diagonal, teacher_diagonal, gap_shift), kept

    def losses(
        self, problem: SimilarityInputs, strip_rows: int, cache_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`softmax_stats.losses_of_sums` in one call."""
        kept = self._workspace(cache_size)
        retention, consistency, state = floats(), floats(), floats(softmax_stats.PLANES, 2 * problem.n)
        call = Call(self._cpu, problem)
        self._cpu.losses(
            call.problem,
            want_retention=problem.want_retention,
            retention=call.buffer(retention),
            consistency=call.buffer(consistency),
            saved_stats=call.buffer(state),
            cache=call.buffer(kept),
            instruction_set=extension.instruction_set(),
        )
        return retention, consistency, state, kept

    def backward(
        self,
        problem: SimilarityInputs,
        state: SavedStats,
        weight_retention: Tensor,
        weight_consistency: Tensor,
        strip_rows: int,
        kept: Tensor,
        need_image: bool,
        need_text: bool,
        need_scale: bool,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(self._cpu, problem)
        image, text = problem.image, problem.text
        grad_image = gradient_buffer(image) if need_image or need_scale else None
        grad_text = gradient_buffer(text) if need_text else None
        grad_scale = self._cpu.backward(
            call.problem,
            saved_stats=call.buffer(state.both.contiguous()),
            want_retention=problem.want_retention,
            weight_retention=weight_retention.item(),
            weight_consistency=weight_consistency.item(),
            cache=call.buffer(kept),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            need_scale=need_scale,
            instruction_set=extension.instruction_set(),
        )
        return (
            image.new_empty(0) if grad_image is None or not need_image else finished(grad_image, image, partial),
            text.new_empty(0) if grad_text is None else finished(grad_text, text, partial),
            torch.tensor(grad_scale, dtype=problem.scale.dtype, device="cpu"),
        )

    def _workspace(self, size: int) -> Tensor:
        """uint8 [size] from the extension's pool; [0] where there is no memory for it."""
        if size:
            try:
                return torch.frombuffer(self._cpu.Workspace(size), dtype=torch.uint8)
            except MemoryError:
                if not self._told:
                    warnings.warn(
                        f"no memory to keep the similarities, {size / 2**20:.0f} MiB: they are formed again in the "
                        "backward pass; CLIPERASE_KEEP_MIB sets how much is tried",
                        stacklevel=2,
                    )
                    self._told = True
        return torch.empty(0, dtype=torch.uint8, device="cpu")


class Call:
    """A problem as the extension takes it."""

    def __init__(self, cpu: Any, problem: SimilarityInputs) -> None:
        self._cpu = cpu
        row_groups = column_groups = None
        if problem.group_ids is not None:
            row_groups, column_groups = map(self.buffer, _small_groups(problem))
        teacher: dict[str, Any] = {}
        if problem.teacher_image is not None and problem.teacher_text is not None and problem.teacher_scale is not None:
            teacher = {
                "teacher_image": self.buffer(problem.teacher_image),
                "teacher_text": self.buffer(problem.teacher_text),
                "teacher_scale": problem.teacher_scale.item(),
            }
        self.problem = cpu.SimilarityInputs(
            image=self.buffer(problem.image),
            text=self.buffer(problem.text),
            pair_offset=problem.offset,
            scale=problem.scale.item(),
            row_groups=row_groups,
            column_groups=column_groups,
            threads=torch.get_num_threads(),
            **teacher,
        )

    def buffer(self, tensor: Tensor | None) -> Any:
        return as_buffer_or_none(self._cpu, tensor)


def _narrow(problem: SimilarityInputs) -> bool:
    widths = [problem.image.shape[1]]
    if problem.want_consistency and problem.teacher_image is not None:
        widths.append(problem.teacher_image.shape[1])
    return sum(widths) < _NARROW * len(widths)


def _small_groups(problem: SimilarityInputs) -> list[Tensor]:
    """The ids of rows and columns as int32 numbers, equal where the ids are."""
    rows, columns = problem.row_groups, problem.column_groups
    assert rows is not None and columns is not None
    if rows is columns:
        small = rows.unique(return_inverse=True)[1].to(torch.int32)
        return [small, small]
    small = torch.cat((rows, columns)).unique(return_inverse=True)[1].to(torch.int32)
    return [small[: problem.n], small[problem.n :]]


def floats(*shape: int) -> Tensor:
    """Memory that the extension writes float32 into, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def gradient_buffer(features: Tensor) -> Tensor:
    """[rows, width up to the next multiple of 16], as the extension writes it."""
    rows, width = features.shape
    return floats(rows, -(-width // 16) * 16)


def finished(gradient: Tensor, features: Tensor, partial: bool) -> Tensor:
    if gradient.shape == features.shape and (partial or features.dtype == gradient.dtype):
        return gradient
    return gradient[:, : features.shape[1]].to(gradient.dtype if partial else features.dtype).contiguous()
