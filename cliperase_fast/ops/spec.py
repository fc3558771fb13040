"""What a backend is: one function, the sweep, and the numeric rules that every backend keeps.

A sweep goes once over the N x N similarities of a batch and returns the two losses that need them. Everything
else (weights, the forget term, the other consistency terms) is built on it in `functional.py`, the same for
all backends.

Rules, with d_i = S_ii the diagonal and r_i = log Σ_{j≠i} exp(S_ij - d_i), the log-odds of the rest of row i
against it:

- `1 - P_ii` is never taken: for nearly perfect pairs at a high scale it cancels to noise. It is sigmoid(r_i).
- retention of a row: -log softmax(S_i)_i = log(1 + exp(r_i)).
- consistency of a row: KL(P°_i || P_i) =
  Σ_{j≠i} P°_ij [(S°_ij - d°_i) - (S_ij - d_i)] - log(1 + exp(r°_i)) + log(1 + exp(r_i)).
- gradient with respect to the diagonal: retention -sigmoid(r_i), consistency sigmoid(r°_i) - sigmoid(r_i).
- maxima are those of the data (running ones where the data come in pieces), never a constant offset.

The same holds for the columns. float16 and bfloat16 features are computed in float32
(a GPU backend may round dL/dS to their dtype before its last products).

Rows are the pairs at hand; columns are all the pairs that they are compared with. On one device both are the whole
batch. A process that holds a part of a batch has its own rows, and the columns of every process or of one of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Sweep(Protocol):
    """One pass over the similarities of N >= 1 pairs; differentiable in image, text and logit_scale only.

    image, text: [N, D]; teacher_image, teacher_text: [N, D°], None unless want_consistency; any of float16,
    bfloat16, float32 and float64, mixed or not, any strides, all on one device; image and text may be one
    tensor. logit_scale, teacher_logit_scale: 0-d, float32 or float64. group_ids: int64 [N] or None;
    off-diagonal pairs of equal id leave the retention (not the consistency).
    Returns (retention, consistency), 0-d in `compute_dtype` of the features; the one that is not wanted is 0.
    The caller has checked all of this.
    keep: "similarities" may keep them for the backward pass, in bounded memory, "nothing" forms them again, "auto"
    leaves it to the backend. The results agree to rounding.
    """

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        teacher_logit_scale: Tensor | None,
        group_ids: Tensor | None,
        want_retention: bool,
        want_consistency: bool,
        keep: str = "auto",
    ) -> tuple[Tensor, Tensor]: ...


class FeaturesKl(Protocol):
    """mean_i KL(softmax(teacher_i) || softmax(student_i)), softmax over the width; differentiable in the student only.

    student, teacher: [N, D], N >= 1. Returns a 0-d tensor in `compute_dtype` of the features.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor: ...


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which these features are computed: the widest of theirs, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtype of their inputs, whatever autocast is active around it."""
    device_type = tensor.device.type
    # A small batch feels the cost of the other, and device "meta" has no autocast.
    if tensor.is_meta or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@dataclass(frozen=True)
class SimilarityInputs:
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
        """How many numbers a row or column leaves, see `Stats`."""
        return 2 * (self.plain + self.masked) + 3 * self.want_consistency

    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.image, self.text, self.teacher_image, self.teacher_text)


class Stats(NamedTuple):
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


class SavedStats(NamedTuple):
    """What a backward sweep needs of the forward ones; the planes are in `ops/softmax_stats.py`."""

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
