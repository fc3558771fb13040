"""Numbers and judgements in words, the same in the terminal, in the plots and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

METRICS = {
    "zero_shot_top1": "Zero-shot accuracy",
    "image_to_text_r@1": "Image to text, R@1",
    "image_to_text_r@5": "Image to text, R@5",
    "image_to_text_r@10": "Image to text, R@10",
    "text_to_image_r@1": "Text to image, R@1",
    "text_to_image_r@5": "Text to image, R@5",
    "text_to_image_r@10": "Text to image, R@10",
    "pair_similarity": "Pair similarity",  # a cosine, the only one that is no share
}
FORGOTTEN = 0.01  # at or below this share the concept counts as gone
RETAIN_FLOOR = 0.02  # the allowed retain drop where the configuration does not say


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is missing or not finite."""
    if value is None or isinstance(value, (bool, str)) or not math.isfinite(value):
        return None
    return float(value)


def percent(share: float | None) -> str:
    """0.981 as 98.1%; what is not quite none or not quite all does not read as if it were."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"


def signed(value: float | None, digits: int) -> str:
    """With a sign (a true minus), and zero without one."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def cell(metric: str, value: float | None) -> str:
    """A score as it stands in a table."""
    if metric != "pair_similarity" or value is None:
        return percent(value)
    return f"{value:.3f}".replace("-", "−")


def change(metric: str, before: float | None, after: float | None) -> str:
    """What a table shows as change: percentage points, or the difference of two cosines."""
    if before is None or after is None:
        return "–"
    return signed(after - before, 3) if metric == "pair_similarity" else signed(100 * (after - before), 1)


def shown_metrics(*sets: Mapping[str, Any]) -> list[str]:
    """The metrics at least one set has a value for, less recalls that are 1 by definition (a gallery of at
    most k)."""
    names = []
    for name in METRICS:
        direction, _, k = name.partition("_r@")
        gallery = {"image_to_text": "gallery_captions", "text_to_image": "gallery_images"}.get(direction, "")
        sizes = [size for scores in sets if (size := number(scores.get(gallery))) is not None]
        trivial = bool(sizes) and all(size <= int(k) for size in sizes)
        if not trivial and any(number(scores.get(name)) is not None for scores in sets):
            names.append(name)
    return names


@dataclass(frozen=True)
class Verdict:
    sentence: str
    level: str  # "good", "mixed", "bad" or "unknown"


@dataclass(frozen=True)
class Headline:
    """The one number the verdict is about: zero-shot accuracy, or recall@1 where there are no classes."""

    metric: str
    action: str  # what the model does with a share of the images
    forget: tuple[float, float]  # before, after
    retain: tuple[float, float] | None


def headline(result: Mapping[str, Any]) -> Headline | None:
    """None where the result has no scores of the forget pairs."""
    actions = {"zero_shot_top1": "recognises", "image_to_text_r@1": "finds the right caption of"}
    for metric, action in actions.items():
        forget, retain = before_after(result, "forget", metric), before_after(result, "retain", metric)
        if forget is not None:
            return Headline(metric, action, forget, retain)
    return None


def before_after(result: Mapping[str, Any], which: str, metric: str) -> tuple[float, float] | None:
    values = [number(((result.get(when) or {}).get(which) or {}).get(metric)) for when in ("before", "after")]
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def verdict(result: Mapping[str, Any]) -> Verdict:
    """What came of it, in one sentence, with the failures said as plainly as the success.

    Forgotten: at most 1 % left. Almost, partly: at most a tenth, at most three quarters of what there was.
    The retain pairs were kept when they lost no more than the configuration's `retain_floor` (2 points
    without one).
    """
    head = headline(result)
    if head is None:
        return Verdict(
            "There are no scores of the forget pairs, so nothing can be said about the forgetting.", "unknown"
        )
    before, after = head.forget
    forgotten = after <= FORGOTTEN
    almost = not forgotten and after <= 0.1 * before
    partly = not forgotten and not almost and after <= 0.75 * before
    little = before <= FORGOTTEN  # nothing was there to forget

    floor = number((result.get("config") or {}).get("retain_floor"))
    drop = 0.0 if head.retain is None else head.retain[0] - head.retain[1]
    kept = drop <= (RETAIN_FLOOR if floor is None else floor) + 1e-9  # the rounding of a fraction is no drop
    heavy = drop > 0.1

    if little:
        opening = "There was nothing to forget" if after <= FORGOTTEN else "The forgetting went the wrong way"
    elif forgotten or almost:
        opening = "Forgotten" if forgotten else "Almost forgotten"
    else:
        opening = "Only partly forgotten" if partly else "Not forgotten"
    if not kept:
        joined = ", but at a heavy price" if heavy else ", but at a price"
        opening += joined if forgotten or almost else ", and the rest suffered" + (" badly" if heavy else "")
    elif head.retain is not None and forgotten and not little:
        opening += ", and the rest kept"

    verb = "now" if forgotten or almost else "still"
    sentence = f"{opening}: the model {verb} {head.action} {percent(after)} of the forget images"
    sentence += f" ({percent(before)} before)"
    if head.retain is not None:
        rest = f"{percent(head.retain[1])} of the others ({percent(head.retain[0])} before)"
        sentence += f" and {rest}" if kept else f" and only {rest}, {100 * drop:.1f} points fewer"
    level = "good" if (forgotten or almost) and kept and not little else "bad"
    if (partly and kept) or (little and kept) or ((forgotten or almost) and not kept and not heavy):
        level = "mixed"
    return Verdict(sentence + ".", level)
