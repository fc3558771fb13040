"""`evaluate()`: from the caller's model and data to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.allocation import reuse_freed_memory
from cliperase_fast.coercion import whole
from cliperase_fast.data import (
    PairDataset,
    as_pairs,
    concat,
    open_source,
    overlap,
    parse_reference,
    select,
)
from cliperase_fast.data.checks import check_images
from cliperase_fast.data.classes import check_templates
from cliperase_fast.data.intake import Tally
from cliperase_fast.data.loading import transformed
from cliperase_fast.data.sources import require_indexed
from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.encoding import encode_pairs, require_finite
from cliperase_fast.evaluation.scoring import score
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import check_precision, in_float32, pick_device
from cliperase_fast.progress import bars_by_default, say


@reuse_freed_memory()
@plain_torch()
def evaluate(
    model: Any,
    data: Any,
    *,
    forget: Any = None,
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    templates: Sequence[str] | None = None,
    long_captions: str = "error",
    on_error: str = "raise",
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    num_workers: int = 0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure zero-shot accuracy and retrieval of a CLIP model, for forget and retain pairs separately.

    model: whatever `unlearn()` takes: an open_clip or transformers model, a module with `encode_image`,
        `encode_text` and `logit_scale`, or a string such as "ViT-B-32:openai" or
        "local-dir:runs/apple/model".
    data: a map-style dataset of (image, caption) pairs, or a source string such as "cifar10:DIR" (its test split if it
        has one) or "cifar10:DIR#class:cat,dog" (only those pairs).
    forget: the forget pairs: a selector ("class:apple"), a bool mask [n], or a dataset. With a dataset, the pairs of
        `data` that are not in it are the retain pairs. None: all pairs form one set.
    tokenizer, transform: needed only if the model does not have its own.
    templates: captions that represent a class, "a photo of a {}"; default: the data's own.
    long_captions: for captions longer than the model's context: "error", or "truncate" to cut them.
    on_error: for pairs that cannot be used, such as unreadable images: "raise", or "skip" to leave them out; the
        result then reports under "skipped" how many, and why.
    batch_size: images in a forward pass.
    device: "auto" is the device of a given module, and for a model named by a string the GPU if there is one.
    precision: arithmetic of the encoders: fp32, bf16, or fp16 (GPU only). Weights of another dtype are first converted
        to float32 in a copy.
    num_workers: processes that load images.
    progress: show bars; by default if standard error is a terminal. Otherwise a line is logged from time to time.

    Returns {"forget": scores, "retain": scores, "per_class": ...}, or {"all": scores, "per_class": ...}
    without `forget`, and "skipped" if pairs were left out. `cliperase_fast.evaluation.METRICS` describes the scores.

    Raises `InputError` for wrong arguments and unreadable images, before any encoding, and for features that are NaN
    or infinite; `UnlearningError` if a batch does not fit in memory. The model is not changed.
    """
    progress = bars_by_default() if progress is None else progress
    chosen = _device(device, model)
    batch_size, num_workers = whole("batch_size", batch_size, 1), whole("num_workers", num_workers, 0)
    check_settings(precision, chosen, long_captions)
    templates = check_templates(templates)
    pairs, forget_mask = _pairs(data, forget, templates, on_error)
    say("checking the %d images of %s", len(pairs), pairs.name)
    good, bad = check_images(pairs, on_error=on_error, progress=progress)
    skipped = Tally()
    skipped.update(pairs.intake.skipped)
    for image in bad:
        skipped.add(image.reason, image.message)
    if bad:
        pairs, forget_mask = _readable(pairs, forget_mask, good, bad[0].message)
    say("loading the model")
    given = load_model(
        model, tokenizer=tokenizer, transform=transform, device=chosen, truncate=long_captions == "truncate"
    )
    check_weights(given, "model")
    if transform is not None and len(pairs) and not isinstance(first := pairs.image(0), Tensor):
        transformed(given.transform, first)
    adapter = in_float32(given)
    say("encoding %d images and their captions", len(pairs))
    encoded = encode_pairs(
        adapter,
        pairs,
        batch_size=batch_size,
        device=chosen,
        precision=precision,
        num_workers=num_workers,
        progress=progress,
        templates=templates,
    )
    require_finite(encoded, pairs)
    scores = score(encoded, pairs, forget_mask, device=chosen)
    return {**scores, "skipped": skipped.to_dict()} if len(skipped) else scores


