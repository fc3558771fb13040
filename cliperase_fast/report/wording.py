"""Scores and judgements in words, the same in the terminal, in the plots and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cliperase_fast.evaluation.metrics import METRICS, PRIMARY, SHARE, Format, Metric, find_metric
from cliperase_fast.terms import TERMS

FORGOTTEN = 0.01  # at or below this share the concept counts as gone
RETAIN_FLOOR = 0.02  # the allowed retain drop where the configuration does not say


def number(value: Any) -> float | None:
    """Return `value` as a float, or None where it is missing or not finite."""
    if value is None or isinstance(value, (bool, str)) or not math.isfinite(value):
        return None
    return float(value)


def percent(share: float | None) -> str:
    """Write 0.981 as 98.1%. A share close to none or all is not rounded to it."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"


def count(value: Any) -> str:
    """Write a number of things with thousands separators; empty where it is missing."""
    return "" if number(value) is None else f"{value:,.0f}"


def signed(value: float | None, digits: int) -> str:
    """Write a number with its sign (a true minus sign), and zero without one."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def value(metric: Metric, scores: Mapping[str, Any]) -> float | None:
    """The metric's value in the scores of a set, or None where it is missing or not finite."""
    return number(metric.read(scores))


def cell(metric: Metric, score: float | None) -> str:
    """Write a score as tables show it."""
    return written(score, metric.format)


def written(score: float | None, form: Format) -> str:
    """Write a score in its format; a dash where it is missing."""
    if form is SHARE or score is None:
        return percent(score)
    return decimals(form.scale * score, form.digits) + form.unit


def decimals(value: float, digits: int) -> str:
    """Write a number with a true minus sign, and zero without one."""
    return signed(value, digits).lstrip("+")


def difference(value: float | None, form: Format) -> str:
    """Write the size of a difference of two values of this format: without its unit, shares in percentage points."""
    return "–" if value is None else decimals(form.scale * value, form.digits)


def interval(low: float | None, high: float | None, form: Format) -> str:
    """Write an interval without its unit, "[93.1, 98.4]"; empty where it is missing."""
    if low is None or high is None:
        return ""
    return "[" + ", ".join(decimals(form.scale * end, form.digits) for end in (low, high)) + "]"


def change(metric: Metric, before: float | None, after: float | None) -> str:
    """Write a change as tables show it: in percentage points, or as a difference of cosines."""
    if before is None or after is None:
        return "–"
    return signed(metric.format.scale * (after - before), metric.format.digits)


def shown_metrics(*sets: Mapping[str, Any]) -> list[Metric]:
    """The metrics that at least one set has a value for, without the recalls that are 1 by definition (a gallery of at
    most k items)."""
    return [
        metric
        for metric in METRICS.values()
        if any(value(metric, scores) is not None for scores in sets) and not _trivial(metric, sets)
    ]


def _trivial(metric: Metric, sets: Sequence[Mapping[str, Any]]) -> bool:
    sizes = [size for scores in sets if (size := number(scores.get(metric.gallery))) is not None]
    return bool(sizes) and all(size <= metric.k for size in sizes)


def term_label(name: str) -> str:
    """Return the label of a loss term; a term without one is shown by its name."""
    return TERMS[name].label if name in TERMS else name.replace("_", " ").capitalize()


@dataclass(frozen=True)
class Verdict:
    """The judgement of a run: the same words in the terminal, in result.json and on the page.

    opening: the judgement alone, "Not forgotten". sentence: with the scores. advice: what to change, empty if nothing.
    """

    opening: str
    sentence: str
    level: str  # "good", "mixed", "bad", "nothing" (there was nothing to forget) or "unknown"
    advice: str = ""

    @property
    def text(self) -> str:
        return f"{self.sentence} {self.advice}".rstrip()

    @property
    def short(self) -> str:
        return f"{self.opening}. {self.advice}".rstrip()


