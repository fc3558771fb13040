"""The tables and verdicts of benchmarks/results/unaided-*.json: for docs/unaided.md, and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .records import Table
from .unaided_verdicts import (
    AUDITED,
    CALIBRATED,
    EXTRA,
    FIXED,
    GIVEN,
    SEARCHED,
    after,
    done,
    failed,
    gap_of,
    gaps_by_seed,
    overall,
    retain_drop,
)

Record = Mapping[str, Any]

DATA = {
    "digits": "digits", "shapes": "shapes", "personas": "personas", "cifar10": "CIFAR-10",
    "towers": "pretrained towers",
}  # fmt: skip
LEVELS = {
    "association": "association", "image_side": "image side", "text_side": "text side",
    "intra_identity": "intra-identity", "inter_identity": "inter-identity",
}  # fmt: skip
NOT_MEASURED = "Not measured yet: `python -m benchmarks.unaided --help` says how."


def scores_table(record: Record) -> Table:
    """A row for each method: the means over its runs. Then the originals and the oracles."""
    runs = record["runs"]
    levels = _levels(runs)
    head = (
        "", "runs", "forget top-1", "highest", "retain drop", "worst class drop", "highest lower bound",
        *(LEVELS[name] for name in levels), "mean gap", "time",
    )  # fmt: skip
    there = {run["method"] for run in runs}
    shown = [method for method in AUDITED if method not in EXTRA or method in there]
    return head, [*(_method_row(runs, method, levels) for method in shown), *_reference_rows(runs, levels)]


def _levels(runs: Sequence[Record]) -> list[str]:
    """The cosines to show: those that the data has."""
    own = [run for method in AUDITED for run in done(runs, method)]
    return [name for name in LEVELS if all(name in run["scores"]["after"] for run in own)]


def _method_row(runs: Sequence[Record], method: str, levels: Sequence[str]) -> tuple[str, ...]:
    own = done(runs, method)
    failures = sum(run["method"] == method for run in failed(runs))
    count = f"{len(own)}" + (f" ({failures} failed)" if failures else "")
    if not own:
        return (method, count, *[""] * (len(levels) + 7))
    seeds = list(gaps_by_seed(runs, method).values())
    spread = f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else ""

    def mean(value: Callable[[Record], float]) -> float:
        return float(np.mean([value(run) for run in own]))

    return (
        method,
        count,
        _percent(mean(partial(after, score="zero_shot_top1"))),
        _percent(max(after(run, "zero_shot_top1") for run in own)),
        _points(mean(retain_drop)),
        _points(mean(partial(after, score="worst_class_drop"))),
        _points(max(run["scores"]["after"]["worst_class_drop"]["low"] for run in own)),
        *(f"{mean(partial(after, score=name)):.2f}" for name in levels),
        f"{mean(gap_of):.3f}{spread}",
        f"{mean(lambda run: run['seconds']):.1f} s",
    )


def _reference_rows(runs: Sequence[Record], levels: Sequence[str]) -> list[tuple[str, ...]]:
    """What the originals and the oracles score, from the audits of `calibrated`."""
    own = done(runs, CALIBRATED)
    if not own:
        return []

    def row(who: str, model: str, gap: str) -> tuple[str, ...]:
        def mean(name: str) -> float:
            return float(np.mean([run["scores"][model][name] for run in own]))

        drop = float(np.mean([run["scores"]["before"]["retain_top1"] for run in own])) - mean("retain_top1")
        cosines = (f"{mean(name):.2f}" for name in levels)
        return (who, "", _percent(mean("zero_shot_top1")), "", _points(drop), "", "", *cosines, gap, "")

    floor = float(np.mean([run["floor"] for run in own]))
    return [row("the originals", "before", ""), row("the oracles", "oracle", f"{floor:.3f} between two")]


def overview_table(records: Mapping[str, Record]) -> Table:
    """A row for each data set: what `calibrated` without settings forgot and kept, and the mean gaps of each method."""
    rows = []
    for name, record in records.items():
        own = done(record["runs"], CALIBRATED)
        if not own:
            continue
        before, left = (
            float(np.mean([run["scores"][model]["zero_shot_top1"] for run in own])) for model in ("before", "oracle")
        )
        gone = float(np.mean([after(run, "zero_shot_top1") for run in own]))
        drop = float(np.mean([retain_drop(run) for run in own]))
        gaps = [
            f"{np.mean([gap_of(run) for run in found]):.3f}" if (found := done(record["runs"], method)) else "–"
            for method in (CALIBRATED, SEARCHED, FIXED)
        ]
        floor = float(np.mean([run["floor"] for run in own]))
        shares = (_percent(share) for share in (before, gone, left))
        rows.append((DATA[name], f"{len(own)}", *shares, _points(drop), *gaps, f"{floor:.3f}"))
    head = (
        "", "runs", "forget before", "forget after", "oracles", "retain drop", "gap: calibrated", "cliperase",
        "cliperase, version 0.1", "between two oracles",
    )  # fmt: skip
    return head, rows


def choices_table(record: Record) -> Table:
    """A row for each concept and seed: what the recipe of `calibrated` chose, and what it cost."""
    runs = record["runs"]
    given = {(run["concept"], run["seed"]): run for run in done(runs, GIVEN)}
    rows = []
    for run in done(runs, CALIBRATED):
        recipe, timed = run["recipe"], given.get((run["concept"], run["seed"]))
        ratio = "" if timed is None else f"{run['seconds'] / timed['seconds']:.2f}"
        rows.append(
            (
                run["concept"], str(run["seed"]), f"{recipe['learning_rate']:.2g}", str(recipe["probes"]),
                str(recipe["steps"]), str(recipe["chosen_step"]), "yes" if recipe["target_reached"] else "**no**",
                "yes" if recipe["within_floor"] else "**no**", f"{run['seconds']:.1f} s", ratio,
                _percent(after(run, "zero_shot_top1")), f"{gap_of(run):.3f}",
            )
        )  # fmt: skip
    head = (
        "concept", "seed", "learning rate", "rates tried", "steps", "kept step", "target reached", "within the floors",
        "time", "times as long as with numbers", "forget top-1", "mean gap",
    )  # fmt: skip
    return head, rows


def verdict_lines(record: Record) -> list[str]:
    said = {True: "holds", False: "**does not hold**", None: "open"}
    return [f"- {name}: {said[found['holds']]}: {found['text']}." for name, found in record["verdicts"].items()]


def failure_lines(record: Record) -> list[str]:
    return [
        f"- {run['concept']}, seed {run['seed']}, {run['method']}: {run['error']}" for run in failed(record["runs"])
    ]


def section(record: Record) -> list[str | Table]:
    """What the docs say of one data set: texts and tables."""
    failures = failure_lines(record)
    return [
        scores_table(record),
        "\n".join(verdict_lines(record)),
        *(["Runs that failed:\n\n" + "\n".join(failures)] if failures else []),
        choices_table(record),
    ]


def overall_line(records: Mapping[str, Record]) -> str:
    """Whether `calibrated` wins on all data sets, in a sentence."""
    text = overall(records, tuple(DATA))["text"]
    return f"{text[0].upper()}{text[1:]}."


def run_line(run: Record) -> str:
    """A run in one line of text."""
    name = f"{run['concept']}, seed {run['seed']}, {run['method']}"
    if "error" in run:
        return f"{name}: FAILED: {run['error']}"
    took = f"{run['seconds']:.1f} s"
    if "scores" not in run:
        return f"{name}: {took}, up to the kept step {run['chosen']['seconds']:.1f} s"
    drop, recipe = run["scores"]["after"]["worst_class_drop"], run["recipe"]
    return (
        f"{name}: forget {_percent(after(run, 'zero_shot_top1'))}, retain drop {_points(retain_drop(run))}, "
        f"worst class {_points(drop['value'])} (from {_points(drop['low'])}), "
        f"association {after(run, 'association'):.2f}, gap {gap_of(run):.3f}, "
        f"rate {recipe['learning_rate']:.2g}, {recipe['chosen_step']} of {recipe['steps']} steps, {took}, "
        f"audit {run['audit_seconds']:.1f} s"
    )


def study_text(name: str, record: Record) -> str:
    """The tables and the verdicts of one data set as plain text."""
    parts = [plain_table(part) if isinstance(part, tuple) else part for part in section(record)]
    return "\n\n".join([f"--- {DATA[name]}", *parts])


def plain_table(table: Table) -> str:
    head, rows = table
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
