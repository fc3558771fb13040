"""The before/after table of the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cliperase_fast.report.wording import METRICS, cell, change, number, shown_metrics

_ASCII = str.maketrans({"−": "-", "–": "-", "─": "-", "→": ">"})


def text_table(
    before: Mapping[str, Any], after: Mapping[str, Any] | None = None, *, unicode: bool | None = None
) -> str:
    """Scores of each set side by side, aligned, in percent; a change is in percentage points.

    before, after: what `evaluate()` returns, or "before" and "after" of `result.json`. Without `after` (an
    evaluation by itself) each set has one column.
    unicode: rules and minus signs beyond ASCII; None asks whether standard output can encode them.
    """
    if unicode is None:
        unicode = _encodable("−–─", getattr(sys.stdout, "encoding", None))
    sets = [name for name in ("all", "forget", "retain") if name in before]
    columns = ["before", "after", "change"] if after is not None else ["score"]
    shown = shown_metrics(*(scores[name] for scores in (before, after) if scores is not None for name in sets))

    blocks = []  # for each set: its rows of texts
    for name in sets:
        rows = [columns]
        for metric in shown:
            old = number(before[name].get(metric))
            if after is None:
                rows.append([cell(metric, old)])
            else:
                new = number(after[name].get(metric))
                rows.append([cell(metric, old), cell(metric, new), change(metric, old, new)])
        blocks.append(rows)
    headings = [f"{name} ({before[name]['pairs']} pairs)" for name in sets]

    labels = ["", *(METRICS[metric] for metric in shown)]
    left = max(len(label) for label in labels)
    lines = ["".join(["".ljust(left), *(f"   {heading}" for heading in _headings(headings, blocks))])]
    for row, label in enumerate(labels):
        texts = [label.ljust(left)]
        for heading, block in zip(headings, blocks, strict=True):
            widths = _widths(block, heading)
            texts.append("   " + "  ".join(text.rjust(width) for text, width in zip(block[row], widths, strict=True)))
        lines.append("".join(texts))
    rule = "─" * max(len(line) for line in lines)
    lines.insert(2, rule)
    text = "\n".join(line.rstrip() for line in lines)
    return text if unicode else text.translate(_ASCII)


def _widths(block: list[list[str]], heading: str) -> list[int]:
    widths = [max(len(text) for text in column) for column in zip(*block, strict=True)]
    widths[0] += max(0, len(heading) - _total(widths))
    return widths


def _total(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _headings(headings: list[str], blocks: list[list[list[str]]]) -> list[str]:
    return [heading.rjust(_total(_widths(block, heading))) for heading, block in zip(headings, blocks, strict=True)]


def _encodable(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