@dataclass(frozen=True)
class Headline:
    """The metric that the verdict is about: zero-shot accuracy, or recall@1 where there are no classes."""

    metric: Metric
    action: str  # what the model does with this share of the images
    counted: str  # which images are counted
    forget: tuple[float, float]  # before, after
    retain: tuple[float, float] | None
    chance: float  # the score of guessing; 0 if not known


_PRIMARY_WORDS = {  # action, counted
    "zero_shot_top1": ("recognises", "images recognised"),
    "image_to_text_r@1": ("finds the right caption of", "images whose caption is found"),
}


def headline(result: Mapping[str, Any]) -> Headline | None:
    """Return the first primary metric that the forget pairs have both scores of, or None."""
    for metric in map(find_metric, PRIMARY):
        forget, retain = (before_after(result, which, metric) for which in ("forget", "retain"))
        if forget is not None:
            return Headline(metric, *_PRIMARY_WORDS[metric.name], forget, retain, _chance(result, metric))
    return None


def _chance(result: Mapping[str, Any], metric: Metric) -> float:
    if metric.needs_classes:
        choices = float(len(result.get("per_class") or {}))
    else:
        choices = number(((result.get("before") or {}).get("forget") or {}).get(metric.gallery)) or 0.0
    return 1 / choices if choices >= 2 else 0.0


def before_after(result: Mapping[str, Any], which: str, metric: Metric) -> tuple[float, float] | None:
    before, after = (value(metric, (result.get(when) or {}).get(which) or {}) for when in ("before", "after"))
    return None if before is None or after is None else (before, after)


def verdict(result: Mapping[str, Any]) -> Verdict:
    """Judge a run in one sentence, and advise what to change. Failures are stated as plainly as success.

    Forgotten: at most 1 % is left. Almost, partly: at most a tenth, at most three quarters of the score before. There
    was nothing to forget if the model scored at most 1 % before, and little if it was no better than chance. The retain
    pairs were kept if they lost at most the configuration's `retain_floor` (2 points without one).
    """
    head = headline(result)
    if head is None:
        nothing = "The forget pairs have no scores, so the forgetting cannot be judged"
        return Verdict(nothing, f"{nothing}.", "unknown")
    before, after = head.forget
    forgotten = after <= FORGOTTEN
    almost = not forgotten and after <= 0.1 * before
    partly = not forgotten and not almost and after <= 0.75 * before
    little = before <= max(FORGOTTEN, head.chance)

    floor = _floor(result)
    drop = 0.0 if head.retain is None else head.retain[0] - head.retain[1]
    kept = drop <= floor + 1e-9  # rounding of a fraction is not a drop
    heavy = drop > 0.1
    wrong_way = little and after > max(FORGOTTEN, before)

    if wrong_way:
        opening = "The forgetting went the wrong way"
    elif little:
        opening = f"There was {'nothing' if before <= FORGOTTEN else 'little'} to forget"
    elif forgotten or almost:
        opening = "Forgotten" if forgotten else "Almost forgotten"
    else:
        opening = "Only partly forgotten" if partly else "Not forgotten"
    if not kept:
        joined = ", but at a heavy price" if heavy else ", but at a price"
        done = (forgotten or almost) and not little
        opening += joined if done else ", and the rest suffered" + (" badly" if heavy else "")
    elif head.retain is not None and forgotten and not little:
        opening += ", and the rest kept"

    if little and not wrong_way:
        sentence = f"{opening}: the model already scored {percent(before)} on the forget pairs before the run"
        if before > FORGOTTEN:
            sentence += f", no better than chance ({percent(head.chance)})"
        sentence += f", and scores {percent(after)} after it"
    else:
        verb = "now" if forgotten or almost or wrong_way else "still"
        sentence = f"{opening}: the model {verb} {head.action} {percent(after)} of the forget images"
        sentence += f" ({percent(before)} before)"
    if head.retain is not None:
        rest = f"{percent(head.retain[1])} of the others ({percent(head.retain[0])} before)"
        sentence += f" and {rest}" if kept else f" and only {rest}, {100 * drop:.1f} points fewer"
        sentence += "" if kept else f" where retain_floor allows {100 * floor:g}"

    good = (forgotten or almost) and not little
    if little and kept and not wrong_way:
        level = "nothing"
    elif good and kept:
        level = "good"
    elif not little and ((partly and kept) or (good and not heavy)):
        level = "mixed"
    else:
        level = "bad"
    advice = _of_little(head) if little else "" if level == "good" else _advice(result, good, kept)
    if not little and not good and kept and after <= head.chance:
        advice = (
            f"This is no better than chance ({percent(head.chance)}): judge the forgetting by the association, or "
            "measure it among more classes."
        )
    return Verdict(opening, sentence + ".", level, advice)


