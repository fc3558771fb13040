"""Compute the four terms of calibrated forgetting.

With C, C° the cosines [P, P] of student and frozen teacher and S = s C, the mask of forget pairs and concept ids:

    E   = {(i, j): caption j is a forget caption, image i has its concept}   the edited entries, for any image i
    C*  = (b_i + b'_j) / 2 on E, C° elsewhere                                 the edited teacher
    RM  = ½ [mean_i -log softmax_row(S)_ii + mean_j -log softmax_col(S)_jj], over the retain pairs only
    FM  = mean over E of relu(C - C*)²
    CM  = mean_i KL(softmax_row(s° C*)_i || softmax_row(S)_i) + the same over the columns, over all pairs
    AM  = mean outside E of (C - C*)²

b_i is the background level of image i, the mean cosine of it with unrelated captions in the teacher; b'_j that of
caption j. Without ids, the forget pairs are one concept, and no retain pair has it. The mean of an empty set is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cliperase_fast.ops.spec import GradientTerms, Need, SimilarityInputs, Stats, compute_dtype


@dataclass(eq=False)
class CalibratedInputs:
    """The arguments of the calibrated loss of P >= 1 pairs. Do not modify it.

    Features are [P, width], of any strides and of mixed floating dtypes, on one device. Scales are 0-d, float32 or
    float64. The losses are differentiable in image, text and scale.
    """

    image: Tensor  # [P, D]
    text: Tensor  # [P, D]
    scale: Tensor  # []
    teacher_image: Tensor  # [P, D°]
    teacher_text: Tensor  # [P, D°]
    teacher_scale: Tensor  # []
    forget_mask: Tensor  # bool [P]
    background_image: Tensor  # [P], b, a cosine
    background_text: Tensor  # [P], b'
    group_ids: Tensor | None = None  # int64 [P]
    strip_rows: int = 0  # rows formed at a time; 0: the backend chooses
    keep: str = "auto"  # similarities for the backward pass, as in `SimilarityInputs`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the losses are computed."""
        return compute_dtype(self.image, self.text, self.teacher_image, self.teacher_text)


class Edit(NamedTuple):
    """Which entries of a block are edited, those of equal ids, and the cosines they get: row level + column level."""

    row_ids: Tensor  # int64 [n]
    column_ids: Tensor  # int64 [m]
    row_levels: Tensor  # [n], half the background level, in the computing dtype
    column_levels: Tensor  # [m]


def edited_entry(edit: Edit | None, row: int, column: int, entry: Tensor, scale: Tensor) -> Tensor:
    """Return an entry of S° after the edit; entry: before it, []; scale: s°, []."""
    if edit is None:
        return entry
    level = scale * (edit.row_levels[row] + edit.column_levels[column])
    return torch.where(edit.row_ids[row] == edit.column_ids[column], level, entry)


class Pull(NamedTuple):
    """The factors of C - C* in the gradient with respect to S, both []."""

    forget: Tensor  # of relu(C - C*), on E
    anchor: Tensor  # outside E


