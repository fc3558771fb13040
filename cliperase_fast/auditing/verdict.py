"""Say what the scores mean in plain words, a sentence or two for each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cliperase_fast.plurals import counted
from cliperase_fast.report.wording import percent, plain_number

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]  # group, score, {"value", ...} of one model


def verdicts(
    scores: Mapping[str, Table], gap: Mapping[str, Any] | None, level: float | None, over: bool | None, shots: int = 16
) -> dict[str, str]:
    """Return the verdicts by group: "forgetting", "collateral", "depth", and "gap" if there are oracles.

    scores: by model. level: the background level of the original. over: whether the result is over-forgotten.
    shots: how many forget pairs relearning trains on.
    """
    found = {
        "forgetting": _forgetting(scores, level, over),
        "collateral": _collateral(scores),
        "depth": _depth(scores, counted(shots, "picture")),
    }
    if gap is not None:
        found["gap"] = _gap(gap)
    return found


def _forgetting(scores: Mapping[str, Table], level: float | None, over: bool | None) -> str:
    before, after = (scores[name]["forgetting"] for name in ("before", "after"))
    parts = []
    if _value(after, "zero_shot_top1") is not None:
        parts.append(
            f"The model names {_percent(_value(after, 'zero_shot_top1'))} of the forget images "
            f"({_percent(_value(before, 'zero_shot_top1'))} before)."
        )
    best = after.get("paraphrase_top1_max", {})
    if best.get("value") is not None:
        name = "the bare name" if best["variant"] == "{}" else repr(best["variant"])
        found = f"up to {_percent(best['value'])} ({name})" if best["value"] > 0 else "none"
        parts.append(f"Under other names it finds {found}.")
    reference = "nothing to compare it with is known"
    if "oracle" in scores:
        reference = f"{_number(_value(scores['oracle']['forgetting'], 'association'))} in models that never saw them"
    elif level is not None:
        reference = f"{plain_number(level)} for unrelated pairs of the original"
    parts.append(
        f"The cosine with their own captions is {_number(_value(after, 'association'))} "
        f"({_number(_value(before, 'association'))} before; {reference})."
    )
    if over:
        parts.append("That is over-forgotten: lower than not knowing the concept explains, which marks it instead.")
    return " ".join(parts)


def _collateral(scores: Mapping[str, Table]) -> str:
    before, after = (scores[name]["collateral"] for name in ("before", "after"))
    parts = [
        f"Of the retain images {_percent(_value(after, 'retain_top1'))} are still named right "
        f"({_percent(_value(before, 'retain_top1'))} before)."
    ]
    worst = after["worst_class_drop"]
    if worst.get("value") is not None:
        lost = f"The class that lost most is {worst['class']!r}: {100 * worst['value']:.1f} points."
        parts.append(lost if worst["value"] > 0 else "No class lost accuracy.")
    if "oracle" in scores:
        parts.append(
            f"Models that never saw the concept have {_percent(_value(scores['oracle']['collateral'], 'retain_top1'))}."
        )
    return " ".join(parts)


def _depth(scores: Mapping[str, Table], pictures: str) -> str:
    after = scores["after"]["depth"]
    parts = []
    if any(name.startswith("relearn@") for name in after):
        said = f"The concept answers again {_relearned(after, pictures)}"
        if "oracle" in scores:
            said += f"; a model that never saw it answers {_relearned(scores['oracle']['depth'], pictures)}"
        parts.append(f"{said}.")
    if after.get("membership", {}).get("value") is not None:
        parts.append(
            f"Forget training pairs are told from unseen ones with an area of {after['membership']['value']:.2f} (0.50 "
            "is chance)."
        )
    return " ".join(parts) or "Attacks on the model were not tried (depth=True, --depth)."


def _relearned(depth: Mapping[str, Mapping[str, Any]], pictures: str) -> str:
    """Say after how many steps half of the forget images are named."""
    curve = {int(name.partition("@")[2]): found["value"] for name, found in depth.items() if name[:8] == "relearn@"}
    steps = [step for step, value in sorted(curve.items()) if value is not None and value >= 0.5]
    if not steps:
        return f"for fewer than half of its images after {max(curve)} steps on {pictures}"
    return f"(for half of its images) after {steps[0]} steps on {pictures}" if steps[0] else "without any training"


def _gap(gap: Mapping[str, Any]) -> str:
    if gap["mean"] is None:
        return "The gap to the oracles cannot be told."
    said = f"The model is {gap['mean']:.3f} away from models that never saw the concept, on average over five scores"
    if gap["floor"] is None:
        return f"{said}. With one such model alone nobody knows how far two of them are from each other."
    return f"{said}; two such models are {gap['floor']:.3f} away from each other."


def _value(group: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    return group.get(name, {}).get("value")


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None else percent(value)


def _number(value: float | None) -> str:
    return "unknown" if value is None else plain_number(value)
