"""Tables of scores for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cliperase_fast.evaluation.metrics import COSINE, Format
from cliperase_fast.plurals import counted, more_classes
from cliperase_fast.reading import display_width, visible
from cliperase_fast.report.audit_scores import find_score
from cliperase_fast.report.wording import (
    cell,
    change,
    difference,
    interval,
    number,
    percent,
    shown_metrics,
    value,
    written,
)

_ASCII = str.maketrans({"−": "-", "–": "-", "─": "-", "→": ">", "…": "~"})
_LONGEST_NAME = 26  # letters of a score's name in the audit's table


def text_table(
    before: Mapping[str, Any], after: Mapping[str, Any] | None = None, *, unicode: bool | None = None
) -> str:
    """Write the scores of each set side by side. Changes of percentages are in percentage points.

    before, after: what `evaluate()` returns, or "before" and "after" of `result.json`. Without `after`
    (an evaluation alone) each set has one column.
    unicode: use rules and minus signs beyond ASCII; None: if standard output can encode them.
    """
    sets = [name for name in ("all", "forget", "retain") if name in before]
    columns = ["before", "after", "change"] if after is not None else ["score"]
    metrics = shown_metrics(*(scores[name] for scores in (before, after) if scores is not None for name in sets))

    blocks = []  # for each set: its rows of texts
    for name in sets:
        rows = [columns]
        for metric in metrics:
            old = value(metric, before[name])
            if after is None:
                rows.append([cell(metric, old)])
            else:
                new = value(metric, after[name])
                rows.append([cell(metric, old), cell(metric, new), change(metric, old, new)])
        blocks.append(rows)
    headings = [f"{name} ({counted(before[name]['pairs'], 'pair')})" for name in sets]

    labels = ["", *(metric.label for metric in metrics)]
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
    return shown("\n".join(line.rstrip() for line in lines), unicode)


def audit_table(content: Mapping[str, Any], *, unicode: bool | None = None) -> str:
    """Write an audit's scores by group: before and after with 95% intervals, the oracles' mean, the gap to it and the
    noise floor.

    content: what audit.json holds. unicode: as in `text_table`.
    """
    scores, gap = content["scores"], content.get("gap") or {}
    floors = gap.get("floors") or {}
    columns = ["before", "after", *(["oracles", "gap"] if gap else []), *(["floor"] if floors else [])]
    rows = [["", *columns]]
    for group, after in scores["after"].items():
        rows.append([group, *[""] * len(columns)])
        for score in after:
            form = find_score(score).format
            found = [(scores[model].get(group) or {}).get(score) or {} for model in ("before", "after")]
            row = [f"  {_cut(score)}", *(_with_interval(one, form) for one in found)]
            if gap:
                target = ((scores.get("oracle") or {}).get(group) or {}).get(score) or {}
                row += [written(number(target.get("value")), form), difference(number(gap.get(score)), form)]
            rows.append(row + ([difference(number(floors.get(score)), form)] if floors else []))
    if gap:
        ends = (gap.get("mean"), *([gap.get("floor")] if floors else []))
        rows.append(["mean gap", "", "", "", *(difference(number(end), COSINE) for end in ends)])
    return shown("\n".join(aligned(rows)), unicode)


def _with_interval(found: Mapping[str, Any], form: Format) -> str:
    low, high = (number(found.get(end)) for end in ("low", "high"))
    return f"{written(number(found.get('value')), form)} {interval(low, high, form)}".rstrip()


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1].rstrip() + "…"


def class_table(per_class: Mapping[str, Mapping[str, Any]], *, limit: int = 20, unicode: bool | None = None) -> str:
    """Write the accuracy of each class, forget classes first, then the lowest: at most `limit` rows.

    per_class: from the result of `evaluate()`. Returns an empty text for data without classes.
    """
    order = {"forget": 0, "mixed": 1}
    rows = sorted(per_class.items(), key=lambda item: (order.get(item[1]["set"], 2), item[1]["accuracy"], item[0]))
    texts = [("class", "set", "pairs", "accuracy")]
    texts += [(visible(name), row["set"], str(row["pairs"]), percent(row["accuracy"])) for name, row in rows[:limit]]
    if len(texts) == 1:
        return ""
    lines = aligned(texts, left=2, gap=3)
    if len(rows) > limit:
        lines.append(f"and {more_classes(len(rows) - limit)} (--json lists all)")
    if unicode is None:
        unicode = _encodable("".join(lines), getattr(sys.stdout, "encoding", None))
    text = "\n".join(lines)
    return text if unicode else text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def aligned(rows: Sequence[Sequence[str]], left: int = 1, gap: int = 2) -> list[str]:
    """Return the lines of a table, with a rule below its headings.

    left: how many columns are flush left, the others are flush right. gap: spaces between columns.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - display_width(text)) for text, width in zip(row, widths, strict=True)]
        cells = [text + space for text, space in zip(row[:left], spaces, strict=False)]
        cells += [space + text for text, space in zip(row[left:], spaces[left:], strict=True)]
        lines.append((" " * gap).join(cells).rstrip())
    return [lines[0], "─" * max(map(display_width, lines)), *lines[1:]]


def _widths(block: list[list[str]], heading: str) -> list[int]:
    widths = [max(len(text) for text in column) for column in zip(*block, strict=True)]
    widths[0] += max(0, len(heading) - _total(widths))
    return widths


def _total(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _headings(headings: list[str], blocks: list[list[list[str]]]) -> list[str]:
    return [heading.rjust(_total(_widths(block, heading))) for heading, block in zip(headings, blocks, strict=True)]


def shown(text: str, unicode: bool | None) -> str:
    """Return the text without signs beyond ASCII, unless `unicode`, or with None if standard output can encode them."""
    if unicode is None:
        unicode = _encodable("−–─…", getattr(sys.stdout, "encoding", None))
    return text if unicode else text.translate(_ASCII)


def _encodable(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