class CalibratedKernels(Protocol):
    """Define what a streamed backend provides; `as_calibrated` of `ops/calibrated_autograd.py` makes a loss of it.

    It works on blocks: rows and columns that are forget pairs or retain pairs, so that only blocks of forget columns
    are edited. The scales are not 0. edit: None if no entry is edited.
    """

    name: str  # of its custom ops

    def blocks_cache_size(self, inputs: SimilarityInputs) -> int:
        """Return how many bytes the forward pass keeps at the most of the blocks of all these rows and columns."""
        ...

    def calibrated_losses(self, inputs: CalibratedInputs, cache_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (terms [4], saved, factors [4], cache) of a batch in one piece, for `calibrated_gradients`.

        It is `calibrated_sweep.losses_by_blocks`, unless the backend has something faster.
        """
        ...

    def calibrated_gradients(
        self, inputs: CalibratedInputs, saved: Tensor, weights: Tensor, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of image, text and scale; weights [4]: those of the terms times their factors.

        It is `calibrated_sweep.gradients_by_blocks`, unless the backend has something faster. The caller turns the
        gradients into the dtypes of the inputs. A gradient that is not needed is an empty tensor (0-d for the scale).
        """
        ...

    def workspace(self, size: int, device: torch.device) -> Tensor:
        """Return memory for the caches of all blocks, uint8 [size], or fewer."""
        ...

    def cache_share(self, inputs: SimilarityInputs, available: int) -> int:
        """Return how many of the available bytes a block uses."""
        ...

    def calibrated_forward(self, inputs: SimilarityInputs, edit: Edit | None, cache: Tensor) -> tuple[Stats, Tensor]:
        """Return the statistics of S and of the edited S°, and two sums over all entries but those of own pairs.

        The sums [2] are of relu(C - C*)² over edited entries, and of (C - C*)² over the others.
        """
        ...

    def calibrated_backward(
        self, inputs: SimilarityInputs, edit: Edit | None, terms: GradientTerms, pull: Pull, cache: Tensor, need: Need
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of image and text, and Σ dS_ij S_ij, in the computing dtype.

        terms: of dS; their diagonal contains the pull on own pairs already. The gradients are of dS plus the pull, the
        sum is of dS alone and leaves own pairs out. A gradient that is not needed is an empty tensor.
        """
        ...


# The largest entry of a block of dS in float16, by its bound; its largest number is 65504.
_FLOAT16_LARGEST = 2.0**15


def calibrated_terms(
    features: Sequence[tuple[Tensor, Tensor]], edit: Edit | None, terms: GradientTerms, pull: Pull
) -> tuple[Tensor, Tensor, Pull, Tensor]:
    """Return (softmaxes [terms, 2 n + 2 m], diagonal [n], pull, unit []) of dS / unit, for backends that round it.

    features: image and text of the student, and of the teacher. A softmax is its row anchors, row factors, column
    anchors and column factors. The unit is 1, but for float16 one in which no entry exceeds the largest number, and
    the largest entries are near it.
    """
    softmaxes = torch.stack(
        [torch.cat((*softmax.rows, *softmax.columns)) for softmax in terms[:3] if softmax is not None]
    )
    if features[0][0].dtype != torch.float16:
        return softmaxes, terms.diagonal, pull, softmaxes.new_ones(())
    assert terms.largest is not None
    largest = softmaxes.new_zeros(())
    for image, text in features:
        largest = largest + image.float().norm(dim=1).amax() * text.float().norm(dim=1).amax()
    if edit is not None:
        largest = largest + edit.row_levels.abs().amax() + edit.column_levels.abs().amax()
    bound = terms.largest + largest * torch.stack(pull).abs().amax()
    bound = torch.maximum(bound, terms.diagonal.abs().amax())
    unit = bound.clamp_min(1e-30) / _FLOAT16_LARGEST
    n = len(terms.diagonal)
    m = softmaxes.shape[1] // 2 - n
    softmaxes[:, n : 2 * n] /= unit
    softmaxes[:, 2 * n + m :] /= unit
    return softmaxes, terms.diagonal / unit, Pull(pull.forget / unit, pull.anchor / unit), unit


class Calibrated(NamedTuple):
    """Hold the calibrated loss of a backend."""

    # returns (retention, forget, consistency, anchor), 0-d in the computing dtype, differentiable
    loss: Callable[[CalibratedInputs], tuple[Tensor, Tensor, Tensor, Tensor]]
    kernels: CalibratedKernels | None = None  # for a sharded batch; None: not supported


def background_levels(
    teacher_image: Tensor,
    teacher_text: Tensor,
    forget_mask: Tensor,
    of_image: Tensor | None = None,
    of_text: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> tuple[Tensor, Tensor]:
    """Return b and b' [P]: those given, or cosines with the mean caption, and the mean image, of the retain pairs here.

    total: sums a tensor over the processes that share the batch. Without retain pairs the levels are 0.
    """
    if of_image is not None and of_text is not None:
        return of_image, of_text
    dtype = compute_dtype(teacher_image, teacher_text)
    image, text = teacher_image.to(dtype), teacher_text.to(dtype)
    retained = (~forget_mask).to(dtype)  # [P]
    count = total(retained.sum()).clamp(min=1)
    return (
        image @ (total(retained @ text) / count) if of_image is None else of_image,
        text @ (total(retained @ image) / count) if of_text is None else of_text,
    )