def _readable(
    pairs: PairDataset, forget_mask: np.ndarray | None, good: np.ndarray, first: str
) -> tuple[PairDataset, np.ndarray | None]:
    """Return the pairs whose images can be read. Raises InputError if a set would be empty."""
    mask = None if forget_mask is None else forget_mask[good]
    if len(good) == 0 or (mask is not None and (mask.all() or not mask.any())):
        raise InputError(
            f"too few readable images are left in {pairs.name} to score each set (first unreadable: {first})"
        )
    return pairs.subset(good), mask


def _device(device: str | torch.device, model: Any) -> torch.device:
    if str(device) == "auto":
        module = model.module if isinstance(model, ClipAdapter) else model
        if isinstance(module, nn.Module):
            first = next(module.parameters(), None)
            return torch.device("cpu") if first is None else first.device
    return pick_device(device)


def check_settings(precision: str, device: torch.device, long_captions: str) -> None:
    """Raise InputError for settings of the encoders that are not valid."""
    check_precision(precision, device)
    if long_captions not in ("error", "truncate"):
        raise InputError(f"long_captions={long_captions!r} is not one of error, truncate")


def _pairs(
    data: Any, forget: Any, templates: Sequence[str] | None, on_error: str
) -> tuple[PairDataset, np.ndarray | None]:
    """Return the pairs to score, and which of them are forget pairs (bool [n], or None)."""
    pairs, other = _open(data, templates, on_error)
    if len(pairs) == 0:
        raise InputError(f"{pairs.name} is empty: give at least one (image, caption) pair")
    if templates is not None and pairs.classes is None:
        raise InputError(f"{pairs.name} has no classes: leave out templates=")
    if forget is None:
        return pairs, None
    if isinstance(forget, str):
        return pairs, select(pairs, forget, other=other)
    flags = isinstance(forget, (list, tuple)) and {type(one) for one in forget} <= {bool, np.bool_}
    if isinstance(forget, (np.ndarray, Tensor)) or (flags and len(forget) > 0):
        return pairs, _mask(forget, pairs)
    forget_pairs = as_pairs(forget, "forget", on_error=on_error)
    if len(forget_pairs) == 0:
        raise InputError("the forget set is empty: give at least one (image, caption) pair, or forget=None")
    retain = np.setdiff1d(np.arange(len(pairs)), overlap(forget_pairs, pairs))
    if len(retain) == 0:
        raise InputError(
            f"every pair of {pairs.name} is also a forget pair, so no retain pairs are left: give other data"
        )
    both = concat([forget_pairs, pairs.subset(retain)])
    return both, np.arange(len(both)) < len(forget_pairs)


def _open(data: Any, templates: Sequence[str] | None, on_error: str) -> tuple[PairDataset, PairDataset | None]:
    """Return the pairs, and those of the other split, whose ids a selector may name too."""
    if not isinstance(data, str):
        return as_pairs(data, "data", on_error=on_error), None
    spec, selector = parse_reference(data)
    require_indexed(spec)
    pairs, other = open_source(spec, templates=templates, on_error=on_error).measured
    if selector is not None:
        pairs = pairs.subset(np.flatnonzero(select(pairs, selector, other=other)))
    return pairs, other


def _mask(forget: Any, pairs: PairDataset) -> np.ndarray:
    mask = np.asarray(forget.cpu() if isinstance(forget, Tensor) else forget)
    if mask.dtype != np.bool_ or mask.shape != (len(pairs),):
        raise InputError(
            f"forget is an array of {mask.dtype} with shape {list(mask.shape)}; a mask must be bool with "
            f"shape [{len(pairs)}], one entry for each pair of {pairs.name}"
        )
    if mask.all() or not mask.any():
        what = "all" if mask.all() else "none"
        raise InputError(f"the forget mask marks {what} of the {len(pairs)} pairs of {pairs.name}: it must mark some")
    return mask
