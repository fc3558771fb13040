"""The unlearned weights in the dtypes of the given model, unless rounding would undo the forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cliperase_fast.evaluation import EncodedPairs, pair_similarities
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import in_dtypes_of, in_float32, weight_dtypes
from cliperase_fast.unlearning.evaluator import Evaluator
from cliperase_fast.unlearning.splits import Split

UNDONE = 0.1  # the share of the change that rounding may undo
WORSE = 0.01  # the share of the images whose recognition it may change


@dataclass
class OutputModel:
    """adapter: what the caller gets, in the given dtypes if `note` is empty. encoded, scores: of these weights."""

    adapter: ClipAdapter
    encoded: EncodedPairs
    scores: dict[str, Any]
    note: str = ""


def finalize_model(
    student: ClipAdapter, given: ClipAdapter | None, before: EncodedPairs, evaluator: Evaluator, test: Split
) -> OutputModel:
    """Round the weights to the dtypes of `given` and measure the result.

    student: in float32. given: the model as the caller gave it, None if its weights were float32. before: the features
    of the test split before unlearning. All scores use float32 arithmetic, so that only the weights differ.
    """
    encoded = evaluator.encode(student, test)
    trained = OutputModel(student, encoded, evaluator.score(encoded, test))
    if given is None:
        return trained
    rounded = in_dtypes_of(given, student)
    name = weight_dtypes(given)
    why = _unfit(rounded, given)
    if not why:
        as_rounded = in_float32(rounded)
        encoded = evaluator.encode(as_rounded, test)
        found = OutputModel(rounded, encoded, evaluator.score(encoded, test))
        why = _undone(before, trained, found, test)
        if not why:
            return found
    trained.note = (
        f"The weights are returned in float32: rounded to {name}, the dtype of the given model, {why}. Raise "
        "learning_rate or epochs for changes that such weights can hold"
    )
    return trained


def _unfit(rounded: ClipAdapter, given: ClipAdapter) -> str:
    originals = dict(given.module.named_parameters())
    pairs = [(mine, originals[name]) for name, mine in rounded.module.named_parameters() if name in originals]
    if not all(bool(torch.isfinite(mine).all()) for mine, _ in pairs if mine.is_floating_point()):
        return "some would overflow"
    if all(torch.equal(mine, theirs) for mine, theirs in pairs):
        return "they would be the old ones again"
    return ""


def _undone(before: EncodedPairs, trained: OutputModel, rounded: OutputModel, test: Split) -> str:
    """Say what rounding costs; empty if it is little."""
    forget = test.forget_mask
    start, end, left = (
        float(pair_similarities(encoded)[forget].mean(dtype="float64"))
        for encoded in (before, trained.encoded, rounded.encoded)
    )
    lost = (end - left) / (end - start) if end != start else 0.0
    if lost > UNDONE:
        return f"{100 * min(lost, 1.0):.0f}% of the change of the forget pairs would be undone"
    for part, sign in (("forget", 1), ("retain", -1)):
        for metric in ("zero_shot_top1", "image_to_text_r@1"):
            old, new = trained.scores[part][metric], rounded.scores[part][metric]
            if old is not None and new is not None and sign * (new - old) > WORSE + 1e-9:
                return f"the {part} pairs would score {new:.1%} instead of {old:.1%}"
    return ""