def _floor(result: Mapping[str, Any]) -> float:
    floor = number((result.get("config") or {}).get("retain_floor"))
    return RETAIN_FLOOR if floor is None else floor


def _of_little(head: Headline) -> str:
    if head.retain is not None and head.retain[0] <= max(FORGOTTEN, head.chance):
        return (
            "The other pairs score no better than chance either: check that the model, its transform and the captions "
            "belong together."
        )
    return "Choose forget pairs that the model gets right."


def _advice(result: Mapping[str, Any], forgotten: bool, kept: bool) -> str:
    """Advise what to change after a run that is not good."""
    config = result.get("config") or {}

    recipe = result.get("recipe") or {}
    found = {"learning_rate": ("learning_rate", ""), "epochs": ("steps", " steps")}

    def now(name: str) -> str:
        if name == "epochs" and number(config.get("steps")):
            name = "steps"
        value = number(config.get(name))
        if config.get(name) == "auto" and name in found:
            key, unit = found[name]
            value = number(recipe.get(key))
            return name if value is None else f"{name} (found: {value:.3g}{unit})"
        return name if value is None else f"{name} (now {value:g})"

    if config.get("method", "cliperase") != "cliperase":
        return _advice_of_method(forgotten, kept, now, trained=result.get("pairs_per_second") is not None)
    if not forgotten and number(config.get("lambda_forget")) == 0:
        return "With lambda_forget=0 nothing pushes the forget pairs apart: set it above 0 (default 3)."
    if forgotten:
        return f"Lower {now('learning_rate')} or {now('epochs')}, or raise lambda_retain or lambda_consistency."
    if not kept:
        return (
            f"Lower {now('learning_rate')} and raise {now('epochs')}, or raise lambda_retain, lambda_consistency or "
            "batch_size."
        )
    selection = result.get("selection") or {}
    lowest, chosen = selection.get("lowest") or {}, selection.get("validation") or {}
    least, ours = number(lowest.get("forget")), number(chosen.get("forget"))
    if config.get("select") != "last" and least is not None and ours is not None and least < 0.75 * ours:
        return (
            f"On the validation split epoch {lowest.get('epoch')} forgot more (forget {percent(least)}) but kept less "
            f"(retain {percent(number(lowest.get('retain')))}) than retain_floor allows: raise {now('retain_floor')}, "
            "lambda_retain, lambda_consistency or batch_size."
        )
    unchanged = result.get("before") is not None and result.get("before") == result.get("after")
    start = "The scores are exactly as before: raise" if unchanged else "Raise"
    return f"{start} {now('learning_rate')} or {now('epochs')}, or {now('lambda_forget')}."


def _advice_of_method(forgotten: bool, kept: bool, now: Callable[[str], str], trained: bool) -> str:
    """Advise what to change for a method without the weights of CLIPErase's terms."""
    if not trained:
        return f"Change method_options, or allow more with {now('retain_floor')}."
    if forgotten or not kept:
        return f"Lower {now('learning_rate')} or {now('epochs')}, or use a method that keeps the retain pairs."
    return f"Raise {now('learning_rate')} or {now('epochs')}."


def left_out_lines(skipped: Mapping[str, Any]) -> list[str]:
    """Return a line for each reason why items were left out, with their number and the first of them."""
    return [f"{row['count']:,} x {reason} (the first: {row['example']})" for reason, row in skipped.items()]
