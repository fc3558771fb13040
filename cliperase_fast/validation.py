"""Check every argument of the losses, and choose the backend, before anything is computed.

An error names the argument, its value and the remedy.
"""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from cliperase_fast.distributed import GATHER_MODES
from cliperase_fast.errors import InputError
from cliperase_fast.ops import measured
from cliperase_fast.ops.registry import REGISTRY, WRONG_INSTRUCTIONS, Backend, Implementation
from cliperase_fast.ops.spec import DTYPE_NAMES, DTYPES, compute_dtype, savable
from cliperase_fast.terms import CONSISTENCY_MODES, FORGET_LOSSES, TERMS, check_name

ENVIRONMENT_VARIABLE = "CLIPERASE_BACKEND"
_LARGEST = torch.finfo(torch.float32).max
_KEEP_MODES = ("auto", "nothing", "similarities", "compact")


CALIBRATED_WEIGHTS = ("lambda_retain", "lambda_forget", "lambda_consistency", "lambda_anchor")


class Checked(NamedTuple):
    """The results of checking the arguments of a loss."""

    scale: Tensor  # []
    teacher_scale: Tensor | None  # []; None if no teacher is used
    backend: Backend
    run: Implementation


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
) -> Checked:
    """Check the arguments of `functional.cliperase_loss`."""
    check_options(lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency)
    check_keep(keep)
    check_gather(gather)
    check_batches(forget_image, forget_text, retain_image, retain_text, group_ids)
    scale = as_scale("logit_scale", logit_scale, retain_image)
    teacher_scale = None
    if lambda_consistency > 0:
        teacher_scale = check_consistency(consistency, retain_image, teacher_image, teacher_text, teacher_logit_scale)
    batches = [(retain_image, retain_text)]
    if FORGET_LOSSES[forget].sum_over_pairs is None and lambda_forget > 0:
        batches.append((forget_image, forget_text))
    batches.sort(key=lambda batch: -len(batch[0]))  # the larger one decides the backend
    teacher = (teacher_image, teacher_text) if lambda_consistency > 0 else ()
    chosen = choose(
        backend, *(features for batch in batches for features in batch), *teacher, sharded=process_group is not None
    )
    return Checked(scale, teacher_scale, chosen, implementation(chosen, retain_image.device))


def check_batches(
    forget_image: Tensor, forget_text: Tensor, retain_image: Tensor, retain_text: Tensor, group_ids: Tensor | None
) -> None:
    """Check the student's features of a forget batch and a retain batch, and the ids of the latter."""
    check_pairs("forget_image", forget_image, "forget_text", forget_text)
    check_pairs("retain_image", retain_image, "retain_text", retain_text)
    check_device("forget_image", forget_image, "retain_image", retain_image)
    if forget_image.shape[1] != retain_image.shape[1]:
        raise InputError(
            f"forget_image {shape_of(forget_image)} and retain_image {shape_of(retain_image)} differ in width; "
            "both come from the student"
        )
    check_group_ids(group_ids, "retain_image", retain_image)


def check_consistency(
    consistency: str,
    retain_image: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | float | None,
) -> Tensor:
    """Check the teacher for a consistency mode, and return its scale as a 0-d tensor; 1 if the mode has none."""
    mode = CONSISTENCY_MODES[consistency]
    needed_scale = teacher_logit_scale if mode.needs_scale else 1.0
    teacher_scale = check_teacher("retain_image", retain_image, teacher_image, teacher_text, needed_scale)
    if mode.same_width and teacher_image is not None and teacher_image.shape != retain_image.shape:
        others = [f"{name!r}" for name, other in CONSISTENCY_MODES.items() if not other.same_width]
        raise InputError(
            f"consistency={consistency!r} compares features directly, so teacher_image must be as wide as "
            f"retain_image, {retain_image.shape[1]}; use {' or '.join(others)} with a teacher of another width"
        )
    return teacher_scale


def check_contrast(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher: tuple[Tensor, Tensor, Tensor | float] | None,
    group_ids: Tensor | None,
    *,
    sharded: bool,
    gather: str,
    backend: str,
    keep: str,
    loss: str = "softmax",
) -> Checked:
    """Check the arguments of `functional.contrast`; loss: see `choose`."""
    check_keep(keep)
    check_gather(gather)
    check_pairs("image_features", image_features, "text_features", text_features)
    check_group_ids(group_ids, "image_features", image_features)
    scale = as_scale("logit_scale", logit_scale, image_features)
    teacher_scale = None if teacher is None else check_teacher("image_features", image_features, *teacher)
    chosen = choose(backend, image_features, text_features, *(teacher or ())[:2], sharded=sharded, loss=loss)
    return Checked(scale, teacher_scale, chosen, implementation(chosen, image_features.device))


