"""The tables, sentences and pictures of benchmarks/results/leaderboard-*.json: for docs/leaderboard.md, and as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .machine import RESULTS
from .records import Table
from .unaided_report import failure_lines, plain_table
from .unaided_verdicts import FORGOTTEN, after, failed, gap_of

Record = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]

DATA = {
    "digits": "digits, forgetting “seven”",
    "shapes": "shapes, forgetting everything purple",
    "personas": "personas, forgetting the phone numbers of ten people",
    "cifar10": "CIFAR-10, forgetting “airplane”",
    "towers": "pretrained towers, forgetting “airplane”",
}
BOARDS = (*DATA, "ablation", "ratio", "depth")
NOT_MEASURED = "Not measured yet: `python -m benchmarks.leaderboard --help` says how."
_DEPTH = {
    "relearn_area": "relearning area", "relearn@10": "relearned after 10 steps", "probe": "linear probe",
    "prompt_attack": "prompt attack", "membership": "membership", "quantised_top1@4": "4-bit weights",
}  # fmt: skip


def by_row(record: Record) -> dict[str, Runs]:
    """The runs of each row that did not fail, in the order of the file's first seed."""
    names = dict.fromkeys(run["method"] for run in record["runs"])
    found = {name: [r for r in record["runs"] if r["method"] == name and "error" not in r] for name in names}
    return {name: runs for name, runs in found.items() if runs}


def forgets(run: Mapping[str, Any]) -> bool:
    """Whether the forget pairs are named in at most 5 % of cases, or no more often than by the worst oracle."""
    oracles = [scores["zero_shot_top1"] for who, scores in run["scores"].items() if who.startswith("oracle ")]
    return after(run, "zero_shot_top1") <= max([FORGOTTEN, *oracles])


def change(run: Mapping[str, Any]) -> float:
    """How far the accuracy on retain pairs rose."""
    return after(run, "retain_top1") - run["scores"]["before"]["retain_top1"]


def ranking(record: Record) -> list[str]:
    """The rows that forget in every run by their mean gap, then the others."""
    rows = by_row(record)

    def place(name: str) -> tuple[bool, float]:
        runs = rows[name]
        return not all(map(forgets, runs)), float(np.mean([gap_of(run) for run in runs]))

    return sorted(rows, key=place)


def board_table(record: Record, ranked: bool = True) -> Table:
    """A row for each method: mean and spread over its runs. Then the originals and the oracles."""
    head = (
        "", "runs", "forget top-1", "association", "retain top-1, change", "worst class, change", "gap", "forgets",
        "over-forgotten", "processor time", "memory", "changed",
    )  # fmt: skip
    rows = by_row(record)
    order = ranking(record) if ranked else list(rows)
    found = [_row(name, rows[name]) for name in order]
    return head, [*found, *_references(record)]


def _row(name: str, runs: Runs) -> tuple[str, ...]:
    return (
        name,
        f"{len(runs)}",
        _spread([after(run, "zero_shot_top1") for run in runs], _percent),
        _spread([after(run, "association") for run in runs], _cosine),
        _spread([change(run) for run in runs], _points),
        _spread([-after(run, "worst_class_drop") for run in runs], _points),
        _spread([gap_of(run) for run in runs], _gap) if all("gap" in run for run in runs) else "",
        f"{sum(map(forgets, runs))} of {len(runs)}",
        f"{sum(bool(run['over_forgotten']) for run in runs)} of {len(runs)}",
        f"{np.mean([run['cpu_seconds'] for run in runs]):.1f} s",
        _mib([run["peak_mib"] for run in runs]),
        _mib([run["changed_mib"] for run in runs]),
    )


