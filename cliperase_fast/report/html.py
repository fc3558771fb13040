"""report.html: one file with everything in it, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from cliperase_fast.report import plots
from cliperase_fast.report.data import ReportData
from cliperase_fast.report.style import STYLE
from cliperase_fast.report.wording import (
    Headline,
    cell,
    change,
    headline,
    left_out_lines,
    number,
    percent,
    shown_metrics,
    signed,
    value,
    verdict,
)

# No scripts and no fetches, should a name ever slip through unescaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LONG_WORD = 18  # letters that a class name may have in one piece beside the numbers, on a phone
_LEVELS = {
    "good": "Success", "mixed": "Mixed result", "bad": "Failure", "nothing": "No result", "unknown": "No scores",
}  # fmt: skip


def write_html(run: ReportData, path: str | Path) -> Path:
    """Write the report of a run as a self-contained page; the images of its figures are inside, light and
    dark."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(run), encoding="utf-8")
    return path


def page(run: ReportData) -> str:
    """The page's HTML. Every text that comes from the run is escaped."""
    result = run.result
    judgement = verdict(result)
    sentence = f"<b>{_LEVELS[judgement.level]}.</b> {_text(judgement.text)}"
    parts = [
        "<header>",
        f'<p class="kind">CLIPErase unlearning report</p><h1>{_text(run.title)}</h1>',
        f'<p class="verdict {judgement.level}">{sentence}</p>',
        "</header>",
        _meters(headline(result)),
        _scores(result),
        _selection(result),
        _notes(result),
        _figures(run),
        _classes(run),
        _origin(result),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(run.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def _meters(head: Headline | None) -> str:
    """The two numbers that matter, each with a bar."""
    if head is None:
        return ""
    what = head.counted
    tiles = []
    for which, values, wish in (
        ("forget", head.forget, "should fall"),
        ("retain", head.retain, "should stay"),
    ):
        if values is None:
            continue
        before, after = values
        tiles.append(
            f'<div class="card tile {which}"><h2>{which.capitalize()} {what}</h2>'
            f'<p class="numbers"><span>{_text(percent(before))}</span><i>→</i>'
            f"<strong>{_text(percent(after))}</strong></p>"
            f'<div class="bar"><i style="width:{100 * before:.2f}%"></i>'
            f'<b style="width:{100 * after:.2f}%"></b></div>'
            f'<p class="note">{wish}; {_text(signed(100 * (after - before), 1))} points</p></div>'
        )
    return f'<section class="pairs tiles">{"".join(tiles)}</section>'


def _scores(result: Mapping[str, Any]) -> str:
    before, after = result.get("before") or {}, result.get("after") or {}
    tables = []
    for which in ("forget", "retain"):
        old, new = before.get(which) or {}, after.get(which) or {}
        shown = shown_metrics(old, new)
        if not shown:
            continue
        rows = [
            (
                metric.label,
                *(cell(metric, value(metric, scores)) for scores in (old, new)),
                change(metric, value(metric, old), value(metric, new)),
            )
            for metric in shown
        ]
        pairs = old.get("pairs", new.get("pairs"))
        name = f"{which.capitalize()} <span>{'' if pairs is None else f'{_count(pairs)} pairs'}</span>"
        table = _table(("", "before", "after", "change"), rows)
        tables.append(f'<div class="card {which}"><h3>{name}</h3>{table}</div>')
    if not tables:
        return ""
    return (
        "<section><h2>Before and after</h2>"
        "<p>Measured on the test split, which took no part in training or in choosing the checkpoint. "
        "Changes are in percentage points; the association is the mean cosine of an image and its "
        "captions. R@k is the share of queries that find a match among their k nearest."
        f"{_grain(before)}</p>"
        f'<div class="pairs">{"".join(tables)}</div></section>'
    )


def _grain(before: Mapping[str, Any]) -> str:
    """How coarse the forget scores are, where the set is small."""
    pairs = number((before.get("forget") or {}).get("pairs"))
    if not pairs or pairs >= 200:
        return ""
    return f" With {_count(pairs)} forget pairs, one image is {100 / pairs:.1f} points."


def _selection(result: Mapping[str, Any]) -> str:
    selection = result.get("selection") or {}
    if not selection.get("reason"):
        return ""
    early = " The run stopped early, as no better checkpoint came." if selection.get("stopped_early") else ""
    return f"<section><h2>Why this checkpoint</h2><p>{_text(selection['reason'])}{early}</p></section>"


def _notes(result: Mapping[str, Any]) -> str:
    notes = "".join(f"<p>{_text(note)}.</p>" for note in result.get("notes") or [])
    return f"<section><h2>To know</h2>{notes}</section>" if notes else ""


def _figures(run: ReportData) -> str:
    figures = [
        _figure(
            run,
            plots.draw_losses,
            "Loss curves by step",
            "The three terms before their weights (×), the total with them. Thin: every step; thick: a running mean.",
        ),
        _figure(
            run,
            plots.draw_similarities,
            "Histograms of the similarity of matching pairs, before and after",
            "Matching pairs of the test split. Forget pairs should move left, retain pairs should stay.",
        ),
        _figure(
            run,
            partial(plots.draw_embeddings, moments=("before",)),
            "Map of image embeddings before unlearning",
            "Test images in the two main directions (principal components) of their features.",
        ),
        _figure(
            run,
            partial(plots.draw_embeddings, moments=("after",)),
            "Map of image embeddings after unlearning",
            "The same images after unlearning, in the same two directions and at the same scale.",
        ),
    ]
    content = "".join(figures)
    return f'<section><h2>What happened</h2><div class="pairs">{content}</div></section>' if content else ""


def _figure(run: ReportData, draw: Any, alt: str, caption: str) -> str:
    images = []
    for theme in (plots.LIGHT, plots.DARK):
        figure = draw(run, theme)
        if figure is None:
            return ""
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        images.append("data:image/png;base64," + base64.b64encode(plots.png(figure)).decode("ascii"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{images[1]}">'
        f'<img src="{images[0]}" width="{width}" height="{height}" alt="{_text(alt)}"></picture>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _classes(run: ReportData) -> str:
    rows, _ = plots.changed_classes(run.result)
    if not rows:
        return ""
    cells = [
        (
            name,
            row["set"],
            _count(row.get("pairs")),
            percent(row["before"]),
            percent(row["after"]),
            signed(100 * (row["after"] - row["before"]), 1),
        )
        for name, row in rows
    ]
    table = _table(
        ("class", "set", "pairs", "before", "after", "change"),
        cells,
        text_columns=2,
        row_classes=["" if row["set"] == "retain" else "forget" for _, row in rows],
    )
    figure = _figure(
        run,
        plots.draw_per_class,
        "Accuracy by class before and after; the table beside has the numbers",
        "Zero-shot accuracy on the test split: forget classes first, then the largest losses.",
    )
    card = f'<div class="card" tabindex="0">{table}</div>'  # scrolls, so the keyboard must reach it
    return f'<section><h2>By class</h2><div class="pairs">{figure}{card}</div></section>'


def _origin(result: Mapping[str, Any]) -> str:
    data, seconds = result.get("data") or {}, result.get("seconds") or {}
    skipped = data.get("skipped") or {}
    facts: list[tuple[str, Any]] = [
        ("Model", result.get("model")),
        ("Forget", _with_pairs(data.get("forget"), data.get("forget_pairs"))),
        ("Retain", _with_pairs(data.get("retain"), data.get("retain_pairs"))),
        ("Test", data.get("test")),
        ("Left out", _left_out(skipped)),
        ("Time", _durations(seconds)),
        ("Speed", _speed(number(result.get("pairs_per_second")))),
        ("Seed", result.get("seed")),
        ("Data fingerprint", data.get("fingerprint")),
        (
            "Versions",
            ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items()),
        ),
    ]
    known = [(name, value) for name, value in facts if value not in (None, "")]
    config = result.get("config") or {}
    content = _facts(known) if known else ""
    if config:
        settings = [(name, value) for name, value in config.items()]
        content += f"<details><summary>All {len(settings)} settings</summary>{_facts(settings)}</details>"
    return f"<section><h2>How it was made</h2>{content}</section>" if content else ""


def _with_pairs(name: Any, pairs: Any) -> str | None:
    if name is None:
        return None
    return str(name) if pairs is None else f"{name} ({_count(pairs)} training pairs)"


def _left_out(skipped: Mapping[str, Any]) -> str | None:
    return "; ".join(left_out_lines(skipped)) or None


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


def _count(value: Any) -> str:
    return "" if number(value) is None else f"{value:,.0f}"


def _facts(items: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in items)
    return f"<dl>{rows}</dl>"


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: int = 1,
    row_classes: Sequence[str] | None = None,
) -> str:
    """The first `text_columns` columns are texts, the others numbers, aligned to the right."""

    def kind(index: int) -> str:
        return "" if index < text_columns else ' class="n"'

    head = "".join(f'<th scope="col"{kind(index)}>{_text(column)}</th>' for index, column in enumerate(columns))
    body = []
    for position, row in enumerate(rows):
        name = row_classes[position] if row_classes else ""
        cells = "".join(
            f'<th scope="row">{_breakable(text)}</th>' if index == 0 else f"<td{kind(index)}>{_text(text)}</td>"
            for index, text in enumerate(row)
        )
        body.append(f'<tr class="{name}">{cells}</tr>' if name else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _breakable(name: str) -> str:
    """Escaped. Lines break at spaces, and inside a word only where it is too long for a phone."""
    words = ([word[at : at + _LONG_WORD] for at in range(0, len(word), _LONG_WORD)] for word in str(name).split(" "))
    return " ".join("<wbr>".join(map(_text, pieces)) for pieces in words)


def _text(value: Any) -> str:
    return escape(str(value), quote=True)
