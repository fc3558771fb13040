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

process_group: the batch lies on the ranks of a torch.distributed group, each giving its own pairs, as many as it has, none
too. Every rank calls the loss, with the same options, and its backward, with the same incoming gradient. The values are
those of the whole batch on every rank. The gradients of a rank's features are those of the whole batch's loss times the
number of ranks; that of a scale is such that its mean over the ranks is right. So after DistributedDataParallel's
averaging the gradients of parameters are those of one process with the whole batch. gather: "all": each rank holds the
texts of all; "ring": texts and their gradients go round in blocks, at most two are held. Collectives follow one another
in the order of the calls, as DistributedDataParallel's do. What differs between ranks is an InputError on all of them.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.config import CONSISTENCY_MODES, FORGET_LOSSES
from cliperase_fast.distributed import GATHER_MODES, Group, Shards, sharded_sweep, sum_over_ranks
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
    process_group: Any = None,
    gather: str = "all",
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
    process_group: a torch.distributed.ProcessGroup over whose ranks the batch is spread, M and N as they are on this
        one; None: the batch is here.
    gather: "all" or "ring", see the head of this module.
    backend: see `cliperase_fast.backends()`; "eager" takes no process_group.
    keep: speed against memory, the same results to rounding: "similarities" lets the forward pass keep them, within
        CLIPERASE_KEEP_MIB, so that the backward pass need not form them again; "nothing"; "auto" as measured best.
        Backends without the choice take no notice.

    Returns LossTerms(total, retain, forget, consistency). An empty batch gives 0 with zero gradients.
    Raises InputError before computing anything when an argument is not as above.
    """
    arguments = (
        forget_image, forget_text, retain_image, retain_text, teacher_image, teacher_text, logit_scale,
        teacher_logit_scale, lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency, group_ids,
        process_group, gather, backend, keep,
    )  # fmt: skip
    retain_shards = forget_shards = None
    if process_group is None:
        scale, teacher_scale = _check_cliperase(*arguments)
    else:
        group = Group(process_group)
        with group.telling_the_others():
            scale, teacher_scale = _check_cliperase(*arguments)
            group.check_device(retain_image.device)
        said = _described(
            "cliperase_loss", gather, backend, keep, retain_image, retain_text, scale, teacher_image, teacher_text,
            group_ids, forget_image=forget_image, forget_text=forget_text, lambda_retain=lambda_retain,
            lambda_forget=lambda_forget, lambda_consistency=lambda_consistency, forget=forget, margin=margin,
            consistency=consistency,
        )  # fmt: skip
        sizes = group.agree(said, (len(retain_image), len(forget_image)))
        retain_shards, forget_shards = (Shards(group, ranks, gather) for ranks in sizes)

    zero = retain_image.new_zeros((), dtype=compute_dtype(retain_image, retain_text))
    retain_term = forget_term = consistency_term = zero
    fused = lambda_consistency > 0 and consistency == "logits"
    with no_autocast(retain_image):
        if lambda_retain > 0 or fused:
            teacher = (teacher_image, teacher_text, teacher_scale) if fused else (None, None, None)
            retain_term, consistency_term = _sweep(
                retain_image, retain_text, scale, *teacher, group_ids, lambda_retain > 0, fused, backend, keep,
                retain_shards,
            )  # fmt: skip
        if lambda_forget > 0:
            forget_term = _forget(forget_image, forget_text, scale, forget, margin, backend, keep, forget_shards)
        if lambda_consistency > 0 and not fused:
            for student, frozen in ((retain_image, teacher_image), (retain_text, teacher_text)):
                assert frozen is not None and teacher_scale is not None
                if consistency == "features":
                    divergence = _features_kl(student, frozen, backend, retain_shards)
                else:
                    divergence = _intra_kl(student, scale, frozen, teacher_scale, backend, keep, retain_shards)
                consistency_term = consistency_term + divergence
        total = lambda_retain * retain_term + lambda_forget * forget_term + lambda_consistency * consistency_term
    return LossTerms(total, retain_term, forget_term, consistency_term)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group_ids: Tensor | None = None,
    process_group: Any = None,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """The symmetric contrastive loss of CLIP (arXiv 2103.00020, figure 3): RM above, open_clip's ClipLoss.

    image_features, text_features: [N, D]. logit_scale: a number or tensor of one element, already
        exponentiated.
    group_ids: int64 [N]; pairs of equal id (same caption, same class) are no negatives of each other.
    process_group, gather: as in `cliperase_loss`.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError before computing when an argument is not as above.
    """

    def check() -> Tensor:
        check_keep(keep)
        _check_gather(gather)
        _check_pairs("image_features", image_features, "text_features", text_features)
        _check_group_ids(group_ids, "image_features", image_features)
        choose(backend, image_features, text_features, sharded=process_group is not None)
        return _as_scale("logit_scale", logit_scale, image_features)

    shards = None
    if process_group is None:
        scale = check()
    else:
        group = Group(process_group)
        with group.telling_the_others():
            scale = check()
            group.check_device(image_features.device)
        said = _described(
            "clip_loss", gather, backend, keep, image_features, text_features, scale, None, None, group_ids
        )
        shards = Shards(group, group.agree(said, (len(image_features), 0))[0], gather)
    with no_autocast(image_features):
        return _sweep(
            image_features, text_features, scale, None, None, None, group_ids, True, False, backend, keep, shards
        )[0]


def similarity_kl(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    process_group: Any = None,
    gather: str = "all",
    backend: str = "auto",
    keep: str = "auto",
) -> Tensor:
    """KL divergence from a frozen teacher's similarities to the student's, rows plus columns, CM above.

    image_features, text_features: [N, D]; teacher_image, teacher_text: [N, D°], the same pairs, without
        gradient.
    logit_scale, teacher_logit_scale: numbers or tensors of one element, already exponentiated.
    process_group, gather: as in `cliperase_loss`.
    Returns a 0-d tensor, 0 for N = 0. Raises InputError before computing when an argument is not as above.
    """
    teacher = (teacher_image, teacher_text)

    def check() -> tuple[Tensor, Tensor]:
        check_keep(keep)
        _check_gather(gather)
        _check_pairs("image_features", image_features, "text_features", text_features)
        scale = _as_scale("logit_scale", logit_scale, image_features)
        teacher_scale = _check_teacher("image_features", image_features, *teacher, teacher_logit_scale)
        choose(backend, image_features, text_features, *teacher, sharded=process_group is not None)
        return scale, teacher_scale

    shards = None
    if process_group is None:
        scale, teacher_scale = check()
    else:
        group = Group(process_group)
        with group.telling_the_others():
            scale, teacher_scale = check()
            group.check_device(image_features.device)
        said = _described("similarity_kl", gather, backend, keep, image_features, text_features, scale, *teacher, None)
        shards = Shards(group, group.agree(said, (len(image_features), 0))[0], gather)
    with no_autocast(image_features):
        return _sweep(
            image_features, text_features, scale, *teacher, teacher_scale, None, False, True, backend, keep, shards
        )[1]


def _described(
    function: str,
    gather: str,
    backend: str,
    keep: str,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    group_ids: Tensor | None,
    **more: object,
) -> dict[str, object]:
    """What must be the same on every rank, as far as it can be seen without waiting for a device."""
    tensors = {
        "image features": image,
        "text features": text,
        "logit_scale": scale,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "group_ids": group_ids,
    }
    options: dict[str, object] = {"loss": function, "gather": gather, "keep": keep, **more}
    options["backend"] = choose(backend, image, text, teacher_image, teacher_text, sharded=True).name
    for name, value in {**tensors, **more}.items():
        if isinstance(value, Tensor):
            needs = "with" if torch.is_grad_enabled() and value.requires_grad else "without"
            width = f" of width {value.shape[1]}" if value.ndim == 2 else ""
            options[name] = f"{value.dtype}{width} {needs} gradient"
        elif value is None:
            options[name] = "none"
    return options


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
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor]:
    """The chosen backend's (retention, consistency); for an empty batch zeros that carry (zero) gradients."""
    chosen = choose(backend, image, text, teacher_image, teacher_text, sharded=shards is not None)
    if (len(image) if shards is None else shards.total) == 0:
        dtype = compute_dtype(image, text)
        zero = image.sum(dtype=dtype) + text.sum(dtype=dtype) + 0 * scale.to(dtype)
        return zero, zero
    if shards is not None:
        assert chosen.load_engine is not None
        return sharded_sweep(
            chosen.load_engine(), shards, image, text, scale, teacher_image, teacher_text, teacher_scale, group_ids,
            want_retention, want_consistency, keep,
        )  # fmt: skip
    return chosen.load()(
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


def _forget(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    forget: str,
    margin: float,
    backend: str,
    keep: str,
    shards: Shards | None,
) -> Tensor:
    if forget == "contrastive":
        return -_sweep(image, text, scale, None, None, None, None, True, False, backend, keep, shards)[0]
    dtype = compute_dtype(image, text)
    cosine = (image.to(dtype) * text.to(dtype)).sum(1)  # [M]
    if forget == "hinge":
        cosine = F.relu(cosine - margin)
    return _mean(cosine.sum(), len(cosine), shards)


def _mean(total: Tensor, count: int, shards: Shards | None) -> Tensor:
    """`total` of `count` pairs here, over all pairs of the batch."""
    if shards is None:
        return total / max(count, 1)
    return sum_over_ranks(shards, total) / max(shards.total, 1)


def _features_kl(student: Tensor, teacher: Tensor, backend: str, shards: Shards | None) -> Tensor:
    features_kl = choose(backend, student, teacher, sharded=shards is not None).load_features_kl()
    mean = features_kl(student, teacher) if len(student) else student.sum(dtype=compute_dtype(student, teacher))
    return mean if shards is None else _mean(mean * len(student), len(student), shards)


def _intra_kl(
    student: Tensor,
    scale: Tensor,
    teacher: Tensor,
    teacher_scale: Tensor,
    backend: str,
    keep: str,
    shards: Shards | None,
) -> Tensor:
    """mean_i KL(softmax(s° F° F°ᵀ)_i || softmax(s F Fᵀ)_i): symmetric, so half of rows plus columns."""
    both = _sweep(student, student, scale, teacher, teacher, teacher_scale, None, False, True, backend, keep, shards)[1]
    return 0.5 * both


def _check_cliperase(
    forget_image: Tensor,
    forget_text: Tensor,
    retain_image: Tensor,
    retain_text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float | None,
    lambda_retain: float,
    lambda_forget: float,
    lambda_consistency: float,
    forget: str,
    margin: float,
    consistency: str,
    group_ids: Tensor | None,
    process_group: Any,
    gather: str,
    backend: str,
    keep: str,
) -> tuple[Tensor, Tensor | None]:
    """The two scales as 0-d tensors, the teacher's None where there is no consistency term."""
    check_options(lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency)
    check_keep(keep)
    _check_gather(gather)
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
    # a wrong name is an error whichever terms are wanted
    choose(backend, retain_image, retain_text, sharded=process_group is not None)
    return scale, teacher_scale


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


def _check_gather(gather: str) -> None:
    if gather not in GATHER_MODES:
        raise InputError(f"gather={gather!r} is not known; use one of {', '.join(GATHER_MODES)}")


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
