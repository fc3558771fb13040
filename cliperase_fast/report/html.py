"""report.html: a run's page, one file with everything in it, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cliperase_fast.plurals import counted
from cliperase_fast.report import plots
from cliperase_fast.report.audit_html import association_facts, over_forgotten_lines, verdict_rows
from cliperase_fast.report.data import ReportData
from cliperase_fast.report.recipe import recipe_section
from cliperase_fast.report.rendering import Row, Table, picture, render, write_page
from cliperase_fast.report.wording import (
    Headline,
    cell,
    change,
    count,
    headline,
    left_out_lines,
    number,
    percent,
    shown_metrics,
    signed,
    value,
    verdict,
)

_LEVELS = {
    "good": "Success", "mixed": "Mixed result", "bad": "Failure", "nothing": "No result", "unknown": "No scores",
}  # fmt: skip

_LEVELS_CAPTION = (
    " The lines are what not knowing looks like: unrelated pairs of the original, and oracles where there are some."
)
_TARGET_CAPTION = " The line is the target of the run, just above the background level of the forget pairs."


def write_html(run: ReportData, path: str | Path) -> Path:
    """Write the report of a run as a self-contained page; its figures are inside, light and dark."""
    return write_page(page(run), path)


def page(run: ReportData) -> str:
    """Render the page. Every text that comes from the run is escaped."""
    result = run.result
    judgement = verdict(result)
    selection, config = result.get("selection") or {}, result.get("config") or {}
    return render(
        "run.html",
        title=run.title,
        verdict=judgement,
        verdict_kind=_LEVELS[judgement.level],
        tiles=_tiles(headline(result)),
        sets=_sets(result),
        meanings=_meanings(result),
        grain=_grain(result),
        reason=selection.get("reason"),
        stopped_early=bool(selection.get("stopped_early")),
        recipe=recipe_section(result),
        notes=[f"{note}." for note in result.get("notes") or []],
        audit=_audit(run),
        figures=_figures(run),
        classes=_classes(run),
        facts=_facts(result),
        settings=[(name, "(none)" if value in (None, "") else value) for name, value in config.items()],
    )


def _tiles(head: Headline | None) -> list[dict[str, Any]]:
    """The two numbers that matter, each with a bar."""
    if head is None:
        return []
    return [
        {
            "set": which,
            "heading": f"{which.capitalize()} {head.counted}",
            "before": percent(before),
            "after": percent(after),
            "before_width": f"{100 * before:.2f}",
            "after_width": f"{100 * after:.2f}",
            "note": f"{_wish(head, which)}; {signed(100 * (after - before), 1)} points",
        }
        for which, values in (("forget", head.forget), ("retain", head.retain))
        if values is not None
        for before, after in [values]
    ]


def _wish(head: Headline, which: str) -> str:
    return "should fall" if head.metric.better[which] == "lower" else "should stay"


def _before_after_sets(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    before, after = result.get("before") or {}, result.get("after") or {}
    return [(which, before.get(which) or {}, after.get(which) or {}) for which in ("forget", "retain")]


def _sets(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of scores for each set that has some."""
    sets = []
    for which, old, new in _before_after_sets(result):
        rows = [
            Row(
                (
                    metric.label,
                    *(cell(metric, value(metric, scores)) for scores in (old, new)),
                    change(metric, value(metric, old), value(metric, new)),
                )
            )
            for metric in shown_metrics(old, new)
        ]
        if rows:
            pairs = old.get("pairs", new.get("pairs"))
            size = "" if number(pairs) is None else counted(pairs, "pair", ",")
            sets.append({"set": which, "count": size, "table": Table(("", "before", "after", "change"), rows)})
    return sets