def _references(record: Record) -> list[tuple[str, ...]]:
    """The originals, and the oracles with their own spread."""
    runs = [runs[0] for runs in _by_seed(record).values()]
    if not runs:
        return []
    before = [run["scores"]["before"] for run in runs]
    names = [name for name in runs[0]["scores"] if name.startswith("oracle ")]
    oracles = [runs[0]["scores"][name] for name in names]
    blank = [""] * 4
    found = [
        (
            "the originals", f"{len(before)}", _spread([of["zero_shot_top1"] for of in before], _percent),
            _spread([of["association"] for of in before], _cosine), *blank, "", "", "", "",
        )
    ]  # fmt: skip
    if oracles:
        start = float(np.mean([of["retain_top1"] for of in before]))
        cost = record.get("oracle")
        found.append(
            (
                "the oracles", f"{len(oracles)}", _spread([of["zero_shot_top1"] for of in oracles], _percent),
                _spread([of["association"] for of in oracles], _cosine),
                _spread([of["retain_top1"] - start for of in oracles], _points), "",
                f"{np.mean([run['floor'] for run in runs]):.3f} between two", "", "",
                f"{cost['cpu_seconds']:.1f} s" if cost else "not measured", "", "",
            )
        )  # fmt: skip
    return found


def _by_seed(record: Record) -> Mapping[int, Runs]:
    seeds: dict[int, list[Mapping[str, Any]]] = {}
    for run in record["runs"]:
        if "error" not in run:
            seeds.setdefault(run["seed"], []).append(run)
    return seeds


def pairs_line(record: Record) -> str:
    """How many pairs the scores rest on, and how complete the table is."""
    runs = [run for run in record["runs"] if "pairs" in run]
    if not runs:
        return ""
    pairs = runs[0]["pairs"]
    seeds = len({run["seed"] for run in runs})
    return (
        f"{pairs['forget']:,} forget and {pairs['retain']:,} retain pairs of the test split, {seeds} "
        f"original{'s' if seeds != 1 else ''}."
    )


def missing_line(record: Record) -> str:
    """Which runs are not there yet."""
    missing = record.get("missing") or {}
    count = sum(map(len, missing.values()))
    if not count:
        return ""
    told = "; ".join(
        f"{where}: {', '.join(rows) if len(rows) < 9 else f'{len(rows)} of them'}" for where, rows in missing.items()
    )
    return f"**Not complete**: {count} of {count + len(record['runs'])} runs are missing ({told})."


def winner_line(record: Record) -> str:
    """Which method is nearest to the oracles, and where calibrated stands."""
    rows = by_row(record)
    order = [name for name in ranking(record) if all(map(forgets, rows[name]))]
    if not order:
        return "No method forgets in every run."
    gaps = {name: _spread([gap_of(run) for run in rows[name]], _gap) for name in order}
    text = f"Of the {len(order)} methods that forget in every run, `{order[0]}` has the smallest gap ({gaps[order[0]]})"
    if len(order) > 1:
        text += f", then `{order[1]}` ({gaps[order[1]]})"
    if "calibrated" in order[2:]:
        text += f"; `calibrated` ranks number {order.index('calibrated') + 1} ({gaps['calibrated']})"
    elif "calibrated" in rows and "calibrated" not in order:
        text += "; `calibrated` does not forget in every run"
    floor = float(np.mean([run["floor"] for run in rows[order[0]]]))
    close = [f"`{name}`" for name in order if float(np.mean([gap_of(run) for run in rows[name]])) <= floor]
    if len(close) > 1:
        text += (
            f". {', '.join(close)} are as near to the oracles as these are to each other ({_gap(floor)}): "
            "their order means nothing"
        )
    return text + "."


def _failures(record: Record) -> list[str]:
    return ["Runs that failed:\n\n" + "\n".join(failure_lines(record))] if failed(record["runs"]) else []


def ratio_table(record: Record) -> Table:
    """A row for each number of classes, with columns of each method."""
    names = list(by_row(record))
    counts = list(dict.fromkeys(run["concept"] for run in record["runs"]))
    head = ["classes forgotten"]
    for name in names:
        head += [f"{name}: forget top-1", "retain top-1, change", "above the background", "processor time"]
    rows = []
    for count in counts:
        cells = [count]
        for name in names:
            runs = [run for run in by_row(record)[name] if run["concept"] == count]
            cells += _ratio_cells(runs) if runs else ["–"] * 4
        rows.append(tuple(cells))
    return tuple(head), rows


