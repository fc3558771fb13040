"""Tables from a record of `benchmarks.loss`: rows for the terminal and the docs, targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .batches import Case
from .compare import FLOOR, MIB, Row
from .records import Table

_CASE = ("loss", "data", "dtype", "n", "width")
_BASELINE = {True: ("open_clip-compiled", "open_clip-style-compiled"), False: ("open_clip", "open_clip-style")}

# One H200, bfloat16, D = 768, RM + FM + CM forward and backward: (N, milliseconds at most, times the floor at most)
GPU_TARGETS = ((32_768, 20.0, 1.5), (65_536, 80.0, 1.5), (262_144, None, 1.6))
_EXTRA_BYTES, _OVER_COMPILED, _OVER_EAGER = 256 * MIB, 2.0, 4.0


def case_of(row: Row) -> Case:
    return Case(*(row[name] for name in _CASE))


def by_case(record: Mapping[str, Any]) -> Iterator[tuple[Case, dict[str, Row]]]:
    cases: dict[Case, dict[str, Row]] = {}
    for row in record["runs"]:
        cases.setdefault(case_of(row), {})[row["provider"]] = row
    yield from cases.items()


def milliseconds(row: Row | None) -> float | None:
    """Median of forward and backward; None where it was not timed."""
    return row["both_ms"]["median"] if row is not None and row["status"] == "ok" else None


def baseline(rows: Mapping[str, Row], compiled: bool) -> float | None:
    """Milliseconds of open_clip's losses, or of the same formulas where it was not installed."""
    return next((ms for name in _BASELINE[compiled] if (ms := milliseconds(rows.get(name))) is not None), None)


def ratio(over: float | None, under: float | None) -> str:
    return "" if over is None or under is None else f"{over / under:.2f}x"


def case_table(case: Case, rows: Mapping[str, Row]) -> Table:
    head = (
        "provider", "forward", "backward", "both, ms", "quartiles", "floor/time", "TFLOP/s", "against compiled",
        "extra MiB", "worst error", "",
    )  # fmt: skip
    compiled, floor = baseline(rows, compiled=True), milliseconds(rows.get(FLOOR))
    lines: list[Sequence[str]] = []
    for name, row in rows.items():
        error = f"{row['error']:.0e}" if row.get("error") is not None else ""
        if row["status"] != "ok":
            lines.append((name, *[""] * 8, error, f"{row['status']}: {row['reason']}"))
            continue
        times, both = [row[f"{part}_ms"]["median"] for part in ("forward", "backward")], row["both_ms"]
        lines.append(
            (
                name,
                *(f"{value:.2f}" for value in (*times, both["median"])),
                f"{both['q1']:.2f}-{both['q3']:.2f}",
                "" if floor is None else f"{100 * floor / both['median']:.0f} %",
                f"{case.flop / both['median'] / 1e9:.2f}",
                ratio(compiled, both["median"]),
                "" if row.get("extra_bytes") is None else f"{row['extra_bytes'] / MIB:.1f}",
                error,
                row.get("note", ""),
            )
        )
    return head, lines


