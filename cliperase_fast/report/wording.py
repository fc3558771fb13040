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


def plain_number(value: float, digits: int = 2) -> str:
    """Write a number for running text, in ASCII, and zero without a sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def digits_apart(value: float, limit: float, digits: int) -> int:
    """Return with how many decimals a value beyond a limit does not look equal to it: with one more if need be."""
    return digits + 1 if f"{value:.{digits}f}" == f"{limit:.{digits}f}" else digits


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
    choices = number(((result.get("before") or {}).get("forget") or {}).get(metric.gallery)) or 0.0
    if metric.needs_classes and not choices:  # an older result, which counts the classes that have test pairs
        choices = float(len(result.get("per_class") or {}))
    return 1 / choices if choices >= 2 else 0.0


def before_after(result: Mapping[str, Any], which: str, metric: Metric) -> tuple[float, float] | None:
    before, after = (value(metric, (result.get(when) or {}).get(which) or {}) for when in ("before", "after"))
    return None if before is None or after is None else (before, after)


def verdict(result: Mapping[str, Any]) -> Verdict:
    """Judge a run in one sentence, and advise what to change. Failures are stated as plainly as success.

    Forgotten: at most 1 % is left. Almost, partly: at most a tenth, at most three quarters of the score before. There
    was nothing to forget if the model scored at most 1 % before, and little if it was no better than chance. A run
    that did not reach its target has not forgotten, however low the score is. The retain pairs were kept if they lost
    at most the configuration's `retain_floor` (2 points without one).
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
    fell = (forgotten or almost) and not little
    missed = fell and (result.get("selection") or {}).get("target_reached") is False
    good = fell and not missed

    if wrong_way:
        opening = "The forgetting went the wrong way"
    elif little:
        opening = f"There was {'nothing' if before <= FORGOTTEN else 'little'} to forget"
    elif missed:
        opening = f"The score fell, but {_above_target(result)}"
    elif forgotten or almost:
        opening = "Forgotten" if forgotten else "Almost forgotten"
    else:
        opening = "Only partly forgotten" if partly else "Not forgotten"
    if not kept:
        joined = ", but at a heavy price" if heavy else ", but at a price"
        opening += joined if good else ", and the rest suffered" + (" badly" if heavy else "")
    elif head.retain is not None and forgotten and good:
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
        fewer = plain_number(100 * drop, digits_apart(100 * drop, 100 * floor, 1))
        sentence += f" and {rest}" if kept else f" and only {rest}, {fewer} points fewer"
        sentence += "" if kept else f" where retain_floor allows {100 * floor:g}"

    if little and kept and not wrong_way:
        level = "nothing"
    elif good and kept:
        level = "good"
    elif not little and (((partly or fell) and kept) or (fell and not heavy)):
        level = "mixed"
    else:
        level = "bad"
    advice = _of_little(head) if little else "" if level == "good" else _advice(result, fell, kept)
    if not little and not fell and kept and after <= head.chance:
        advice = (
            f"This is no better than chance ({percent(head.chance)}): judge the forgetting by the association, or "
            "measure it among more classes."
        )
    return Verdict(opening, sentence + ".", level, advice)


def _floor(result: Mapping[str, Any]) -> float:
    floor = number((result.get("config") or {}).get("retain_floor"))
    return RETAIN_FLOOR if floor is None else floor


def _above_target(result: Mapping[str, Any]) -> str:
    """Say what is left above the target that the run did not reach."""
    selection = result.get("selection") or {}
    target = selection.get("target") or (result.get("recipe") or {}).get("target") or {}
    ours, limit = number(selection.get("association")), number(target.get("association"))
    share, most = number((selection.get("validation") or {}).get("forget")), number(target.get("forget"))
    left = []
    if ours is not None and limit is not None and ours > limit:
        digits = digits_apart(ours, limit, 2)
        left.append(f"association {decimals(ours, digits)}, target {decimals(limit, digits)}")
    if share is not None and most is not None and share > most:
        left.append(f"forget score {percent(share)}, target {percent(most)}")
    if not left:
        return "the target was not reached"
    similar = left[0].startswith("association")
    said = "the forget pairs are still more similar than the target" if similar else "the target was not reached"
    return f"{said} (on the validation split {'; '.join(left)})"


def _of_little(head: Headline) -> str:
    if head.retain is not None and head.retain[0] <= max(FORGOTTEN, head.chance):
        return (
            "The other pairs score no better than chance either: check that the model, its transform and the captions "
            "belong together."
        )
    return "Choose forget pairs that the model gets right."