def _ratio_cells(runs: Runs) -> list[str]:
    return [
        _spread([after(run, "zero_shot_top1") for run in runs], _percent),
        _spread([change(run) for run in runs], _points),
        _spread([after(run, "association") - run["background"] for run in runs], _cosine),
        f"{np.mean([run['cpu_seconds'] for run in runs]):.1f} s",
    ]


def depth_table(record: Record) -> Table:
    """A row for each method, with 95 % intervals over pairs, and one for the oracles: what attacks bring back."""
    rows = by_row(record)
    oracles = [runs[0]["depth"]["after"] for name, runs in rows.items() if name.startswith("oracle ")]

    def cells(scores: Mapping[str, Any]) -> list[str]:
        return [_interval(scores.get(name) or {}) for name in _DEPTH]

    found = [(name, *cells(runs[0]["depth"]["after"])) for name, runs in rows.items() if not name.startswith("oracle ")]
    if oracles:
        known = ([scores[name]["value"] for scores in oracles if name in scores] for name in _DEPTH)
        spreads = (_spread(values, _percent) if values else "–" for values in known)
        found.append((f"the oracles, {len(oracles)}", *spreads))
    if rows:
        found.append(("the original", *cells(next(iter(rows.values()))[0]["depth"]["before"])))
    return ("", *_DEPTH.values()), found


def overview_table(records: Mapping[str, Record], most: int = 5) -> Table:
    """The first methods of the first data set, with their gaps on the others."""
    head = ["", "runs", "forget top-1", "retain top-1, change", "processor time", *(f"gap: {name}" for name in records)]
    first = next(iter(records.values()))
    names = ranking(first)
    shown = names[:most]
    shown += [name for name in ("calibrated", "cliperase", "retain_finetune") if name in names and name not in shown]
    rows = []
    for name in shown:
        gaps = [
            _spread([gap_of(run) for run in runs], _gap) if (runs := by_row(record).get(name)) else "–"
            for record in records.values()
        ]
        runs = by_row(first)[name]
        label = f"{names.index(name) + 1}. `{name}`"
        rows.append((label, *(_row(name, runs)[column] for column in (1, 2, 4, 9)), *gaps))
    return tuple(head), rows


def run_line(run: Mapping[str, Any]) -> str:
    """A run in one line of text."""
    name = f"{run['concept']}, seed {run['seed']}, {run['method']}"
    if "error" in run:
        return f"{name}: FAILED: {run['error']}"
    took = f"{run['cpu_seconds']:.1f} s of the processor, {run['seconds']:.1f} s, audit {run['audit_seconds']:.1f} s"
    if "depth" in run:
        area = (run["depth"]["after"].get("relearn_area") or {}).get("value")
        return f"{name}: relearning area {area}, {took}"
    gap = f", gap {gap_of(run):.3f}" if "gap" in run else ""
    return (
        f"{name}: forget {_percent(after(run, 'zero_shot_top1'))}, association {after(run, 'association'):.2f}, "
        f"retain {_points(change(run))}{gap}, {took}"
    )


def parts(name: str, record: Record) -> list[str | Table]:
    """What the docs say of one board: texts and tables."""
    after: list[str] = [missing_line(record), *_failures(record)]
    if name == "depth":
        found: list[str | Table] = [depth_table(record), pairs_line(record)]
    elif name == "ratio":
        found = [ratio_table(record)]
    else:
        found = [board_table(record, ranked=name in DATA), pairs_line(record)]
    return [part for part in [*([winner_line(record)] if name in DATA else []), *found, *after] if part]


def text(name: str, record: Record) -> str:
    """The tables of one board as plain text."""
    return "\n\n".join(plain_table(part) if isinstance(part, tuple) else part for part in parts(name, record))