def targets_table(record: Mapping[str, Any]) -> Table:
    """The targets for one H200, a line for each of our providers; every cell says whether it is met."""
    head = ("N", "provider", "time", "of the floor", "extra memory", "torch.compile", "eager")
    found = dict(by_case(record))
    lines: list[Sequence[str]] = []
    for n, most_ms, most_floor in GPU_TARGETS:
        rows = found.get(Case("cliperase", "peaked", "bfloat16", n, 768))
        if rows is None:
            lines.append((f"{n:,}", "not run", "", "", "", "", ""))
            continue
        floor, compiled, eager = milliseconds(rows.get(FLOOR)), baseline(rows, True), baseline(rows, False)
        allowed = _EXTRA_BYTES + 4 * n * 768 * 2 + 2 * (n // 8) * 768 * 2
        for name, row in rows.items():
            if name.startswith("ours-") and row["status"] == "failed":
                lines.append((f"{n:,}", name, f"failed: {row['reason']}", "", "", "", ""))
            if not name.startswith("ours-") or (ms := milliseconds(row)) is None:
                continue
            extra = row.get("extra_bytes")
            lines.append(
                (
                    f"{n:,}",
                    name,
                    f"{ms:.1f} ms" + ("" if most_ms is None else _verdict(ms <= most_ms, f"at most {most_ms:.0f}")),
                    _against(ms, floor, most_floor, at_most=True),
                    ""
                    if extra is None
                    else f"{extra / MIB:.0f} MiB" + _verdict(extra <= allowed, f"at most {allowed / MIB:.0f}"),
                    _against(compiled, ms, _OVER_COMPILED, at_most=False),
                    _against(eager, ms, _OVER_EAGER, at_most=False),
                )
            )
    for case, rows in found.items():
        if case.loss != "clip" or case.data != "peaked":
            continue
        times = {name: ms for name, row in rows.items() if name != FLOOR and (ms := milliseconds(row)) is not None}
        ours = {name: ms for name, ms in times.items() if name.startswith("ours-")}
        others = {name: ms for name, ms in times.items() if name not in ours}
        if ours and others:
            best, rival = min(ours, key=ours.__getitem__), min(others, key=others.__getitem__)
            versus = f"{ours[best]:.1f} ms; fastest other is {rival}, {others[rival]:.1f} ms"
            verdict = _verdict(ours[best] < others[rival], "faster than all")
            lines.append((f"{case.n:,}", f"{best}, clip_loss", versus + verdict, "", "", "", ""))
    return head, lines


def _against(over: float | None, under: float | None, bound: float, at_most: bool) -> str:
    if over is None or under is None:
        return "nothing to compare with"
    value = over / under
    words = f"{'at most' if at_most else 'at least'} {bound:g}"
    return f"{value:.2f}x" + _verdict(value <= bound if at_most else value >= bound, words)


def _verdict(met: bool, bound: str) -> str:
    return f" ({bound}: {'met' if met else 'NOT MET'})"


def speedup_tables(record: Mapping[str, Any]) -> dict[str, Table]:
    """How many times faster "ours-auto" is than open_clip's losses, compiled and eager: by dtype and loss, N by D."""
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for case, rows in by_case(record):
        own = milliseconds(rows.get("ours-auto"))
        pair = [ratio(baseline(rows, compiled), own) or "-" for compiled in (True, False)]
        if own is not None and case.loss != "calibrated":  # open_clip has no such loss
            title = f"{case.loss}, {case.data} data, {case.dtype}"
            cells.setdefault(title, {})[case.n, case.width] = " / ".join(pair)
    return {title: _sizes_by_widths(of) for title, of in cells.items()}


def own_dtype_tables(record: Mapping[str, Any]) -> dict[str, Table]:
    """How many times faster "ours-auto" is with bfloat16 features than with float32 ones: for each loss, N by D."""
    times = {case: ms for case, rows in by_case(record) if (ms := milliseconds(rows.get("ours-auto"))) is not None}
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for case, ms in times.items():
        single = times.get(replace(case, dtype="float32"))
        if case.dtype == "bfloat16" and single is not None:
            title = f"{case.loss}, {case.data} data, our bfloat16 against our float32"
            cells.setdefault(title, {})[case.n, case.width] = ratio(single, ms)
    return {title: _sizes_by_widths(of) for title, of in cells.items()}


def beside_cliperase_tables(record: Mapping[str, Any]) -> dict[str, Table]:
    """Return the time of the calibrated loss over that of `cliperase_loss`: for each dtype and kind of data, N by D."""
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for case, rows in by_case(record):
        if over := _over_cliperase(rows):
            cells.setdefault(f"{case.data} data, {case.dtype}", {})[case.n, case.width] = over
    return {title: _sizes_by_widths(of) for title, of in cells.items()}


def _sizes_by_widths(cells: Mapping[tuple[int, int], str]) -> Table:
    sizes, widths = sorted({n for n, _ in cells}), sorted({width for _, width in cells})
    lines = [(f"{n:,}", *(cells.get((n, width), "") for width in widths)) for n in sizes]
    return ("N", *(f"D = {width}" for width in widths)), lines


def text(table: Table) -> str:
    """For a terminal: columns padded, empty ones left out."""
    head, lines = table
    used = [i for i, title in enumerate(head) if i == 0 or any(line[i] for line in lines)]
    widths = [max(len(cells[i]) for cells in (head, *lines)) for i in used]
    return "\n".join(
        "  ".join(cells[i].ljust(width) for i, width in zip(used, widths, strict=True)).rstrip()
        for cells in (head, *lines)
    )


def full_text(record: Mapping[str, Any]) -> str:
    parts = [f"{case}\n{text(case_table(case, rows))}{_beside_cliperase(rows)}" for case, rows in by_case(record)]
    return "\n\n".join(parts)


def _beside_cliperase(rows: Mapping[str, Row]) -> str:
    """Return a line with the time of the calibrated loss over that of `cliperase_loss`, if both were timed."""
    over = _over_cliperase(rows)
    return f"\nours-auto takes {over} the time of cliperase_loss with as many rows" if over else ""


def _over_cliperase(rows: Mapping[str, Row]) -> str:
    return ratio(milliseconds(rows.get("ours-auto")), milliseconds(rows.get("ours-cliperase")))
