"""The losses as functions: check the inputs, run the sweep of a backend, put the terms together.

Feature tensors are [rows, width], L2-normalised by the caller (this is not checked, nor is finiteness:
looking at values would stall a GPU). dtypes float16, bfloat16, float32, float64, mixed or not; the two half
precisions are computed in float32, losses come back in the computing dtype and gradients in the dtype of
their tensor. Autocast is off inside. Scales are the factors themselves, exp(logit_scale parameter), as
open_clip's losses take them.

Formulas: CLIPErase (arXiv 2410.23330), with S = s I Tᵀ [N, N] and S° the same of the frozen teacher,

    retention    RM = ½ [ mean_i -log softmax_row(S)_ii + mean_j -log softmax_col(S)_jj ]
    forgetting   FM = mean_m <I_f[m], T_f[m]>
    consistency  CM = mean_i KL(softmax_row(S°)_i || softmax_row(S)_i)
                    + mean_j KL(softmax_col(S°)_j || softmax_col(S)_j)
    total           = lambda_retain RM + lambda_forget FM + lambda_consistency CM
"""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.config import CONSISTENCY_MODES, FORGET_LOSSES
from cliperase_fast.errors import InputError
from cliperase_fast.ops import choose, compute_dtype, no_autocast

_KEEP_MODES = ("auto", "nothing", "similarities")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LossTerms(NamedTuple):
    """The weighted sum, and the three terms before their weights; 0-d tensors, all differentiable."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor


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
    backend: str = "auto",
    keep: str = "auto",
) -> LossTerms:
    """The CLIPErase loss of a forget batch and a retain batch (arXiv 2410.23330, section 3).

    forget_image, forget_text: [M, D], the pairs to forget; M may be 0.
    retain_image, retain_text: [N, D], the pairs to keep; N may be 0.
    teacher_image, teacher_text: [N, D°], the frozen teacher's features of the retain pairs, in the same
        order, without gradient. None only where lambda_consistency is 0.
    logit_scale, teacher_logit_scale: a number or a tensor of one element, already exponentiated. The
        teacher's may be None where consistency is "features", which has no scale, or lambda_consistency is 0.
    lambda_*: finite weights >= 0, not all 0. A term of weight 0 is not computed and comes back as 0.
    forget: "cosine" (FM above); "hinge": mean_m relu(cos_m - margin), no push below the margin;
        "contrastive": minus the CLIP loss of the forget pairs (gradient ascent).
    consistency: "logits" (CM above); "features": mean_i KL(softmax(I°_i) || softmax(I_i)) plus the same of
        the texts, softmax over the width of the normalised features, which needs D° = D; "intra": the row
        term of CM for the similarities s I Iᵀ inside the images (teacher s° I° I°ᵀ), plus the same inside the
        texts; the diagonals, each feature with itself, stay in.
    group_ids: int64 [N]; retain pairs of equal id are no negatives of each other in RM (CM keeps them).
    backend: see `cliperase_fast.backends()`.
    keep: speed against memory, the same results to rounding: "similarities" lets the forward pass keep them, within
        CLIPERASE_KEEP_MIB, so that the backward pass need not form them again; "nothing"; "auto" as measured best.
        Backends without the choice take no notice.

    Returns LossTerms(total, retain, forget, consistency). An empty batch gives 0 with zero gradients.
    Raises InputError before computing anything when an argument is not as above.
    """
    check_options(lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency)
    check_keep(keep)
    _check_pairs("forget_image", forget_image, "forget_text", forget_text)
    _check_pairs("retain_image", retain_image, "retain_text", retain_text)
    _check_device("forget_image", forget_image, "retain_image", retain_image)
    if forget_image.shape[1] != retain_image.shape[1]:
        raise InputError(
            f"forget_image {_shape(forget_image)} and retain_image {_shape(retain_image)} differ in width; "
            "both come from the student"
        )
    _check_group_ids(group_ids, "retain_image", retain_image)
    scale = _as_scale("logit_scale", logit_scale, retain_image)
    teacher_scale = None
    if lambda_consistency > 0:
        needed_scale = 1.0 if consistency == "features" else teacher_logit_scale
        teacher_scale = _check_teacher("retain_image", retain_image, teacher_image, teacher_text, needed_scale)
        if consistency == "features" and teacher_image is not None and teacher_image.shape != retain_image.shape:
            raise InputError(
                "consistency='features' compares features directly, so teacher_image must be as wide as "
                f"retain_image, {retain_image.shape[1]}; use 'logits' or 'intra' with a teacher like this"
            )
    choose(backend, retain_image, retain_text)  # a wrong name is an error whichever terms are wanted

    zero = retain_image.new_zeros((), dtype=compute_dtype(retain_image, retain_text))
    retain_term = forget_term = consistency_term = zero
    fused = lambda_consistency > 0 and consistency == "logits"
    with no_autocast(retain_image):
        if lambda_retain > 0 or fused:
            teacher = (teacher_image, teacher_text, teacher_scale) if fused else (None, None, None)
            retain_term, consistency_term = _sweep(
                retain_image, retain_text, scale, *teacher, group_ids, lambda_retain > 0, fused, backend, keep
            )
        if lambda_forget > 0:
            forget_term = _forget(forget_image, forget_text, scale, forget, margin, backend, keep)
        if lambda_consistency > 0 and not fused:
            for student, frozen in ((retain_image, teacher_image), (retain_text, teacher_text)):
                assert frozen is not None and teacher_scale is not None
                if consistency == "features":
                    divergence = _features_kl(student, frozen, backend)
                else:
                    divergence = _intra_kl(student, scale, frozen, teacher_scale, backend, keep)
                consistency_term = consistency_term + divergence
        total = lambda_retain * retain_term + lambda_forget * forget_term + lambda_consistency * consistency_term
    return LossTerms(total, retain_term, forget_term, consistency_term)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group_ids: Tensor | None = None,
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """The symmetric contrastive loss of CLIP (arXiv 2103.00020, figure 3): RM above, open_clip's ClipLoss.

    image_features, text_features: [N, D]. logit_scale: a number or tensor of one element, already
        exponentiated.
    group_ids: int64 [N]; pairs of equal id (same caption, same class) are no negatives of each other.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError before computing when an argument is not as above.
    """
    check_keep(keep)
    _check_pairs("image_features", image_features, "text_features", text_features)
    _check_group_ids(group_ids, "image_features", image_features)
    scale = _as_scale("logit_scale", logit_scale, image_features)
    with no_autocast(image_features):
        return _sweep(image_features, text_features, scale, None, None, None, group_ids, True, False, backend, keep)[0]


def similarity_kl(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """KL divergence from a frozen teacher's similarities to the student's, rows plus columns, CM above.

    image_features, text_features: [N, D]; teacher_image, teacher_text: [N, D°], the same pairs, without
        gradient.
    logit_scale, teacher_logit_scale: numbers or tensors of one element, already exponentiated.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError before computing when an argument is not as above.
    """
    check_keep(keep)
    _check_pairs("image_features", image_features, "text_features", text_features)
    scale = _as_scale("logit_scale", logit_scale, image_features)
    teacher_scale = _check_teacher("image_features", image_features, teacher_image, teacher_text, teacher_logit_scale)
    with no_autocast(image_features):
        return _sweep(
            image_features,
            text_features,
            scale,
            teacher_image,
            teacher_text,
            teacher_scale,
            None,
            False,
            True,
            backend,
            keep,
        )[1]


def _sweep(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    backend: str,
    keep: str,
) -> tuple[Tensor, Tensor]:
    """The chosen backend's (retention, consistency); for an empty batch zeros that carry (zero) gradients."""
    sweep = choose(backend, image, text, teacher_image, teacher_text).load()
    if len(image) == 0:
        dtype = compute_dtype(image, text)
        zero = image.sum(dtype=dtype) + text.sum(dtype=dtype) + 0 * scale.to(dtype)
        return zero, zero
    return sweep(
        image,
        text,
        scale,
        teacher_image,
        teacher_text,
        teacher_scale,
        group_ids,
        want_retention,
        want_consistency,
        keep,
    )


