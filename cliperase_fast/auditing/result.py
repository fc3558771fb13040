"""What `audit()` returns."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable_data
from cliperase_fast.storage import write_text_atomically, writing

FORMAT = 1


@dataclass(frozen=True, repr=False)
class Audit:
    """The scores of the models, side by side.

    scores: scores[model][group][score] is {"value", "low", "high"} with a 95 % interval, and for some scores more keys
        ("class", "variant", "reason" where the value is None, ...). Models: "before", "after", with oracles "oracle"
        (their mean) and "oracle 1", "oracle 2", ...; groups: "forgetting", "collateral", "depth".
    gap: by score |after - target|, the target being the mean of the oracles; "mean" over association,
        retain_association, image_side, text_side and retain_top1; "floor", the mean gap between two oracles (None with
        one); "floors", the same by score; "tug_of_war". None without oracles.
    background: the association of unrelated pairs in the original, which is the reference without oracles.
    over_forgotten: whether the association lies below what not knowing explains; None where that cannot be told.
    verdicts: what the scores say, by group. notes: what to know about the audit, such as a missing test split.
    data: names and sizes of the sets.
    """

    scores: dict[str, dict[str, dict[str, dict[str, Any]]]]
    gap: dict[str, Any] | None
    background: float | None
    over_forgotten: bool | None
    verdicts: dict[str, str]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Audit: {self.verdicts['forgetting']}>"

    def to_dict(self) -> dict[str, Any]:
        """What `audit.json` holds."""
        return {
            "format": FORMAT,
            "scores": self.scores,
            "gap": self.gap,
            "background": self.background,
            "over_forgotten": self.over_forgotten,
            "verdicts": self.verdicts,
            "notes": self.notes,
            "data": self.data,
        }

    def summary(self) -> str:
        """The verdicts, a table of all scores in plain text, and the notes."""
        shown = [name for name in ("before", "after", "oracle") if name in self.scores]
        rows = [["", *shown]]
        for group, after in self.scores["after"].items():
            rows.append([group, *[""] * len(shown)])
            rows += [
                [f"  {score}", *(_cell(self.scores[name][group].get(score, {})) for name in shown)] for score in after
            ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*self.verdicts.values(), "", *(line.rstrip() for line in lines), *self.notes])

    def save(self, directory: str | Path) -> Path:
        """Write `audit.json`; returns the folder. Raises InputError where the folder cannot be made."""
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the audit cannot be saved to {directory} ({error.strerror}): give a folder that can be written to"
            ) from error
        with writing(directory / "audit.json"):
            text = json.dumps(printable_data(self.to_dict()), indent=2, allow_nan=False)
            write_text_atomically(directory / "audit.json", text + "\n")
        return directory


def _cell(found: dict[str, Any]) -> str:
    if found.get("value") is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
