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
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

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
