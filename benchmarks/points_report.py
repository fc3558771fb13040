"""Make tables from a record of `memory` or `scaling`: a row for each N, a column for each provider, and the growth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .batches import Case
from .compare import MIB, Row
from .loss_report import by_case, text
from .records import Table

_FITTED = 3  # points, at the least

KINDS = {"memory": ("peak extra memory, MiB", "extra_bytes"), "time": ("a step (forward and backward), ms", "both_ms")}


def value(row: Row | None, measure: str) -> float | None:
    """As it is shown: MiB or median milliseconds; None where it was not measured."""
    if row is None or row["status"] != "ok" or row.get(measure) is None:
        return None
    return row[measure]["median"] if isinstance(row[measure], Mapping) else row[measure] / MIB


def groups(record: Mapping[str, Any]) -> dict[Case, dict[int, dict[str, Row]]]:
    """N -> provider -> row, for each case without its N."""
    found: dict[Case, dict[int, dict[str, Row]]] = {}
    for case, rows in by_case(record):
        found.setdefault(replace(case, n=0), {})[case.n] = rows
    return found


def growth(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(e, N from which on) of a fit y = a N^e, by least squares of the logarithms over the larger half of the sizes.

    At least three points; None where there are fewer. At small N what a call costs by itself hides the growth.
    """
    points = sorted((n, y) for n, y in points if y > 0)
    points = points[-max(_FITTED, math.ceil(len(points) / 2)) :]
    if len(points) < _FITTED:
        return None
    x, y = ([math.log(pair[i]) for pair in points] for i in range(2))
    middle = sum(x) / len(x)
    slope = sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    return slope, points[0][0]


def grid(sizes: Mapping[int, Mapping[str, Row]], measure: str) -> Table:
    """Return the table of one measure, without providers that were not measured; the last row is `growth`."""
    names = [
        name for name in dict.fromkeys(name for rows in sizes.values() for name in rows)
        if any(value(rows.get(name), measure) is not None for rows in sizes.values())
    ]  # fmt: skip
    lines: list[Sequence[str]] = []
    for n, rows in sorted(sizes.items()):
        cells = [value(rows.get(name), measure) for name in names]
        lines.append((f"{n:,}", *("-" if cell is None else f"{cell:,.1f}" for cell in cells)))
    fits = []
    for name in names:
        points = [(n, found) for n, rows in sizes.items() if (found := value(rows.get(name), measure)) is not None]
        fit = growth(points)
        fits.append("" if fit is None else f"N^{fit[0]:.2f} from {fit[1]:,} on")
    if any(fits):
        lines.append(("grows as", *fits))
    return ("N", *names), lines


def reasons(sizes: Mapping[int, Mapping[str, Row]]) -> list[str]:
    """Return which providers were left out of which sizes, and why."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for n, rows in sorted(sizes.items()):
        for name, row in rows.items():
            if row["status"] != "ok":
                found.setdefault((name, row["status"], row["reason"]), []).append(n)
    lines = []
    for (name, status, reason), ns in found.items():
        where = "" if len(ns) == len(sizes) else f" at N = {', '.join(f'{n:,}' for n in ns)}"
        lines.append(f"{name}{where}: {'failed, ' if status == 'failed' else ''}{reason}")
    return lines


def title(group: Case) -> str:
    return f"{group.loss}, {group.data} data, {group.dtype}, D = {group.width}"


def full_text(record: Mapping[str, Any]) -> str:
    parts = []
    for group, sizes in groups(record).items():
        for label, measure in KINDS.values():
            table = grid(sizes, measure)
            if len(table[0]) > 1:
                parts.append(f"{title(group)}: {label}\n{text(table)}")
        parts += ["\n".join(reasons(sizes))] if reasons(sizes) else []
    return "\n\n".join(parts)
