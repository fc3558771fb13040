"""The figures of benchmarks/results/ledger.json, for docs/ledger.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Part = str | tuple[Sequence[str], Sequence[Sequence[str]]]  # a text, or a table's head and rows

NOT_MEASURED = "Not measured yet: `python -m benchmarks.ledger shapes`, `towers`, `kills`, `ranks`."
_WAYS = {"exact": "exactly", "prepared": "as prepared", "replay": "by replaying", "merge": "by merging"}


def figures(file: Path, table: Callable[..., str], provenance: Callable[[dict[str, Any]], str]) -> str:
    """Return the text for the page.

    file: the record. table, provenance: write a table, and where a part was measured.
    """
    if not file.exists():
        return NOT_MEASURED
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    shown = [table(*part) if isinstance(part, tuple) else part for part in section(parts)]
    return "\n\n".join([*shown, *(provenance(part) for part in parts.values())])


def section(parts: Mapping[str, Any]) -> list[Part]:
    """Return texts and tables. parts: of the record."""
    found: list[Part] = []
    for name, model in _MODELS.items():
        if "after" in parts.get(name, {}):
            found += _study(parts[name], model)
    if "kills" in parts:
        kills = parts["kills"]
        found.append(
            f"**Killed sessions.** {kills['same_head']} of {kills['kills']} ended with the head of a session that was "
            f"left alone; {kills['too_late']} of them were done before they were to be killed."
        )
    if "ranks" in parts:
        ranks = parts["ranks"]
        same = ", ".join(ranks["same_weights"]) or "none"
        found.append(
            f"**On {ranks['ranks']} ranks.** {len(ranks['two_ranks'])} requests in a row, after the last one. Requests "
            f"that left the same bits in the weights as in one process: {same}."
        )
        found.append((_HEAD, list(_ranks(ranks))))
    return found or [NOT_MEASURED]


_MODELS = {"shapes": "a small CLIP that knows a hundred shapes", "towers": "two pretrained towers"}
_HEAD = ("", "forget top-1", "association", "background", "retain top-1", "at the target")


def _study(study: Mapping[str, Any], model: str) -> Iterator[Part]:
    last = list(study["requests"].values())[-1]["audits"]
    after = study["after"]
    kept, change = "within" if after["within_floor"] else "below", 100 * after["retain_change"]
    yield (
        f"**{len(last)} requests in a row on {model}.** After the last one {len(after['at_target'])} of {len(last)} "
        f"are at the target; the retain accuracy changed by {change:+.1f} points at worst, {kept} the floor of 2:"
    )
    yield _HEAD, [(name, *_cells(audit), "yes" if audit["at_target"] else "no") for name, audit in last.items()]
    deltas = [request["delta"] for request in study["requests"].values()]
    small, large = (end(delta["bytes"] for delta in deltas) / 2**20 for end in (min, max))
    whole = deltas[0]["whole_bytes"] / 2**20
    yield f"A delta takes {small:.1f} to {large:.1f} MiB, where the changed tensors have {whole:.1f} MiB."
    undone = list(study["undo"].values())
    if undone:
        yield "**Undone, each in a copy.** The undone concept in the base and after undoing, and the other requests:"
        yield (
            ("request", "how", "images", "top-1, base", "undone", "association, base", "undone", "retain top-1, base",
             "undone", "others at the target"),
            [
                (
                    one["undone"], _WAYS[one["how"]], str(one["concept"]["forget_pairs"]),
                    *(_percent(one["concept"]["forget_top1"][state]) for state in ("base", "now")),
                    *(f"{one['concept']['association'][state]:.3f}" for state in ("base", "now")),
                    *(_percent(one["concept"]["retain_top1"][state]) for state in ("base", "now")),
                    f"{sum(bool(audit['at_target']) for audit in one['others'].values())} of {len(one['others'])}",
                )
                for one in undone
            ],
        )  # fmt: skip
        for how, pooled in study.get("pooled", {}).items():
            base, now = (_percent(pooled[state]) for state in ("base", "now"))
            yield (
                f"Undone {_WAYS[how]}, pooled over {pooled['images']} test images: {base} in the base, {now} after "
                f"undoing, a change of {100 * (pooled['now'] - pooled['base']):+.1f} points."
            )
    replayed = [one for one in undone if one["how"] == "replay" and one.get("bits_of_prepared") is not None]
    if replayed:
        same = sum(one["bits_of_prepared"] for one in replayed)
        yield f"{same} of {len(replayed)} replays ended with the same bits as what had been prepared."


def _ranks(ranks: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, audit in ranks["two_ranks"].items():
        for who, found in ((f"{ranks['ranks']} ranks", audit), ("one process", ranks["one_process"][name])):
            yield f"{name}, {who}", *_cells(found), "yes" if found["at_target"] else "no"


def _cells(audit: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{_percent(audit['forget_top1']['base'])} → {_percent(audit['forget_top1']['now'])}",
        f"{audit['association']['base']:.3f} → {audit['association']['now']:.3f}",
        f"{audit['background']:.3f}",
        f"{_percent(audit['retain_top1']['base'])} → {_percent(audit['retain_top1']['now'])}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
