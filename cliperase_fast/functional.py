"""Compute the losses as functions: check the inputs, run a backend's sweep, combine the terms.

Feature tensors are [rows, width] and L2-normalised by the caller. Neither the norm nor finiteness is checked, because
reading values would stall a GPU. dtypes are float16, bfloat16, float32 and float64, and may be mixed. Half precision
is computed in float32. Losses have the computing dtype, gradients the dtype of their tensor. Autocast is off inside.
Scales are the factors themselves, exp(logit_scale parameter), as in open_clip's losses.

Formulas: CLIPErase (arXiv 2410.23330), with S = s I Tᵀ [N, N] and S° the same of the frozen teacher,

    retention    RM = ½ [ mean_i -log softmax_row(S)_ii + mean_j -log softmax_col(S)_jj ]
    forgetting   FM = mean_m <I_f[m], T_f[m]>
    consistency  CM = mean_i KL(softmax_row(S°)_i || softmax_row(S)_i)
                    + mean_j KL(softmax_col(S°)_j || softmax_col(S)_j)
    total           = lambda_retain RM + lambda_forget FM + lambda_consistency CM

Under transforms of `torch.func` (grad, vmap, jvp, ...) and forward-mode AD every backend computes as "eager" does, with
N x N matrices. Only "eager" has second derivatives; the other backends raise UnlearningError. Features made in
inference mode are copied if they must be saved for backward. Nonfinite features or scales give nonfinite losses.

process_group: with "local" the batch is this process's own, even if there are several processes. With "world" or a
torch.distributed group the batch is spread over the ranks of the group. Each rank passes its own pairs, of any number,
including none. All ranks call the loss with the same options, and its backward with the same incoming gradient. Every
rank gets the values of the whole batch. The gradients of a rank's features are those of the whole batch's loss times
the number of ranks; the gradient of a scale is right in the mean over the ranks. So after DistributedDataParallel has
averaged them, the gradients of parameters are those of one process with the whole batch. gather: with "all" each rank
holds all texts; with "ring" texts and their gradients pass from rank to rank in blocks, and a rank holds at most two.
If ranks differ in an option, all of them raise InputError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cliperase_fast.distributed import (
    LOCAL,
    Group,
    Shards,
    over_ranks,
    resolve_group,
    sharded_calibrated,
    sharded_sweep,
    sum_over_ranks,
)
from cliperase_fast.ops.calibrated import CalibratedInputs, background_levels
from cliperase_fast.ops.registry import Backend, Implementation
from cliperase_fast.ops.spec import SimilarityInputs, compute_dtype, no_autocast, savable
from cliperase_fast.terms import CONSISTENCY_MODES, FORGET_LOSSES
from cliperase_fast.validation import (
    CALIBRATED_WEIGHTS,
    check_calibrated,
    check_cliperase,
    check_contrast,
    refuse_on_ranks,
)

__all__ = ["CalibratedTerms", "LossTerms", "calibrated_loss", "clip_loss", "cliperase_loss", "similarity_kl"]

Found = TypeVar("Found")


def __dir__() -> list[str]:
    return __all__


class LossTerms(NamedTuple):
    """The weighted sum, and the three terms before their weights; 0-d tensors, all differentiable."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor


