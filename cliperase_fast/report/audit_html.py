"""audit.html: an audit's page, from the content of audit.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cliperase_fast.evaluation.metrics import COSINE, Format
from cliperase_fast.plurals import more_classes
from cliperase_fast.report import audit_plots, plots
from cliperase_fast.report.audit_plots import Content, oracle_names, value_of
from cliperase_fast.report.audit_scores import AREA, SCORES, find_score, meanings
from cliperase_fast.report.rendering import Cell, Row, Table, picture, render
from cliperase_fast.report.wording import (
    count,
    decimals,
    difference,
    interval,
    left_out_lines,
    number,
    percent,
    signed,
    written,
)

GROUPS = {
    "forgetting": "Forgetting",
    "collateral": "Collateral damage",
    "depth": "Depth",
    "gap": "Gap to the oracles",
}
_QUESTIONS = {
    "forgetting": "What the model still shows of the forget pairs when it is asked.",
    "collateral": "What happened to everything else.",
    "depth": "What probes, training, prompts and rounding bring back.",
}
_COLUMNS = {"oracle": "oracles"}  # of a table, where it is not the model's name
_LONGEST_NAME = 60  # letters of a class, a variant or a data set
_TITLE_CONCEPTS = 3
_LONGEST_TITLE = 80


def audit_page(content: Content) -> str:
    """Render the page. Every text that comes from the audit is escaped."""
    return render(
        "audit.html",
        title=_title(content),
        verdicts=verdict_rows(content),
        warning=over_forgotten_lines(content),
        notes=content.get("notes") or [],
        groups=_groups(content),
        gap=_gap(content),
        scores=picture(
            content,
            audit_plots.draw_scores,
            "Scores before and after as dots with intervals; the tables have the numbers",
            "Lines: 95% intervals. Bands: from the lowest to the highest oracle."
            if len(oracle_names(content)) > 1
            else "Lines: 95% intervals.",
        ),
        figures=_figures(content),
        classes=_classes(content),
        facts=_facts(content),
    )


def _title(content: Content) -> str:
    """ "Audit of forgetting seven": the first concepts, cut where they are long."""
    concepts = [_named(concept) for concept in (content.get("data") or {}).get("concepts") or []]
    shown = ", ".join(concepts[:_TITLE_CONCEPTS]) + (" and others" if len(concepts) > _TITLE_CONCEPTS else "")
    return f"Audit of forgetting {_cut(shown, _LONGEST_TITLE)}" if concepts else "Audit"


def _named(name: Any) -> str:
    """A class's name, cut where it is long."""
    return _cut(str(name).strip() or "(no name)", _LONGEST_NAME)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def verdict_rows(content: Content) -> list[tuple[str, str]]:
    """(name of the group, what its scores say)."""
    return [(GROUPS.get(group, group.capitalize()), said) for group, said in (content.get("verdicts") or {}).items()]


def over_forgotten_lines(content: Content) -> list[str]:
    """The figures of an over-forgotten result and the rule that it breaks; empty for other results."""
    if not content.get("over_forgotten"):
        return []
    form = SCORES["association"].format
    after, limit = value_of(content, "after", "forgetting", "association"), number(content.get("over_forgotten_below"))
    level = number(content.get("background"))
    oracles = [value_of(content, name, "forgetting", "association") for name in oracle_names(content)]
    lowest = min((value for value in oracles if value is not None), default=None)
    lines = [
        f"The association of the forget pairs is {written(after, form)}, lower than not knowing the concept explains. "
        "That marks the concept instead of forgetting it: such pairs are told apart by how far they were pushed."
    ]
    reference = level if lowest is None else lowest
    if reference is None:
        return lines
    what = "The oracle" if len(oracles) == 1 else "The lowest oracle"
    if lowest is None:
        what = "The background level of the original, which is the association of unrelated pairs,"
    rule = ""
    if limit is not None:
        rule = f", and a result is over-forgotten below {written(limit, form)}, {reference - limit:.2g} under it"
    lines.append(f"{what} has {written(reference, form)}{rule}.")
    return lines


def association_facts(content: Content) -> list[tuple[str, str]]:
    """The association after and before, the background level, and the oracles' mean and range where there are some."""
    form = SCORES["association"].format

    def shown(model: str) -> str:
        value, low, high = (
            value_of(content, model, "forgetting", "association", end) for end in ("value", "low", "high")
        )
        return f"{written(value, form)} {interval(low, high, form)}".rstrip()

    facts = [("After", shown("after")), ("Before", shown("before"))]
    level = number(content.get("background"))
    if level is not None:
        facts.append(("Background level of the original", written(level, form)))
    if "oracle" in (content.get("scores") or {}):
        names = oracle_names(content)
        known = [v for name in names if (v := value_of(content, name, "forgetting", "association")) is not None]
        reach = f" (from {written(min(known), form)} to {written(max(known), form)})" if len(known) > 1 else ""
        facts.append(("Models that never saw the pairs", shown("oracle") + reach))
    return facts


def _models(content: Content) -> list[str]:
    """The columns of the tables: before, after, the oracles' mean, then the other models.

    The mean of a single oracle is that oracle, which therefore has no column of its own.
    """
    scores = content.get("scores") or {}
    first = [name for name in ("before", "after", "oracle") if name in scores]
    single = oracle_names(content)
    alone = single if len(single) == 1 else []
    return first + [name for name in scores if name not in first and name not in alone]