def _advice(result: Mapping[str, Any], fell: bool, kept: bool) -> str:
    """Advise what to change after a run that is not good.

    fell: whether the forget score fell as asked for. The target may have been missed all the same.
    """
    config, selection = result.get("config") or {}, result.get("selection") or {}
    method, given = config.get("method", "cliperase"), _given_numbers(config)
    trained = result.get("pairs_per_second") is not None

    def now(name: str) -> str:
        return _now(result, name)

    missed = selection.get("target_reached") is False
    done = fell and not missed
    if not kept and not done and trained and not (method == "cliperase" and given):
        return _advice_without_success(method, given)
    if kept and missed and (fell or not given):
        return _advice_on_target(result, method, given, trained)
    if method != "cliperase":
        return _advice_of_method(method, given, done, kept, now, trained)
    if not done and number(config.get("lambda_forget")) == 0:
        return "With lambda_forget=0 nothing pushes the forget pairs apart: set it above 0 (default 3)."
    if done:
        return f"Lower {now('learning_rate')} or {now('epochs')}, or raise lambda_retain or lambda_consistency."
    if not kept:
        return (
            f"Lower {now('learning_rate')} and raise {now('epochs')}, or raise lambda_retain, lambda_consistency or "
            "batch_size."
        )
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


def _given_numbers(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the numbers that the run would find itself and was given."""
    length = "steps" if number(config.get("steps")) else "epochs"
    return [name for name in ("learning_rate", length) if number(config.get(name)) is not None]


def _now(result: Mapping[str, Any], name: str) -> str:
    """Name a setting with its value, or with the one that the run found."""
    config, recipe = result.get("config") or {}, result.get("recipe") or {}
    found = {"learning_rate": ("learning_rate", ""), "epochs": ("steps", " steps")}
    if name == "epochs" and number(config.get("steps")):
        name = "steps"
    value = number(config.get(name))
    if config.get(name) == "auto" and name in found:
        key, unit = found[name]
        value = number(recipe.get(key))
        return name if value is None else f"{name} (found: {value:.3g}{unit})"
    return name if value is None else f"{name} (now {value:g})"


def _left_out(given: Sequence[str]) -> str:
    return f"leave out {' and '.join(given)} so that the run finds {'them' if len(given) > 1 else 'it'}"


def _advice_without_success(method: str, given: Sequence[str]) -> str:
    """Advise after training that forgot too little and damaged the rest, so that neither more nor less of it helps."""
    wider = "give more retain pairs, or forget fewer classes at once"
    if method != "calibrated":
        without = f", and {_left_out(given)}" if given else f"; {wider}"
        return f'Use method="calibrated", which holds the retain pairs{without}.'
    if given:
        return f"{_left_out(given).capitalize()}, or give more retain pairs."
    return f"{wider.capitalize()}; the reason of the choice says which limit gave way."


def _advice_on_target(result: Mapping[str, Any], method: str, given: Sequence[str], trained: bool) -> str:
    """Advise after a run that kept the rest and missed its target; see also the reason of the selection."""
    config, selection = result.get("config") or {}, result.get("selection") or {}
    if selection.get("within_floor") is False or number(selection.get("outside_floors")):
        return f"Allow more with worst_class_floor or {_now(result, 'retain_floor')}, or forget fewer classes at once."
    if not trained:
        return 'Change method_options, or use method="calibrated".'
    if given:
        return f"Raise {' or '.join(_now(result, name) for name in given)}, or {_left_out(given)}."
    if method == "calibrated":
        weight = number((config.get("method_options") or {}).get("lambda_level")) or 0.0
        return (
            f'Give forgetting more weight with method_options={{"lambda_level": {max(100, 3 * weight):g}}}, or forget '
            "fewer classes at once; name classes that are made of parts by their parts."
        )
    more = f"Raise {_now(result, 'lambda_forget')}, or use" if method == "cliperase" else "Use"
    return f'{more} method="calibrated".'


def _advice_of_method(
    method: str, given: Sequence[str], done: bool, kept: bool, now: Callable[[str], str], trained: bool
) -> str:
    """Advise what to change for a method without the weights of CLIPErase's terms."""
    if not trained:
        if not kept:
            return 'Change method_options, or use method="calibrated", which holds the retain pairs.'
        return f"Change method_options, or allow more with {now('retain_floor')}."
    if not done:
        return f"Raise {now('learning_rate')} or {now('epochs')}."
    if method != "calibrated":
        other = 'use method="calibrated", which holds the retain pairs'
    else:
        other = _left_out(given) if given else "give more retain pairs"
    return f"Lower {now('learning_rate')} or {now('epochs')}, or {other}."


def left_out_lines(skipped: Mapping[str, Any]) -> list[str]:
    """Return a line for each reason why items were left out, with their number and the first of them."""
    return [f"{row['count']:,} x {reason} (the first: {row['example']})" for reason, row in skipped.items()]