class CalibratedTerms(NamedTuple):
    """The weighted sum, and the four terms before their weights; 0-d tensors, all differentiable."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor
    anchor: Tensor


def cliperase_loss(
    forget_image: Tensor,
    forget_text: Tensor,
    retain_image: Tensor,
    retain_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float | None,
    *,
    lambda_retain: float = 1.0,
    lambda_forget: float = 3.0,
    lambda_consistency: float = 3.0,
    forget: str = "cosine",
    margin: float = 0.0,
    consistency: str = "logits",
    group_ids: Tensor | None = None,
    process_group: Any = LOCAL,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> LossTerms:
    """Compute the CLIPErase loss of a forget batch and a retain batch (arXiv 2410.23330, section 3).

    forget_image, forget_text: [M, D], the pairs to forget; M may be 0.
    retain_image, retain_text: [N, D], the pairs to keep; N may be 0.
    teacher_image, teacher_text: [N, D°], the frozen teacher's features of the retain pairs, in the same
        order, without gradient. May be None only if lambda_consistency is 0.
    logit_scale, teacher_logit_scale: a number or a tensor of one element, already exponentiated. The teacher's
        may be None if consistency is "features", which has no scale, or if lambda_consistency is 0.
    lambda_*: finite weights >= 0, not all 0. A term of weight 0 is not computed and comes back as 0.
    forget: "cosine" (FM above); "hinge": mean_m relu(cos_m - margin), no gradient below the margin;
        "contrastive": minus the CLIP loss of the forget pairs (gradient ascent).
    consistency: "logits" (CM above); "features": mean_i KL(softmax(I°_i) || softmax(I_i)) plus the same of
        the texts, softmax over the width of the normalised features, which needs D° = D; "intra": the row
        term of CM for the similarities s I Iᵀ within the images (teacher s° I° I°ᵀ), plus the same within the
        texts; the diagonals, each feature with itself, are included.
    group_ids: int64 [N]; retain pairs of equal id are not negatives of each other in RM (CM keeps them).
    process_group: "local": the batch is this process's own; "world" or a torch.distributed.ProcessGroup: it is spread
        over these ranks, and M and N are this rank's. torch.distributed.group.WORLD is None before
        init_process_group(), so None means "local" in a single process and raises InputError among several.
    gather: "all" or "ring", see the head of this module.
    backend: see `cliperase_fast.backends()`; "eager" does not support a process_group.
    keep: trades memory for speed; results are equal to rounding. "similarities": they are kept for the backward pass,
        up to CLIPERASE_KEEP_MIB; "compact": in half of the memory, see docs/kernels.md; "nothing"; "auto": the fastest
        as measured, and on a GPU all if they fit CLIPERASE_KEEP_MIB and half of the free memory. Ignored elsewhere.

    Returns LossTerms(total, retain, forget, consistency). An empty batch gives 0 with zero gradients.
    Raises InputError, before anything is computed, if an argument is not as above.
    """
    process_group = group_of(process_group)
    arguments = (
        forget_image, forget_text, retain_image, retain_text, teacher_image, teacher_text, logit_scale,
        teacher_logit_scale, lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency, group_ids,
        process_group, gather, backend, keep,
    )  # fmt: skip
    (scale, teacher_scale, _, run), (retain_shards, forget_shards) = agreed(
        process_group,
        lambda: check_cliperase(*arguments),
        lambda checked: described(
            "cliperase_loss", gather, checked.backend, keep, retain_image, retain_text, checked.scale, teacher_image,
            teacher_text, group_ids, forget_image=forget_image, forget_text=forget_text, lambda_retain=lambda_retain,
            lambda_forget=lambda_forget, lambda_consistency=lambda_consistency, forget=forget, margin=margin,
            consistency=consistency,
        ),
        gather,
        (retain_image, forget_image),
    )  # fmt: skip
    forget_image, forget_text, retain_image, retain_text, group_ids, teacher_image, teacher_text = savable(
        forget_image, forget_text, retain_image, retain_text, group_ids, teacher_image, teacher_text
    )
    zero = retain_image.new_zeros((), dtype=compute_dtype(retain_image, retain_text))
    retain_term = forget_term = consistency_term = zero
    fused = lambda_consistency > 0 and CONSISTENCY_MODES[consistency].fused
    with no_autocast(retain_image):
        if lambda_retain > 0 or fused:
            teacher: tuple[Any, Any, Any] = (teacher_image, teacher_text, teacher_scale) if fused else (None,) * 3
            inputs = SimilarityInputs(
                retain_image, retain_text, scale, *teacher, group_ids, want_retention=lambda_retain > 0, keep=keep
            )
            retain_term, consistency_term = _sweep(inputs, run, retain_shards)
        if lambda_forget > 0:
            inputs = SimilarityInputs(forget_image, forget_text, scale, keep=keep)
            forget_term = forget_term_of(inputs, forget, margin, run, forget_shards)
        if lambda_consistency > 0 and not fused:
            for student, frozen in ((retain_image, teacher_image), (retain_text, teacher_text)):
                assert frozen is not None and teacher_scale is not None
                inputs = SimilarityInputs(
                    student, student, scale, frozen, frozen, teacher_scale, want_retention=False, keep=keep
                )
                divergence = WITHIN_A_MODALITY[consistency](inputs, run, retain_shards)
                consistency_term = consistency_term + divergence
        total = torch.add(lambda_retain * retain_term, forget_term, alpha=lambda_forget)
        total = torch.add(total, consistency_term, alpha=lambda_consistency)
    return LossTerms(total, retain_term, forget_term, consistency_term)


def calibrated_loss(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float,
    *,
    forget_mask: Tensor,
    group_ids: Tensor | None = None,
    background_image: Tensor | None = None,
    background_text: Tensor | None = None,
    lambda_retain: float = 1.0,
    lambda_forget: float = 3.0,
    lambda_consistency: float = 3.0,
    lambda_anchor: float = 30.0,
    process_group: Any = LOCAL,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> CalibratedTerms:
    """Compute the loss of calibrated forgetting, which stops at the level of unrelated pairs.

    It has the modules of CLIPErase (arXiv 2410.23330), with an edited teacher, and is this library's own. The P pairs
    are forget and retain pairs in any order. With C, C° the cosines [P, P] of student and teacher, and E the entries
    (i, j) whose caption j is a forget caption and whose image i, of any kind, has the same concept,

        C*  (b_i + b'_j) / 2 on E, C° elsewhere: the edited teacher
        RM  as above, over the retain pairs only
        FM  mean over E of relu(C - C*)²
        CM  mean over rows i of KL(softmax(s° C*)_i || softmax(s C)_i), plus the same over columns, over all P pairs
        AM  mean outside E of (C - C*)²
        total = lambda_retain RM + lambda_forget FM + lambda_consistency CM + lambda_anchor AM

    image_features, text_features: [P, D]; P may be 0.
    teacher_image, teacher_text: [P, D°], the frozen teacher's features of the same pairs, without gradient.
    logit_scale, teacher_logit_scale: numbers or tensors of one element, already exponentiated.
    forget_mask: bool [P], True for the pairs to forget; all or none may be True. If these are the first or the last
        pairs, the features need not be copied.
    group_ids: int64 [P], the concept of each pair: its class, or the entity that it is about. They define E, and retain
        pairs of equal id are not negatives of each other in RM. Without ids the forget pairs are one concept, which no
        retain pair has.
    background_image, background_text: [P], the levels b and b', cosines without gradient: b_i = <I°_i, mean of T°>,
        b'_j = <mean of I°, T°_j>, over the retain pairs of the training data. None: over those of this batch.
    lambda_*: finite weights >= 0, not all 0. A term of weight 0 comes back as 0.
    process_group, gather, keep: as in `cliperase_loss`; the batch of all ranks is one joint batch.
    backend: as in `cliperase_loss`.

    Returns CalibratedTerms(total, retain, forget, consistency, anchor). A mean over an empty set is 0.
    Raises InputError, before anything is computed, if an argument is not as above.
    """
    process_group = group_of(process_group)
    weights = (lambda_retain, lambda_forget, lambda_consistency, lambda_anchor)
    checked, shards = agreed(
        process_group,
        lambda: check_calibrated(
            image_features, text_features, teacher_image, teacher_text, logit_scale, teacher_logit_scale, forget_mask,
            group_ids, background_image, background_text, weights, sharded=process_group is not None, gather=gather,
            backend=backend, keep=keep,
        ),
        lambda checked: described(
            "calibrated_loss", gather, checked.backend, keep, image_features, text_features, checked.scale,
            teacher_image, teacher_text, group_ids, background_image=background_image, background_text=background_text,
            **dict(zip(CALIBRATED_WEIGHTS, weights, strict=True)),
        ),
        gather,
        (image_features, image_features),
        counts=lambda: (int((~forget_mask).sum()), int(forget_mask.sum())),
    )  # fmt: skip
    assert checked.teacher_scale is not None
    image, text, frozen_image, frozen_text, mask, ids, level_image, level_text = savable(
        image_features, text_features, teacher_image, teacher_text, forget_mask, group_ids, background_image,
        background_text,
    )  # fmt: skip
    with no_autocast(image_features):
        levels = background_levels(
            frozen_image, frozen_text, mask, level_image, level_text, lambda own: over_ranks(own, shards[0])
        )
        inputs = CalibratedInputs(
            image, text, checked.scale, frozen_image, frozen_text, checked.teacher_scale, mask, *levels, ids,
            keep=keep,
        )  # fmt: skip
        terms = list(_calibrated(inputs, checked.run, shards))
        total = zero = terms[0].new_zeros(())
        for place, weight in enumerate(weights):
            if weight > 0:
                total = torch.add(total, terms[place], alpha=weight)
            else:
                terms[place] = zero
    return CalibratedTerms(total, *terms)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group_ids: Tensor | None = None,
    process_group: Any = LOCAL,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """Compute CLIP's symmetric contrastive loss (arXiv 2103.00020, figure 3): RM above, open_clip's ClipLoss.

    image_features, text_features: [N, D]. logit_scale: a number or tensor of one element, already
        exponentiated.
    group_ids: int64 [N]; pairs of equal id (same caption, same class) are not negatives of each other.
    process_group, gather: as in `cliperase_loss`.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError, before anything is computed, if an argument is not as above.
    """
    return contrast(
        "clip_loss", image_features, text_features, logit_scale, group_ids=group_ids, process_group=process_group,
        gather=gather, backend=backend, keep=keep,
    )[0]  # fmt: skip


def similarity_kl(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    process_group: Any = LOCAL,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """Compute the KL divergence from a frozen teacher's similarities to the student's, rows plus columns: CM above.

    image_features, text_features: [N, D]; teacher_image, teacher_text: [N, D°], the same pairs, without
        gradient.
    logit_scale, teacher_logit_scale: numbers or tensors of one element, already exponentiated.
    process_group, gather: as in `cliperase_loss`.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError, before anything is computed, if an argument is not as above.
    """
    return contrast(
        "similarity_kl", image_features, text_features, logit_scale, (teacher_image, teacher_text, teacher_logit_scale),
        want_retention=False, process_group=process_group, gather=gather, backend=backend, keep=keep,
    )[1]  # fmt: skip


def contrast(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    *,
    want_retention: bool = True,
    group_ids: Tensor | None = None,
    process_group: Any = LOCAL,
    own_values: bool = False,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute (RM, CM) of one batch in one sweep; CM only with a teacher (image, text, scale).

    name: the loss, which must be the same on every rank. own_values: with a process_group, return the means over this
    rank's own rows and columns; for ranks with equal numbers of pairs, their mean is the batch's value. The gradients
    stay those of the whole batch. The other arguments and the errors are those of `clip_loss` and `similarity_kl`.
    """
    process_group = group_of(process_group)
    frozen: tuple[Any, Any] = (None, None) if teacher is None else teacher[:2]
    checked, (shards,) = agreed(
        process_group,
        lambda: check_contrast(
            image_features, text_features, logit_scale, teacher, group_ids, sharded=process_group is not None,
            gather=gather, backend=backend, keep=keep,
        ),
        lambda checked: described(
            name, gather, checked.backend, keep, image_features, text_features, checked.scale, *frozen, group_ids,
            own_values=own_values,
        ),
        gather,
        (image_features,),
        own_values,
    )  # fmt: skip
    image, text, teacher_image, teacher_text, group_ids = savable(image_features, text_features, *frozen, group_ids)
    inputs = SimilarityInputs(
        image, text, checked.scale, teacher_image, teacher_text, checked.teacher_scale, group_ids, want_retention,
        keep=keep,
    )  # fmt: skip
    with no_autocast(image_features):
        return _sweep(inputs, checked.run, shards)


def _sweep(inputs: SimilarityInputs, run: Implementation, shards: Shards | None) -> tuple[Tensor, Tensor]:
    """Return (retention, consistency); for an empty batch, zeros with zero gradients."""
    if (inputs.n if shards is None else shards.total) == 0:
        zero = _zero(inputs.image, inputs.text, inputs.scale)
        return zero, zero
    if shards is None:
        return run.sweep(inputs)
    assert run.kernels is not None
    return sharded_sweep(run.kernels, shards, inputs)


def _calibrated(inputs: CalibratedInputs, run: Implementation, parts: list[Shards | None]) -> tuple[Tensor, ...]:
    """Return the four terms; parts: the shards of the retain and of the forget pairs."""
    assert run.calibrated is not None
    retain, forget = parts
    if (len(inputs.image) if retain is None or forget is None else retain.total + forget.total) == 0:
        return (_zero(inputs.image, inputs.text, inputs.scale),) * 4
    loss, kernels = run.calibrated
    if retain is None or forget is None:
        return loss(inputs)
    assert kernels is not None
    return sharded_calibrated(kernels, (retain, forget), inputs).unbind()


def _zero(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return 0 with zero gradients, for features of no rows."""
    dtype = compute_dtype(image, text)
    return image.sum(dtype=dtype) + text.sum(dtype=dtype) + 0 * scale.to(dtype)


def forget_term_of(
    inputs: SimilarityInputs, forget: str, margin: float, run: Implementation, shards: Shards | None
) -> Tensor:
    sum_over_pairs = FORGET_LOSSES[forget].sum_over_pairs
    if sum_over_pairs is None:  # contrastive
        return -_sweep(inputs, run, shards)[0]
    products = inputs.image.to(inputs.dtype) * inputs.text.to(inputs.dtype)  # [M, D]
    return _mean(sum_over_pairs(products, margin), inputs.n, shards)


def _mean(total: Tensor, count: int, shards: Shards | None) -> Tensor:
    """Divide `total`, of `count` pairs here, by the pairs of the whole batch."""
    if shards is None:
        return total / max(count, 1)
    return sum_over_ranks(shards, total) / max(shards.total, 1)


def _features_kl(inputs: SimilarityInputs, run: Implementation, shards: Shards | None) -> Tensor:
    student, teacher = inputs.image, inputs.teacher_image
    assert teacher is not None
    mean = run.features_kl(student, teacher) if inputs.n else student.sum(dtype=compute_dtype(student, teacher))
    return mean if shards is None else _mean(mean * inputs.n, inputs.n, shards)


def _intra_kl(inputs: SimilarityInputs, run: Implementation, shards: Shards | None) -> Tensor:
    return 0.5 * _sweep(inputs, run, shards)[1]  # symmetric, so the rows are half of rows plus columns


# The consistency modes that compare each modality with itself.
WITHIN_A_MODALITY = {"features": _features_kl, "intra": _intra_kl}


def group_of(process_group: Any) -> Any:
    """Return `resolve_group(process_group)`; the common case "local" skips the call."""
    return None if isinstance(process_group, str) and process_group == LOCAL else resolve_group(process_group)


def agreed(
    process_group: Any,
    check: Callable[[], Found],
    describe: Callable[[Found], dict[str, object]],
    gather: str,
    batches: tuple[Tensor, ...],
    own_values: bool = False,
    counts: Callable[[], tuple[int, int]] | None = None,
) -> tuple[Found, list[Shards | None]]:
    """Run `check`, and return its result and the shards of each batch; None for each without a process_group.

    check: an InputError that it raises is raised on the other ranks too. describe: returns, for the result of `check`,
    what must be the same on every rank. batches: the image features of one or two batches; counts: returns the pairs
    of two batches that share their features.
    """
    if process_group is None:
        return check(), [None] * len(batches)
    refuse_on_ranks(*(batch for batch in batches if isinstance(batch, Tensor)))  # before the ranks talk
    group = Group(process_group)
    with group.propagate_errors():
        checked = check()
        group.check_device(batches[0].device)
        said = describe(checked)
    own = counts() if counts else (len(batches[0]), len(batches[1]) if len(batches) > 1 else 0)
    sizes = group.agree(said, own)[: len(batches)]
    return checked, [Shards(group, ranks, gather, own_values) for ranks in sizes]


def described(
    function: str,
    gather: str,
    backend: Backend,
    keep: str,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    group_ids: Tensor | None,
    **more: object,
) -> dict[str, object]:
    """Return what must be the same on every rank, without values that lie on a device."""
    tensors = {
        "image features": image,
        "text features": text,
        "logit_scale": scale,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "group_ids": group_ids,
    }
    options: dict[str, object] = {"loss": function, "gather": gather, "keep": keep, **more, "backend": backend.name}
    for name, value in {**tensors, **more}.items():
        if isinstance(value, Tensor):
            needs = "with" if torch.is_grad_enabled() and value.requires_grad else "without"
            width = f" of width {value.shape[1]}" if value.ndim == 2 else ""
            options[name] = f"{value.dtype}{width} {needs} gradient"
        elif value is None:
            options[name] = "none"
    return options