def _meanings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each score shown in a table measures."""
    shown = {metric.label: metric.meaning for _, *both in _before_after_sets(result) for metric in shown_metrics(*both)}
    return list(shown.items())


def _grain(result: Mapping[str, Any]) -> str:
    """How coarse the forget scores are, where the set is small."""
    pairs = number(((result.get("before") or {}).get("forget") or {}).get("pairs"))
    if not pairs or pairs >= 200:
        return ""
    return f"With {counted(int(pairs), 'forget pair', ',')}, one image is {100 / pairs:.1f} points."


def _audit(run: ReportData) -> dict[str, Any] | None:
    """What the audit says, and the association beside what it is compared with."""
    if run.audit is None:
        return None
    return {
        "verdicts": verdict_rows(run.audit),
        "association": association_facts(run.audit),
        "warning": over_forgotten_lines(run.audit),
    }


def _figures(run: ReportData) -> list[Any]:
    figures = [
        picture(
            run,
            plots.draw_losses,
            "Loss curves by step",
            _terms_caption(run.result),
        ),
        picture(
            run,
            plots.draw_similarities,
            "Histograms of the similarity of matching pairs, before and after",
            "Matching pairs of the test split. Forget pairs should move left, retain pairs should stay."
            + (_LEVELS_CAPTION if run.audit is not None else _TARGET_CAPTION if run.result.get("recipe") else ""),
        ),
        picture(
            run,
            partial(plots.draw_embeddings, moments=("before",)),
            "Map of image embeddings before unlearning",
            "Test images in the two main directions (principal components) of their features.",
        ),
        picture(
            run,
            partial(plots.draw_embeddings, moments=("after",)),
            "Map of image embeddings after unlearning",
            "The same images after unlearning, in the same two directions and at the same scale.",
        ),
    ]
    return [figure for figure in figures if figure is not None]


def _terms_caption(result: Mapping[str, Any]) -> str:
    weighted = (result.get("config") or {}).get("method", "cliperase") == "cliperase"
    terms = "The terms before their weights (×), the total with them." if weighted else "The total and the terms."
    return f"{terms} Thin: every step; thick: a running mean."


def _classes(run: ReportData) -> dict[str, Any] | None:
    rows, _ = plots.changed_classes(run.result)
    if not rows:
        return None
    cells = [
        Row(
            (
                name,
                row["set"],
                count(row.get("pairs")),
                percent(row["before"]),
                percent(row["after"]),
                signed(100 * (row["after"] - row["before"]), 1),
            ),
            emphasis="" if row["set"] == "retain" else "forget",
        )
        for name, row in rows
    ]
    figure = picture(
        run,
        plots.draw_per_class,
        "Accuracy by class before and after; the table beside has the numbers",
        "Zero-shot accuracy on the test split: forget classes first, then the largest losses.",
    )
    return {
        "figure": figure,
        "table": Table(("class", "set", "pairs", "before", "after", "change"), cells, 2, minor=(1, 2)),
    }


def _facts(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data = result.get("data") or {}
    facts: list[tuple[str, Any]] = [
        ("Model", result.get("model")),
        ("Forget", _with_pairs(data.get("forget"), data.get("forget_pairs"))),
        ("Retain", _with_pairs(data.get("retain"), data.get("retain_pairs"))),
        ("Test", data.get("test")),
        ("Left out", "; ".join(left_out_lines(data.get("skipped") or {}))),
        ("Time", _durations(result.get("seconds") or {})),
        ("Speed", _speed(number(result.get("pairs_per_second")))),
        ("Seed", result.get("seed")),
        ("Data fingerprint", data.get("fingerprint")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())),
    ]
    return [(name, fact) for name, fact in facts if fact not in (None, "")]


def _with_pairs(name: Any, pairs: Any) -> str | None:
    if name is None:
        return None
    return str(name) if number(pairs) is None else f"{name} ({counted(pairs, 'training pair', ',')})"


def _durations(seconds: Mapping[str, Any]) -> str:
    names = {"total": "in all", "train": "training", "evaluate": "evaluation"}
    known = [(number(seconds.get(key)), text) for key, text in names.items()]
    return ", ".join(f"{_duration(value)} {text}" for value, text in known if value is not None)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _speed(rate: float | None) -> str | None:
    return (
        None
        if rate is None
        else f"{rate:,.0f} pairs/s in training"
        if rate >= 10
        else f"{rate:.2g} pairs/s in training"
    )
