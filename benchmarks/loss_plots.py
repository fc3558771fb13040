"""Pictures of a record of `benchmarks.loss`: time, memory and TFLOP/s against N."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .batches import Case
from .loss_report import FLOOR, MIB, Row, by_case, milliseconds


def _time(case: Case, row: Row) -> float | None:
    return milliseconds(row)


def _memory(case: Case, row: Row) -> float | None:
    return row["extra_bytes"] / MIB if row.get("extra_bytes") is not None else None


def _rate(case: Case, row: Row) -> float | None:
    ms = milliseconds(row)
    return None if ms is None else case.flop / ms / 1e9


_KINDS: dict[str, tuple[str, Callable[[Case, Row], float | None]]] = {
    "time": ("forward and backward, ms", _time),
    "memory": ("peak extra memory, MiB", _memory),
    "rate": ("TFLOP/s of the products needed", _rate),
}


def draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """A PNG for each kind, loss, data, dtype and width; those with nothing measured are left out."""
    groups: dict[Case, list[tuple[Case, dict[str, Row]]]] = {}
    for case, rows in by_case(record):
        groups.setdefault(replace(case, n=0), []).append((case, rows))
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for group, members in groups.items():
        for kind, (label, value) in _KINDS.items():
            lines: dict[str, list[tuple[int, float]]] = {}
            for case, rows in sorted(members, key=lambda member: member[0].n):
                for name, row in rows.items():
                    if (y := value(case, row)) is not None:
                        lines.setdefault(name, []).append((case.n, y))
            if not lines:
                continue
            figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
            for name, points in lines.items():
                x, y = zip(*points, strict=True)
                style = {"color": "black", "linestyle": ":"} if name == FLOOR else {"marker": "o"}
                axes.plot(x, y, label=name, **style)
            axes.set(
                xscale="log", yscale="linear" if kind == "rate" else "log", xlabel="N, pairs", ylabel=label,
                title=f"{group.loss}, {group.data} data, {group.dtype}, D = {group.width}",
            )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=8)
            path = folder / f"{kind}-{group.loss}-{group.data}-{group.dtype}-{group.width}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            drawn.append(path)
    return drawn