def docs(name: str, pictures: Path, record: Record) -> list[str | Table]:
    """The texts and tables of one board, and its picture if it is in that folder."""
    file = f"leaderboard-{name}.png"
    shown = [f"![Forgetting against damage]({pictures.name}/{file})"] if (pictures / file).is_file() else []
    return [*parts(name, record), *shown]


def records() -> dict[str, Any]:
    """The committed boards of data sets."""
    files = {name: RESULTS / f"leaderboard-{name}.json" for name in DATA}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def search(record: Record) -> list[str | Table]:
    """A row for each method: its recipe, and the outcome of the tried settings on each concept's validation pairs."""
    rows = []
    concepts = list(dict.fromkeys(run["concept"] for run in record["runs"]))
    for method, setting in record["chosen"].items():
        runs = [run for run in record["runs"] if run["method"] == method]
        told = ["; ".join(_judgement(run) for run in runs if run["concept"] == concept) for concept in concepts]
        rows.append((f"`{method}`", _setting(setting), *told, f"{sum(run['cpu_seconds'] for run in runs):.0f} s"))
    seconds = sum(run["cpu_seconds"] for run in record["runs"])
    budget = f"{record['tried']} settings of each method, {seconds / 60:.0f} minutes of processor time in all."
    return [budget, (("", "recipe", *(f"tried on {concept}" for concept in concepts), "processor time"), rows)]


def _judgement(run: Mapping[str, Any]) -> str:
    if "error" in run:
        return f"{_setting(run['setting'])}: failed"
    kept = "" if run["kept"] else ", the rest suffers"
    reached = "at the target" if run["reached"] else f"{run['left']:.2f} above the target"
    return f"{_setting(run['setting'])}: {reached}, {run['divergence']:.3f} nats{kept}"


def _setting(setting: Mapping[str, Any]) -> str:
    options = {**setting, **setting.get("method_options", {})}
    options.pop("method_options", None)
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in options.items()) or "defaults"  # fmt: skip


def content_of(record: Record) -> dict[str, Any]:
    """The record as the content of a compare.json, means over the seeds, for its picture."""
    rows = by_row(record)

    def mean(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            name: {"value": float(np.mean([_value(of[name]) for of in scores if name in of]))}
            for name in scores[0]
        }  # fmt: skip

    runs = next(iter(_by_seed(record).values()))
    models = {"before": mean([run["scores"]["before"] for run in runs])}
    models |= {who: mean([of]) for who, of in runs[0]["scores"].items() if who.startswith("oracle")}
    methods = {
        name: {"scores": mean([run["scores"]["after"] for run in found]),
               "gap": float(np.mean([gap_of(run) for run in found]))}
        for name, found in rows.items()
    }  # fmt: skip
    return {"models": models, "methods": methods}


def draw(record: Record, path: Path) -> None:
    """Write a picture of forgetting against damage, with the oracles marked."""
    from cliperase_fast.report.comparison import draw_tradeoff
    from cliperase_fast.report.drawing import LIGHT, png

    figure = draw_tradeoff(content_of(record), LIGHT)
    if figure is not None:
        path.write_bytes(png(figure))


def _value(entry: Any) -> float:
    return entry["value"] if isinstance(entry, Mapping) else entry


def _spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The mean, and the standard deviation if there are several values."""
    mean = write(float(np.mean(values)))
    return f"{mean} ± {write(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def _interval(entry: Mapping[str, Any]) -> str:
    """The value of a share with its 95 % interval, if it has one."""
    if entry.get("value") is None:
        return "–"
    value = _percent(entry["value"])
    return value if entry.get("low") is None else f"{value} ({100 * entry['low']:.0f} to {100 * entry['high']:.0f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    """A share in percentage points, without a minus before zero."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0")


def _cosine(value: float) -> str:
    return f"{value:.2f}"


def _gap(value: float) -> str:
    return f"{value:.3f}"


def _mib(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = float(np.mean(known))
    return f"{mean:,.1f} MiB" if mean >= 1 else f"{mean:.2g} MiB"
