"""The CPU half of the backend "native": `csrc/cpu`, tiles of S and S° with one exponential for row and column.

The gradients are computed in float32, from features of any dtype but float64. keep="similarities" stores the
exponentials of the first rows, in float32, and saves forming S and S° again: four products in place of six.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.ops.engine import keep_bytes
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.problem import Problem, State, Sums

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FLOAT = 4  # bytes


class CpuEngine:
    """See `ops.engine.Engine`. Memory: O(N D), a strip of dS of at most 16 MiB (N up to 16,384), and what is kept."""

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu
        # plain numbers, so that torch.compile can trace kept_bytes
        self._tile_rows: int = self._cpu.TILE_ROWS
        self._tile_columns: int = self._cpu.TILE_COLUMNS
        self._tile_head: int = self._cpu.TILE_HEAD
        self._dtypes = {dtype: getattr(self._cpu.Dtype, name) for dtype, name in DTYPES.items()}
        self._told = False

    def check(self, problem: Problem) -> None:
        """Takes everything that the backend's record allows."""

    def kept_bytes(self, problem: Problem, keep: str) -> int:
        if keep == "nothing":
            return 0
        row_bytes = self._tile_row_bytes(problem)
        tile_rows = -(-problem.n // self._tile_rows)
        return row_bytes * min(tile_rows, keep_bytes(problem.image.device) // row_bytes)

    def _tile_row_bytes(self, problem: Problem) -> int:
        """What is kept of each `_tile_rows` rows."""
        tiles = 2 if problem.want_consistency else 1
        blocks = -(-problem.m // self._tile_columns)
        return _FLOAT * blocks * (self._tile_head + tiles * self._tile_rows * self._tile_columns)

    def _kept_rows(self, problem: Problem, kept: Tensor) -> int:
        return min(problem.n, kept.numel() // self._tile_row_bytes(problem) * self._tile_rows)

    def forward(self, problem: Problem, strip_rows: int, kept_bytes: int) -> tuple[Sums, Tensor]:
        kept = self._workspace(kept_bytes)
        call = Call(self._cpu, self._dtypes, problem)
        diagonals = floats(2, problem.n)
        rows, columns = floats(problem.planes, problem.n), floats(problem.planes, problem.m)
        shift = self._cpu.forward(
            call.problem,
            diagonal=diagonals[0].data_ptr(),
            teacher_diagonal=diagonals[1].data_ptr(),
            row_sums=rows.data_ptr(),
            column_sums=columns.data_ptr(),
            kept=kept.data_ptr() if kept.numel() else 0,
            kept_rows=self._kept_rows(problem, kept),
            instruction_set=extension.instruction_set(),
        )
        diagonal = diagonals[0] if problem.paired else None
        teacher_diagonal = diagonals[1] if problem.paired and problem.want_consistency else None
        gap_shift = torch.tensor(shift, dtype=torch.float32, device="cpu") if problem.want_consistency else None
        return Sums(rows, columns, diagonal, teacher_diagonal, gap_shift), kept

    def losses(self, problem: Problem, strip_rows: int, kept_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`finish.losses_of_sums` in one call."""
        kept = self._workspace(kept_bytes)
        retention, consistency, state = floats(), floats(), floats(5, 2 * problem.n)
        call = Call(self._cpu, self._dtypes, problem)
        self._cpu.losses(
            call.problem,
            want_retention=problem.want_retention,
            retention=retention.data_ptr(),
            consistency=consistency.data_ptr(),
            state=state.data_ptr(),
            kept=kept.data_ptr() if kept.numel() else 0,
            kept_rows=self._kept_rows(problem, kept),
            instruction_set=extension.instruction_set(),
        )
        return retention, consistency, state, kept

    def backward(
        self,
        problem: Problem,
        state: State,
        weight_retention: Tensor,
        weight_consistency: Tensor,
        strip_rows: int,
        kept: Tensor,
        need_image: bool,
        need_text: bool,
        need_scale: bool,
        partial: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = Call(self._cpu, self._dtypes, problem)
        image, text = problem.image, problem.text
        grad_image = gradient_buffer(image) if need_image or need_scale else None
        grad_text = gradient_buffer(text) if need_text else None
        grad_scale = self._cpu.backward(
            call.problem,
            state=call.address(state.both.contiguous()),
            want_retention=problem.want_retention,
            weight_retention=weight_retention.item(),
            weight_consistency=weight_consistency.item(),
            kept=kept.data_ptr() if kept.numel() else 0,
            kept_rows=self._kept_rows(problem, kept),
            grad_image=0 if grad_image is None else grad_image.data_ptr(),
            grad_text=0 if grad_text is None else grad_text.data_ptr(),
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
    """A problem as the extension takes it; holds the tensors that it has only addresses of."""

    def __init__(self, cpu: Any, dtypes: dict[torch.dtype, Any], problem: Problem) -> None:
        self._cpu, self._dtypes = cpu, dtypes
        self._held: list[Tensor] = []
        row_groups = column_groups = 0
        if problem.group_ids is not None:
            row_groups, column_groups = map(self.address, _small_groups(problem))
        teacher: dict[str, Any] = {}
        if problem.teacher_image is not None and problem.teacher_text is not None and problem.teacher_scale is not None:
            teacher = {
                "teacher_width": problem.teacher_image.shape[1],
                "teacher_image": self._matrix(problem.teacher_image),
                "teacher_text": self._matrix(problem.teacher_text),
                "teacher_scale": problem.teacher_scale.item(),
            }
        self.problem = cpu.Problem(
            rows=problem.n,
            columns=problem.m,
            first=problem.offset,
            width=problem.image.shape[1],
            image=self._matrix(problem.image),
            text=self._matrix(problem.text),
            scale=problem.scale.item(),
            row_groups=row_groups,
            column_groups=column_groups,
            threads=torch.get_num_threads(),
            **teacher,
        )

    def address(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, features: Tensor) -> Any:
        return self._cpu.Matrix(self.address(features), *features.stride(), self._dtypes[features.dtype])


def _small_groups(problem: Problem) -> list[Tensor]:
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