def _forget(image: Tensor, text: Tensor, scale: Tensor, forget: str, margin: float, backend: str, keep: str) -> Tensor:
    if forget == "contrastive":
        return -_sweep(image, text, scale, None, None, None, None, True, False, backend, keep)[0]
    dtype = compute_dtype(image, text)
    cosine = (image.to(dtype) * text.to(dtype)).sum(1)  # [M]
    if forget == "hinge":
        cosine = F.relu(cosine - margin)
    return cosine.sum() / max(len(cosine), 1)


def _features_kl(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    features_kl = choose(backend, student, teacher).load_features_kl()
    return features_kl(student, teacher) if len(student) else student.sum(dtype=compute_dtype(student, teacher))


def _intra_kl(
    student: Tensor, scale: Tensor, teacher: Tensor, teacher_scale: Tensor, backend: str, keep: str
) -> Tensor:
    """mean_i KL(softmax(s° F° F°ᵀ)_i || softmax(s F Fᵀ)_i): symmetric, so half of rows plus columns."""
    both = _sweep(student, student, scale, teacher, teacher, teacher_scale, None, False, True, backend, keep)[1]
    return 0.5 * both


def check_options(
    lambda_retain: float,
    lambda_forget: float,
    lambda_consistency: float,
    forget: str,
    margin: float,
    consistency: str,
) -> None:
    """Raise InputError unless the weights are finite, >= 0 and not all 0, and the other options are known."""
    weights = {
        "lambda_retain": lambda_retain,
        "lambda_forget": lambda_forget,
        "lambda_consistency": lambda_consistency,
    }
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:  # false for NaN as well
            raise InputError(f"{name}={weight} must be a finite number, 0 or larger")
    if not any(weights.values()):
        raise InputError(f"{', '.join(weights)} are all 0: nothing would be trained")
    for name, value, known in (
        ("forget", forget, FORGET_LOSSES),
        ("consistency", consistency, CONSISTENCY_MODES),
    ):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
            raise InputError(f"{name}={value!r} is not known; {hint}")
    if not -1 <= margin <= 1:
        raise InputError(f"margin={margin} is a cosine: it must lie between -1 and 1")


def check_keep(keep: str) -> None:
    if keep not in _KEEP_MODES:
        raise InputError(f"keep={keep!r} is not known; use one of {', '.join(_KEEP_MODES)}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _check_features(name: str, features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise InputError(f"{name} must be a tensor [rows, width], not a {type(features).__name__}")
    if features.ndim != 2:
        raise InputError(f"{name} has shape {_shape(features)}; it must be two-dimensional, [rows, width]")
    if features.shape[1] == 0:
        raise InputError(f"{name} has shape {_shape(features)}: features of width 0; pass the encoder's output")
    if features.dtype not in _FLOATING:
        raise InputError(f"{name} has dtype {features.dtype}; convert it to float32, float64, float16 or bfloat16")


def _check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise InputError(f"{name} is on {tensor.device} and {like_name} on {like.device}; move them to one device")


def _check_pairs(image_name: str, image: Tensor, text_name: str, text: Tensor) -> None:
    _check_features(image_name, image)
    _check_features(text_name, text)
    _check_device(text_name, text, image_name, image)
    if image.shape != text.shape:
        what = "width" if len(image) == len(text) else "number of rows"
        raise InputError(
            f"{image_name} {_shape(image)} and {text_name} {_shape(text)} differ in {what}; "
            "row i of both belongs to pair i"
        )


def _check_teacher(
    student_name: str,
    student: Tensor,
    image: Tensor | None,
    text: Tensor | None,
    scale: Tensor | float | None,
) -> Tensor:
    """Check the teacher's features against the student's; returns its scale as a 0-d tensor."""
    if image is None or text is None or scale is None:
        raise InputError(
            "teacher_image, teacher_text and teacher_logit_scale are needed for the consistency term; "
            "to go without a teacher set lambda_consistency=0"
        )
    _check_pairs("teacher_image", image, "teacher_text", text)
    _check_device("teacher_image", image, student_name, student)
    if len(image) != len(student):
        raise InputError(
            f"teacher_image {_shape(image)} and {student_name} {_shape(student)} differ in number of rows; "
            "the teacher sees the same pairs"
        )
    scale = _as_scale("teacher_logit_scale", scale, student)
    for name, tensor in (("teacher_image", image), ("teacher_text", text), ("teacher_logit_scale", scale)):
        if tensor.requires_grad:
            raise InputError(
                f"{name} requires grad, but the teacher is frozen and gets no gradient: "
                f"compute it under torch.no_grad(), or pass {name}.detach()"
            )
    return scale


def _check_group_ids(group_ids: Tensor | None, name: str, image: Tensor) -> None:
    if group_ids is None:
        return
    if not isinstance(group_ids, Tensor) or group_ids.dtype != torch.int64:
        kind = group_ids.dtype if isinstance(group_ids, Tensor) else type(group_ids).__name__
        raise InputError(f"group_ids must be an int64 tensor, an id a pair, not {kind}")
    if group_ids.shape != image.shape[:1]:
        raise InputError(f"group_ids has shape {_shape(group_ids)}; {name} {_shape(image)} needs [{len(image)}]")
    _check_device("group_ids", group_ids, name, image)


def _as_scale(name: str, scale: Tensor | float, features: Tensor) -> Tensor:
    """`scale` as a 0-d tensor, at least float32, so that the gradients of several terms add up unrounded."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.dtype not in _FLOATING:
            raise InputError(
                f"{name} must be a number or one floating-point element, not {scale.dtype} of shape {_shape(scale)}"
            )
        _check_device(name, scale, "the features", features)
        return scale.reshape(()).to(compute_dtype(scale))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise InputError(f"{name}={scale!r} must be a finite number or a tensor of one element")
    return torch.full((), scale, dtype=compute_dtype(features), device=features.device)
