"""The tables of benchmarks/results/audit-*.json for docs/audit.md, as (head, rows)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from cliperase_fast.report.audit_scores import SCORES, find_score

from .records import Table

Record = Mapping[str, Any]

DATA = {"digits": "digits", "shapes": "shapes", "cifar10": "CIFAR-10", "personas": "personas"}  # in the docs' order
CLEAN = "clean"  # what records call a model without any facts, in the place of a method
EXAMPLES = (
    "association", "zero_shot_top1", "mrr", "paraphrase_top1_max", "retain_top1", "retain_association",
    "worst_class_drop", "neighbours_top1", "image_side", "text_side", "probe", "prompt_attack", "quantised_top1@4",
    "membership", "unusual",
)  # fmt: skip
OF_PEOPLE = (
    "association", "zero_shot_top1", "retain_top1", "intra_identity", "inter_identity", "association_separability",
    "visual_identity", "general",
)  # fmt: skip


def scores_table() -> Table:
    """From the code: each score and its definition."""
    rows = [
        (f"`{name}…`" if name[-1] in "@:" else f"`{name}`", score.about("…").meaning) for name, score in SCORES.items()
    ]
    return ("score", "meaning"), rows


def example_table(score: str, records: Mapping[str, Record]) -> Table:
    """A score on each data set: of the original, of each method's model and of the oracles."""
    names = methods(records)
    rows = []
    for name, record in records.items():
        summary = record["summary"]
        if score in summary["before"]:
            cells = [_mean(summary.get(model, {}), score) for model in ("before", *names)]
            rows.append((_label(name, record, score), *cells, _range(summary["oracle"], score)))
    return ("", "original", *names, "oracles (range)"), rows


def relearn_table(records: Mapping[str, Record]) -> Table:
    """The relearning curves: a row for each model of each data set, a column for each number of steps."""
    steps: list[int] = []
    rows = []
    for name, record in records.items():
        summary = record["summary"]
        for model in (one for one in ("before", *methods({name: record}), "oracle") if one in summary):
            scores = summary[model]
            curve = {int(score.partition("@")[2]): score for score in scores if score.startswith("relearn@")}
            if curve:
                steps = sorted(curve)
                cells = [(_range if model == "oracle" else _mean)(scores, curve[step]) for step in steps]
                who = {"before": "original", "oracle": "oracles (range)"}.get(model, model)
                rows.append((_label(name, record, curve[steps[0]]), who, *cells))
    return ("", "", *(f"step {step}" for step in steps)), rows


def gap_table(records: Mapping[str, Record]) -> Table:
    """How far each method's models are from the oracles, beside what oracles are from each other."""
    rows = []
    for name, record in records.items():
        for method in methods({name: record}):
            runs = [run for run in record["runs"] if run["method"] == method]
            means = [sum(run["gap"][key] for run in runs) / len(runs) for key in ("mean", "floor", "tug_of_war")]
            over = sum(bool(run["over_forgotten"]) for run in runs)
            concepts = ", ".join(run["concept"] for run in runs)
            rows.append(
                (f"{DATA[name]}: {concepts}", method, *(f"{mean:.3f}" for mean in means), f"{over} of {len(runs)}")
            )
    return ("", "method", "mean gap", "noise floor", "tug of war", "over-forgotten"), rows


def verdict_lines(records: Mapping[str, Record]) -> list[str]:
    """The verdicts of the first audit of the first data set, by group."""
    run = next(iter(records.values()))["runs"][0]
    return [f"{group}: {said}" for group, said in run["verdicts"].items()]


def personas_table(records: Mapping[str, Record]) -> Table:
    """What each model knows of the personas: those of the methods, the oracles, and the one without facts."""
    head = ("", *(find_score(score).label for score in OF_PEOPLE))
    if "personas" not in records:
        return head, []
    summary = records["personas"]["summary"]
    names = {"before": "original", **{name: name for name in methods(records)}, CLEAN: "no facts"}
    rows = [(who, *(_mean(summary[name], of) for of in OF_PEOPLE)) for name, who in names.items() if name in summary]
    return head, [*rows, ("oracles (range)", *(_range(summary["oracle"], of) for of in OF_PEOPLE))]


def references_table(records: Mapping[str, Record]) -> Table:
    """The reference values of the digits beside the measured ones."""
    rows = []
    for row in records.get("digits", {"references": ()})["references"]:
        each = ", ".join(f"{value:.2f}" for value in row.get("each", ()))
        said = "yes" if row["within"] else "**no**"
        rows.append(
            (row["what"], f"{row['reference']:.2f} ± {row['tolerance']:.2f}", f"{row['measured']:.2f}", each, said)
        )
    return ("", "reference", "measured", "each oracle", "within"), rows


TABLES: dict[str, Callable[[Mapping[str, Record]], Table]] = {
    "gap": gap_table,
    "relearn": relearn_table,
    "references": references_table,
    "personas": personas_table,
    **{score.replace("@", "-"): partial(example_table, score) for score in EXAMPLES},
}


def methods(records: Mapping[str, Record]) -> list[str]:
    runs = [run for record in records.values() for run in record["runs"]]
    return list(dict.fromkeys(run["method"] for run in runs if run["method"] != CLEAN))


def _label(name: str, record: Record, score: str) -> str:
    """The data set and the concepts whose audit has the score."""
    concepts = [run["concept"] for run in record["runs"] if _has(run["scores"]["before"].values(), score)]
    return f"{DATA[name]}: {', '.join(dict.fromkeys(concepts))}"


def _has(groups: Iterable[Mapping[str, Any]], score: str) -> bool:
    return any(group.get(score, {}).get("value") is not None for group in groups)


def _mean(scores: Mapping[str, Any], score: str) -> str:
    return _number(scores[score]["mean"], score) if score in scores else ""


def _range(scores: Mapping[str, Any], score: str) -> str:
    if score not in scores:
        return ""
    low, high = (_number(scores[score][end], score) for end in ("low", "high"))
    return f"{_mean(scores, score)} ({low} to {high})"


def _number(value: float, score: str) -> str:
    form = find_score(score).format
    return f"{value * form.scale:.{form.digits}f}{' ' if form.unit else ''}{form.unit}"