def _groups(content: Content) -> list[dict[str, Any]]:
    """A table of scores for each group, what they mean, and which ones are missing and why."""
    models = _models(content)
    scores = content.get("scores") or {}
    gap = content.get("gap") or {}
    columns = ["", *(_COLUMNS.get(name, name) for name in models), *(["gap"] if gap else [])]
    minor = [1 + models.index(name) for name in models if name not in ("before", "after", "oracle")]
    minor += [len(columns) - 1] if gap else []
    groups = []
    for group, after in (scores.get("after") or {}).items():
        rows, missing = [], []
        for score in after:
            cells = [_cell((scores[name].get(group) or {}).get(score) or {}, score) for name in models]
            if all(cell.text == percent(None) for cell in cells):
                missing.append(f"{_label(score)} ({after[score].get('reason') or 'no value'})")
                continue
            distance = [difference(number(gap.get(score)), find_score(score).format)] if gap else []
            rows.append(Row((_label(score), *cells, *distance)))
        groups.append(
            {
                "heading": GROUPS.get(group, group.capitalize()),
                "question": _QUESTIONS.get(group, ""),
                "table": Table(columns, rows, minor=minor) if rows else None,
                "missing": "; ".join(missing),
                "meanings": meanings(after),
            }
        )
    return groups


def _label(score: str) -> str:
    return _cut(find_score(score).label, _LONGEST_NAME)


def _cell(found: Mapping[str, Any], score: str) -> Cell:
    """A score with its interval, and the class, the variant or the block that it is of."""
    form = find_score(score).format
    note = next((_named(found[key]) for key in ("class", "variant", "block") if found.get(key) is not None), "")
    low, high = (number(found.get(end)) for end in ("low", "high"))
    return Cell(written(number(found.get("value")), form), interval(low, high, form), note)


def _gap(content: Content) -> dict[str, Any] | None:
    """The table of gaps to the oracles: first the scores of the mean gap and the mean, then the others."""
    gap = content.get("gap")
    if not gap:
        return None
    floors = gap.get("floors") or {}
    where = {score: group for group, found in content["scores"]["after"].items() for score in found}
    known = [score for score in gap if score in where and number(gap[score]) is not None]
    first = [score for score in known if find_score(score).in_mean]
    rows = [_gap_row(content, where[score], score) for score in first]
    rows.append(
        Row(("Mean gap", "", "", *_distances(number(gap.get("mean")), number(gap.get("floor")), COSINE)), "sum")
    )
    rows += [_gap_row(content, where[score], score) for score in known if score not in first]
    tug = number(gap.get("tug_of_war"))
    return {
        "table": Table(("", "after", "oracles", "gap", "noise floor", "gap / floor"), rows, minor=(1, 2)),
        "has_floor": bool(floors),
        "tug_of_war": None if tug is None else written(tug, AREA),
    }


def _gap_row(content: Content, group: str, score: str) -> Row:
    gap = content["gap"]
    form = find_score(score).format
    values = (written(value_of(content, model, group, score), form) for model in ("after", "oracle"))
    floor = number((gap.get("floors") or {}).get(score))
    return Row((_label(score), *values, *_distances(number(gap[score]), floor, form)))


def _distances(gap: float | None, floor: float | None, form: Format) -> tuple[str, str, str]:
    """The gap, the noise floor and the ratio of both."""
    return difference(gap, form), difference(floor, form), "–" if gap is None or not floor else decimals(gap / floor, 1)


def _figures(content: Content) -> list[Any]:
    several = len(oracle_names(content)) > 1
    bands = " The band of before and after is the 95% interval" + (
        ", that of the oracles reaches from the lowest to the highest." if several else "."
    )
    figures = [
        picture(
            content,
            audit_plots.draw_relearning,
            "Curves of relearning by steps of training",
            "Share of forget images that are named after some steps of training on a few pairs." + bands,
        ),
        picture(
            content,
            audit_plots.draw_cosines,
            "Histograms of the cosines of images with their own captions, before and after",
            "Test pairs. Forget pairs should become like pairs of unrelated things, retain pairs should stay.",
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _classes(content: Content) -> dict[str, Any] | None:
    rows, total = plots.changed_classes(content.get("evidence") or {}, plots.MOST_CLASSES)
    if not rows:
        return None
    oracles = any(number(row.get("oracle")) is not None for _, row in rows)
    cells = [
        Row(
            (
                _named(name),
                row["set"],
                count(row.get("pairs")),
                percent(row["before"]),
                percent(row["after"]),
                *([percent(number(row.get("oracle")))] if oracles else []),
                signed(100 * (row["after"] - row["before"]), 1),
            ),
            emphasis="" if row["set"] == "retain" else "forget",
        )
        for name, row in rows
    ]
    columns = ("class", "set", "pairs", "before", "after", *(["oracles"] if oracles else []), "change")
    left_out = total - len(rows)
    return {
        "figure": picture(
            content,
            audit_plots.draw_class_changes,
            "Accuracy by class before and after; the table beside has the numbers",
            "Zero-shot accuracy on the test pairs: forget classes first, then the largest losses.",
        ),
        "table": Table(columns, cells, 2, minor=(1, 2)),
        "left_out": _left_out(left_out) if left_out else "",
    }


def _left_out(count: int) -> str:
    return f"{more_classes(count)} changed less and {'is' if count == 1 else 'are'} left out; audit.json has all."


def _facts(content: Content) -> list[tuple[str, Any]]:
    data = content.get("data") or {}
    concepts: Sequence[Any] = data.get("concepts") or []
    facts = (
        ("Data", " + ".join(dict.fromkeys(str(data[name]) for name in ("forget", "test") if data.get(name)))),
        ("Forget test pairs", count(data.get("forget_test_pairs"))),
        ("Retain test pairs", count(data.get("retain_test_pairs"))),
        ("Forgotten concepts", ", ".join(map(_named, concepts))),
        ("Oracles", str(len(oracle_names(content)))),
        ("Left out", "; ".join(left_out_lines(data.get("skipped") or {}))),
    )
    return [(name, fact) for name, fact in facts if fact not in (None, "")]
