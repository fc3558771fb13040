"""What the losses take: every argument is looked at, and named when it is wrong, before anything is computed."""

from __future__ import annotations

import difflib
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.config import CONSISTENCY_MODES, FORGET_LOSSES
from cliperase_fast.distributed import GATHER_MODES
from cliperase_fast.errors import InputError
from cliperase_fast.ops import choose, compute_dtype, savable

_KEEP_MODES = ("auto", "nothing", "similarities")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_cliperase(
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
    check_gather(gather)
    check_pairs("forget_image", forget_image, "forget_text", forget_text)
    check_pairs("retain_image", retain_image, "retain_text", retain_text)
    check_device("forget_image", forget_image, "retain_image", retain_image)
    if forget_image.shape[1] != retain_image.shape[1]:
        raise InputError(
            f"forget_image {shape_of(forget_image)} and retain_image {shape_of(retain_image)} differ in width; "
            "both come from the student"
        )
    check_group_ids(group_ids, "retain_image", retain_image)
    scale = as_scale("logit_scale", logit_scale, retain_image)
    teacher_scale = None
    if lambda_consistency > 0:
        needed_scale = 1.0 if consistency == "features" else teacher_logit_scale
        teacher_scale = check_teacher("retain_image", retain_image, teacher_image, teacher_text, needed_scale)
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
        if not _is_number(weight) or not 0 <= weight < math.inf:  # false for NaN as well
            raise InputError(f"{name}={weight!r} must be a finite number, 0 or larger")
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
    if not _is_number(margin) or not -1 <= margin <= 1:
        raise InputError(f"margin={margin!r} is a cosine: it must lie between -1 and 1")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def check_keep(keep: str) -> None:
    if keep not in _KEEP_MODES:
        raise InputError(f"keep={keep!r} is not known; use one of {', '.join(_KEEP_MODES)}")


def check_gather(gather: str) -> None:
    if gather not in GATHER_MODES:
        raise InputError(f"gather={gather!r} is not known; use one of {', '.join(GATHER_MODES)}")


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_features(name: str, features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise InputError(f"{name} must be a tensor [rows, width], not a {type(features).__name__}")
    if features.ndim != 2:
        raise InputError(f"{name} has shape {shape_of(features)}; it must be two-dimensional, [rows, width]")
    if features.shape[1] == 0:
        raise InputError(f"{name} has shape {shape_of(features)}: features of width 0; pass the encoder's output")
    if features.layout != torch.strided:
        raise InputError(f"{name} is of layout {features.layout}; pass a dense tensor, {name}.to_dense()")
    if features.dtype not in _FLOATING:
        raise InputError(f"{name} has dtype {features.dtype}; convert it to float32, float64, float16 or bfloat16")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise InputError(f"{name} is on {tensor.device} and {like_name} on {like.device}; move them to one device")


def check_pairs(image_name: str, image: Tensor, text_name: str, text: Tensor) -> None:
    check_features(image_name, image)
    check_features(text_name, text)
    check_device(text_name, text, image_name, image)
    if image.shape != text.shape:
        what = "width" if len(image) == len(text) else "number of rows"
        raise InputError(
            f"{image_name} {shape_of(image)} and {text_name} {shape_of(text)} differ in {what}; "
            "row i of both belongs to pair i"
        )


def check_teacher(
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
    check_pairs("teacher_image", image, "teacher_text", text)
    check_device("teacher_image", image, student_name, student)
    if image.shape[0] != student.shape[0]:
        raise InputError(
            f"teacher_image {shape_of(image)} and {student_name} {shape_of(student)} differ in number of rows; "
            "the teacher sees the same pairs"
        )
    scale = as_scale("teacher_logit_scale", scale, student)
    for name, tensor in (("teacher_image", image), ("teacher_text", text), ("teacher_logit_scale", scale)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"{name} requires grad, but the teacher is frozen and gets no gradient: "
                f"compute it under torch.no_grad(), or pass {name}.detach()"
            )
    return scale


def check_group_ids(group_ids: Tensor | None, name: str, image: Tensor) -> None:
    if group_ids is None:
        return
    if not isinstance(group_ids, Tensor) or group_ids.dtype != torch.int64:
        kind = group_ids.dtype if isinstance(group_ids, Tensor) else type(group_ids).__name__
        raise InputError(f"group_ids must be an int64 tensor, an id a pair, not {kind}")
    if group_ids.shape != image.shape[:1]:
        raise InputError(f"group_ids has shape {shape_of(group_ids)}; {name} {shape_of(image)} needs [{len(image)}]")
    check_device("group_ids", group_ids, name, image)


def _shortened(number: Any) -> str:
    text = str(number)
    return text if len(text) <= 30 else f"{text[:20]}... ({len(text)} characters)"


def as_scale(name: str, scale: Tensor | float, features: Tensor) -> Tensor:
    """`scale` as a 0-d tensor, at least float32, so that the gradients of several terms add up unrounded."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.dtype not in _FLOATING:
            raise InputError(
                f"{name} must be a number or one floating-point element, not {scale.dtype} of shape {shape_of(scale)}"
            )
        check_device(name, scale, "the features", features)
        return savable(scale.reshape(()).to(compute_dtype(scale)))
    if isinstance(scale, bool) or not isinstance(scale, Real) or not -math.inf < scale < math.inf:
        raise InputError(f"{name}={scale!r} must be a finite number or a tensor of one element")
    dtype = compute_dtype(features)
    if abs(scale) > torch.finfo(dtype).max:
        raise InputError(f"{name}={_shortened(scale)} is too large for {dtype}; pass exp of the logit_scale parameter")
    return torch.full((), float(scale), dtype=dtype, device=features.device)