def check_calibrated(
    image_features: Tensor,
    text_features: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    logit_scale: Tensor | float,
    teacher_logit_scale: Tensor | float,
    forget_mask: Tensor,
    group_ids: Tensor | None,
    background_image: Tensor | None,
    background_text: Tensor | None,
    weights: tuple[float, ...],
    *,
    sharded: bool,
    gather: str,
    backend: str,
    keep: str,
) -> Checked:
    """Check the arguments of `functional.calibrated_loss`; weights: in the order of `CALIBRATED_WEIGHTS`."""
    check_weights(dict(zip(CALIBRATED_WEIGHTS, weights, strict=True)))
    if teacher_image is None or teacher_text is None or teacher_logit_scale is None:
        raise InputError(
            "teacher_image, teacher_text and teacher_logit_scale are needed: the loss compares with the frozen teacher"
        )
    teacher = (teacher_image, teacher_text, teacher_logit_scale)
    checked = check_contrast(
        image_features, text_features, logit_scale, teacher, group_ids, sharded=sharded, gather=gather,
        backend=backend, keep=keep, loss="calibrated",
    )  # fmt: skip
    check_mask(forget_mask, image_features)
    for name, level in (("background_image", background_image), ("background_text", background_text)):
        check_level(name, level, image_features)
    return checked


def check_options(
    lambda_retain: float,
    lambda_forget: float,
    lambda_consistency: float,
    forget: str,
    margin: float,
    consistency: str,
) -> None:
    """Raise InputError unless the weights are finite, >= 0 and not all 0, and the other options are known."""
    values = (lambda_retain, lambda_forget, lambda_consistency)
    check_weights(dict(zip((term.weight for term in TERMS.values()), values, strict=True)))
    check_name("forget", forget, FORGET_LOSSES)
    check_name("consistency", consistency, CONSISTENCY_MODES)
    if not _is_number(margin) or not -1 <= margin <= 1:
        raise InputError(
            f"margin={margin!r} is a cosine; it must be a number between -1 and 1{_detached('margin', margin)}"
        )


