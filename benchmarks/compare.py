"""Compare two records of the same benchmark.

The numbers of a row are those with quartiles, {"median", "q1", "q3"}, and those named *_bytes; its strings and integers
identify the case. The band is the noise of both records: half the spread of the quartiles, or of the medians of
repeated runs if that is larger. It is at least 3 % (memory: 3 % and 1 MiB), and 10 % for times from one process each,
which do not show the variation between processes. Changes within the band count as equal. The noise of one sample is
unknown, so it gets no verdict. Times are also compared relative to the floor of their own run, if there is one, which
is independent of the machine's speed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .records import Table
from .timing import summary

Row = Mapping[str, Any]

FLOOR = "floor"
MIB = 1 << 20
_LEAST_BAND = 0.03  # a change smaller than this is never called one
_LEAST_OF_ONE_RUN = 0.10
_NO_CASE = ("status", "reason", "note")
_PARTS = ("forward_ms", "backward_ms")  # of both_ms, which says enough
_HEAD = ("case", "provider", "of", "before", "after", "after/before", "of their floors", "band", "")


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    kinds = [_kind(record) for record in (before, after)]
    if kinds[0] != kinds[1]:
        raise SystemExit(f"the one is a record of bench {kinds[0]}, the other of bench {kinds[1]}")
    then, now = ({_key(row): row for row in _rows(record)} for record in (before, after))
    lines: list[Sequence[str]] = []
    for key in [*then, *(key for key in now if key not in then)]:
        lines += _changes(key, then, now)
    return _HEAD, lines


def _kind(record: Mapping[str, Any]) -> str:
    return record.get("benchmark", "train" if any("who" in run for run in record["runs"]) else "loss")


def _rows(record: Mapping[str, Any]) -> Sequence[Row]:
    """A row for each case. A record of `train` has several runs of one: its steps are put together."""
    if _kind(record) != "train":
        return record["runs"]
    together: dict[tuple[str, str], list[Row]] = {}
    for run in record["runs"]:
        together.setdefault((run["who"], run["setting"]), []).append(run)
    return [
        {
            "provider": who,
            "setting": setting,
            "step_ms": {
                **summary([seconds for run in runs for seconds in run["step_seconds"]]),
                "runs": [1e3 * statistics.median(run["step_seconds"]) for run in runs],
            },
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        }
        for (who, setting), runs in together.items()
    ]


def _changes(key: tuple[Any, ...], then: dict[Any, Row], now: dict[Any, Row]) -> Iterator[Sequence[str]]:
    case, name = ", ".join(f"{field} {value}" for field, value in key[1:]), key[0]
    old, new = then.get(key), now.get(key)
    states = [row.get("status", "ok") if row is not None else "not run" for row in (old, new)]
    if old is None or new is None or states != ["ok", "ok"]:
        if states[0] != states[1]:
            yield (case, name, "", *states, "", "", "", "changed")
        return
    for measure in [name for name in old if name in new and _measured(name, old) and _measured(name, new)]:
        middle, band = _middle(old, measure), _band(old, new, measure)
        change = _middle(new, measure) / middle if middle else float("inf")
        if measure.endswith("_bytes"):
            band = max(band, MIB / middle) if middle else float("inf")
        relative = ""
        floors = [floor for rows in (then, now) if measure in (floor := rows.get((FLOOR, *key[1:]), {}))]
        if measure.endswith("_ms") and len(floors) == 2:
            relative = f"{change * _middle(floors[0], measure) / _middle(floors[1], measure):.3f}"
        word = "same" if abs(change - 1) <= band else "more" if change > 1 else "less"
        word = {"more": "slower", "less": "faster"}.get(word, word) if measure.endswith(("_ms", "_seconds")) else word
        noise = f"±{100 * band:.0f} %"
        if any(_single(row, measure) for row in (old, new)):
            noise, word = "not known", "measured once"
        shown = [_shown(row, measure) for row in (old, new)]
        yield (case, name, measure, *shown, f"{change:.3f}", relative, noise, word)


def _measured(name: str, row: Row) -> bool:
    value = row[name]
    summary = isinstance(value, Mapping) and {"median", "q1", "q3"} <= value.keys()
    return name not in _PARTS and (summary or (name.endswith("_bytes") and value is not None))


def _key(row: Row) -> tuple[Any, ...]:
    """(provider or name, the other fields that say which case this is)."""
    fields = {
        name: value
        for name, value in row.items()
        if isinstance(value, (str, int)) and name not in _NO_CASE and not name.endswith("_bytes")
    }
    name = fields.pop("provider", None) or fields.pop("name", "")
    return name, *fields.items()


def _middle(row: Row, measure: str) -> float:
    value = row[measure]
    return value["median"] if isinstance(value, Mapping) else value


def _band(old: Row, new: Row, measure: str) -> float:
    timed = isinstance(old[measure], Mapping)
    repeated = all(len(row[measure].get("runs", ())) > 1 for row in (old, new)) if timed else True
    return max(_LEAST_BAND if repeated else _LEAST_OF_ONE_RUN, _spread(old, measure) + _spread(new, measure))


def _spread(row: Row, measure: str) -> float:
    value = row[measure]
    if not isinstance(value, Mapping) or not value["median"]:
        return 0.0
    runs = value.get("runs") or [value["median"]]
    return max(value["q3"] - value["q1"], max(runs) - min(runs)) / 2 / value["median"]


def _single(row: Row, measure: str) -> bool:
    value = row[measure]
    return isinstance(value, Mapping) and value.get("samples") == 1


def _shown(row: Row, measure: str) -> str:
    value = _middle(row, measure)
    return f"{value / MIB:.1f} MiB" if measure.endswith("_bytes") else f"{value:.4g}"
