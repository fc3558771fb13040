"""What a streamed backend computes: the problem, what its forward sweep finds, and what its backward sweep is given.

Rows are the pairs at hand; columns are all the pairs that they are compared with. On one device both are the whole
batch. A process that holds a part of a batch has its own rows, and the columns of every process or of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cliperase_fast.ops.sweep import compute_dtype


@dataclass(frozen=True)
class Problem:
    """The arguments of a sweep, as the caller gave them: any strides, dtypes mixed or not. n, m >= 1."""

    image: Tensor  # [n, D]
    text: Tensor  # [m, D]
    scale: Tensor  # []
    teacher_image: Tensor | None  # [n, D°], None unless want_consistency
    teacher_text: Tensor | None  # [m, D°]
    teacher_scale: Tensor | None  # []
    group_ids: Tensor | None  # int64 [n], None unless want_retention
    want_retention: bool
    want_consistency: bool
    column_group_ids: Tensor | None = None  # int64 [m]; None: group_ids are those of the columns too
    offset: int = 0  # row i and column i + offset are a pair; m: no column here belongs to a row

    @property
    def n(self) -> int:
        """Rows."""
        return self.image.shape[0]

    @property
    def m(self) -> int:
        """Columns."""
        return self.text.shape[0]

    @property
    def paired(self) -> bool:
        """Whether the columns hold the rows' own: all of them or none."""
        return self.offset < self.m

    @property
    def row_groups(self) -> Tensor | None:
        return self.group_ids

    @property
    def column_groups(self) -> Tensor | None:
        return self.group_ids if self.column_group_ids is None else self.column_group_ids

    @property
    def masked(self) -> bool:
        """Whether sums without the pairs of equal group id are wanted."""
        return self.group_ids is not None

    @property
    def plain(self) -> bool:
        """Whether sums over all pairs are wanted."""
        return self.want_consistency or not self.masked

    @property
    def planes(self) -> int:
        """How many numbers a row or column leaves, see `Sums`."""
        return 2 * (self.plain + self.masked) + 3 * self.want_consistency

    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.image, self.text, self.teacher_image, self.teacher_text)


class Sums(NamedTuple):
    """What a forward sweep finds, in the computing dtype and natural units.

    Planes, as far as wanted and in this order: maximum of S and total of exp(S - maximum) where problem.plain; the same
    without the pairs of equal group id where problem.masked; of S° maximum, total and gap, the sum of
    exp(S° - maximum) (S° - S - shift), where problem.want_consistency. All leave a pair's own entry out.
    """

    rows: Tensor  # [planes, n]
    columns: Tensor  # [planes, m]
    diagonal: Tensor | None  # [n], each row's own entry of S; None unless problem.paired
    teacher_diagonal: Tensor | None  # [n], of S°; None without a teacher too
    shift: Tensor | None  # [], any constant near S° - S


class State(NamedTuple):
    """What a backward sweep needs of the forward ones; the planes are in `ops/finish.py`."""

    both: Tensor  # [finish.PLANES, n + m], of the rows and of the columns
    n: int

    @property
    def rows(self) -> Tensor:
        """[planes, n]."""
        return self.both[:, : self.n]

    @property
    def columns(self) -> Tensor:
        """[planes, m]."""
        return self.both[:, self.n :]