def check_weights(weights: dict[str, float]) -> None:
    """Raise InputError unless the weights are finite, >= 0 and not all 0."""
    for name, weight in weights.items():
        if not _is_number(weight) or not 0 <= weight < math.inf:  # false for NaN as well
            raise InputError(f"{name}={weight!r} must be a finite number, 0 or larger{_detached(name, weight)}")
        if weight > _LARGEST:
            raise InputError(f"{name}={_shortened(weight)} is too large for float32; use at most {_LARGEST:.3g}")
    if not any(weights.values()):
        raise InputError(f"{', '.join(weights)} are all 0, so nothing would be trained; set one above 0")


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype != torch.bool and not value.is_complex() and not value.requires_grad
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _detached(name: str, value: object) -> str:
    """Return what to do about a number that requires a gradient."""
    return f", without a gradient; pass {name}.item()" if isinstance(value, Tensor) and value.requires_grad else ""


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
    if hasattr(features, "full_tensor"):
        raise InputError(f"{name} is a DTensor; pass a plain one, {name}.to_local() for the rows of this rank")
    if features.is_nested:
        raise InputError(f"{name} is a nested tensor; pass a dense one, {name}.to_padded_tensor(0)")
    if features.ndim != 2:
        raise InputError(f"{name} has shape {shape_of(features)}; it must be two-dimensional, [rows, width]")
    if features.shape[1] == 0:
        raise InputError(f"{name} has shape {shape_of(features)}: features of width 0; pass the encoder's output")
    if features.layout != torch.strided:
        raise InputError(f"{name} has layout {features.layout}; pass a dense tensor, {name}.to_dense()")
    if features.dtype not in DTYPES:
        raise InputError(f"{name} has dtype {features.dtype}; convert it to one of {', '.join(DTYPE_NAMES.values())}")


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
    """Check the teacher's features against the student's, and return its scale as a 0-d tensor."""
    if image is None or text is None or scale is None:
        raise InputError(
            "teacher_image, teacher_text and teacher_logit_scale are needed for the consistency term; "
            "set lambda_consistency=0 to train without a teacher"
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
        check_frozen(name, tensor)
    return scale


def check_frozen(name: str, tensor: Tensor) -> None:
    """Raise InputError if a tensor of the teacher would need a gradient."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires grad, but the teacher is frozen and gets no gradient: "
            f"compute it under torch.no_grad(), or pass {name}.detach()"
        )


def check_group_ids(group_ids: Tensor | None, name: str, image: Tensor) -> None:
    if group_ids is None:
        return
    if not isinstance(group_ids, Tensor) or group_ids.dtype != torch.int64:
        kind = group_ids.dtype if isinstance(group_ids, Tensor) else type(group_ids).__name__
        raise InputError(f"group_ids must be an int64 tensor, an id a pair, not {kind}")
    if group_ids.shape != image.shape[:1]:
        raise InputError(f"group_ids has shape {shape_of(group_ids)}; {name} {shape_of(image)} needs [{len(image)}]")
    check_device("group_ids", group_ids, name, image)


def check_mask(forget_mask: Tensor, image: Tensor) -> None:
    if not isinstance(forget_mask, Tensor) or forget_mask.dtype != torch.bool:
        kind = forget_mask.dtype if isinstance(forget_mask, Tensor) else type(forget_mask).__name__
        raise InputError(f"forget_mask must be a bool tensor, True for each pair to forget, not {kind}")
    if forget_mask.shape != image.shape[:1]:
        raise InputError(
            f"forget_mask has shape {shape_of(forget_mask)}; image_features {shape_of(image)} needs [{len(image)}]"
        )
    check_device("forget_mask", forget_mask, "image_features", image)


def check_level(name: str, level: Tensor | None, image: Tensor) -> None:
    """Check the background levels of a calibrated loss."""
    if level is None:
        return
    if not isinstance(level, Tensor) or level.dtype not in DTYPES:
        kind = level.dtype if isinstance(level, Tensor) else type(level).__name__
        raise InputError(f"{name} must be a floating-point tensor, a cosine a pair, not {kind}")
    if level.shape != image.shape[:1]:
        raise InputError(f"{name} has shape {shape_of(level)}; image_features {shape_of(image)} needs [{len(image)}]")
    check_device(name, level, "image_features", image)
    if level.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} requires grad, but it comes from the frozen teacher; pass {name}.detach()")


def _shortened(number: Any) -> str:
    text = str(number)
    return text if len(text) <= 30 else f"{text[:20]}... ({len(text)} characters)"


def as_scale(name: str, scale: Tensor | float, features: Tensor) -> Tensor:
    """`scale` as a 0-d tensor, at least float32, so that the gradients of several terms add up unrounded."""
    if isinstance(scale, Tensor):
        if hasattr(scale, "full_tensor"):
            raise InputError(f"{name} is a DTensor; compute it in the model's forward, where FSDP gathers parameters")
        if scale.numel() != 1 or scale.dtype not in DTYPES:
            raise InputError(
                f"{name} must be a number or one floating-point element, not {scale.dtype} of shape {shape_of(scale)}"
            )
        check_device(name, scale, "the features", features)
        return savable(scale.reshape(()).to(compute_dtype(scale)))[0]
    if isinstance(scale, bool) or not isinstance(scale, Real) or not -math.inf < scale < math.inf:
        raise InputError(f"{name}={scale!r} must be a finite number or a tensor of one element")
    dtype = compute_dtype(features)
    scale = getattr(scale, "item", lambda: scale)()  # numpy would warn of a limit that its own type cannot hold
    if abs(scale) > torch.finfo(dtype).max:
        raise InputError(f"{name}={_shortened(scale)} is too large for {dtype}; pass exp of the logit_scale parameter")
    return torch.full((), float(scale), dtype=dtype, device=features.device)


def choose(
    requested: str,
    image: Tensor,
    text: Tensor,
    *teacher: Tensor | None,
    sharded: bool = False,
    loss: str = "softmax",
) -> Backend:
    """Choose the backend for these features. `requested`: a name, or "auto", which CLIPERASE_BACKEND overrides.

    teacher: the teacher's features, if they are used. sharded: whether the batch is spread over processes. loss:
    "softmax", or "sigmoid", "calibrated" or "bernoulli", which not every backend has on every device. Under
    transforms of `torch.func` "eager" replaces every other backend.

    Raises InputError if the backend is unknown, is not available here, or does not support this device or dtype.
    """
    features = [tensor for tensor in (image, text, *teacher) if tensor is not None]
    backend = _asked_for(requested, features, sharded, loss)
    if backend.name != "eager" and transformed(*features):
        if sharded:
            refuse_on_ranks(*features)
        backend = REGISTRY["eager"]
    return backend


def computes(backend: Backend, loss: str, device: str) -> bool:
    """Return whether a backend has the loss "softmax", "sigmoid" or "calibrated" on a device type."""
    return all(kinds is None or device in kinds for kinds in (backend.devices, backend.loss_devices.get(loss)))


def implementation(backend: Backend, device: torch.device) -> Implementation:
    """Return the backend's implementation for this device, imported on first use."""
    found = backend.loaded.get(device.type)
    if found is None:
        found = backend.loaded[device.type] = backend.load(device.type)
    return found


def _asked_for(requested: str, features: list[Tensor], sharded: bool, loss: str) -> Backend:
    image = features[0]
    origin = f"backend={requested!r}"
    if requested == "auto":
        from_environment = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        if from_environment in ("", "auto"):
            return _automatic(features, sharded, loss)
        requested, origin = from_environment, f"{ENVIRONMENT_VARIABLE}={from_environment}"
    if not isinstance(requested, str) or requested not in REGISTRY:
        raise InputError(f"{origin} is not a backend; use auto, {', '.join(REGISTRY)}")
    backend = REGISTRY[requested]
    reason = backend.why_missing and backend.why_missing()
    if reason is not None:
        others = ", ".join(other.name for other in REGISTRY.values() if other.missing is None)
        raise InputError(f"{origin} is not available here: {reason}. Available are auto, {others}")
    if backend.devices is not None and image.device.type not in backend.devices:
        why = f" ({backend.elsewhere})" if backend.elsewhere else ""
        raise InputError(
            f"{origin} runs on {', '.join(backend.devices)}, not on {image.device}{why}; use backend='auto'"
        )
    if sharded and not backend.shards:
        able = ", ".join(other.name for other in REGISTRY.values() if other.shards)
        raise InputError(f"{origin} does not work with a process_group; use auto, {able}")
    for tensor in features:
        if tensor.dtype not in backend.dtypes:
            raise InputError(f"{origin} does not support {tensor.dtype}; use backend='auto' or convert the features")
        if tensor.shape[1] > backend.widest:
            raise InputError(f"{origin} takes features of width {backend.widest} at the most; use backend='auto'")
    if not computes(backend, loss, image.device.type):
        only = backend.loss_devices[loss]
        what = f"computes the {loss} loss on {', '.join(only)} only" if only else f"does not compute the {loss} loss"
        able = ", ".join(name for name, other in REGISTRY.items() if computes(other, loss, image.device.type))
        where = f", not on {image.device}" if only else ""
        raise InputError(f"{origin} {what}{where}; use auto, {able}")
    return backend


def check_backend_name(requested: object) -> None:
    """Raise InputError unless `requested` is "auto" or names a backend, available here or not."""
    if not isinstance(requested, str) or requested not in ("auto", *REGISTRY):
        raise InputError(f"backend={requested!r} is not a backend; use auto, {', '.join(REGISTRY)}")


def auto_shards() -> bool:
    """Return whether "auto" supports a batch spread over processes; CLIPERASE_BACKEND may name one that does not."""
    backend = REGISTRY.get(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    return backend is None or backend.shards


# Measured, forward and backward together on one CPU core: "eager" and "torch" become equally fast between N = 128 and
# 512 (D = 64 and 512). Above that, eager is slower (2.6 times at N = 2048, D = 64), and its memory grows as N².
_EAGER_PAIRS = 256

# Looked up once, as in the registry, and only if there is a measured choice.
_ON_GPU = frozenset(name for name in REGISTRY if measured.TABLE and REGISTRY[name].missing is None)


def _automatic(features: list[Tensor], sharded: bool, loss: str) -> Backend:
    image = features[0]
    pairs, kind = image.shape[0], image.device.type
    if kind == "cuda" and _ON_GPU:
        widest = max((tensor.dtype for tensor in features), key=lambda dtype: dtype.itemsize)
        name = measured.fastest(image.device, widest, pairs, image.shape[1])
        if name in _ON_GPU and _serves(REGISTRY[name], kind, features, sharded, loss):
            return REGISTRY[name]
    # On a CPU "native" was the fastest at every size.
    native = REGISTRY["native"]
    if kind == "cpu" and WRONG_INSTRUCTIONS is not None:  # it was asked for, so no other backend takes its place
        raise InputError(WRONG_INSTRUCTIONS)
    if kind == "cpu" and native.why_missing is None and _serves(native, kind, features, sharded, loss):
        return native
    return REGISTRY["eager" if pairs <= _EAGER_PAIRS and not sharded else "torch"]


def _serves(backend: Backend, kind: str, features: list[Tensor], sharded: bool, loss: str) -> bool:
    return (
        computes(backend, loss, kind)
        and max(tensor.shape[1] for tensor in features) <= backend.widest
        and all(tensor.dtype in backend.dtypes for tensor in features)
        and not (sharded and not backend.shards)
    )


def transformed(*tensors: Tensor | None) -> bool:
    """Return whether a transform of `torch.func` is active, or any of these carries a tangent of forward-mode AD."""
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_on_ranks(*tensors: Tensor | None) -> None:
    """Raise InputError under a transform, where tensors have no values yet that ranks could exchange."""
    if transformed(*tensors):
        raise InputError(
            "a process_group does not work under transforms of torch.func or forward-mode AD; use backward() or "
            "torch.autograd.grad, or give the whole batch to one process"
        )
