"""What `audit()` returns."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError
from cliperase_fast.reading import printable_data, read_text, user_path
from cliperase_fast.report import audit_page, audit_table
from cliperase_fast.storage import make_folder, write_text_atomically, writing

FORMAT = 1
FILE, PAGE = "audit.json", "audit.html"
_LARGEST = 1 << 28  # bytes of a file that is read
_ALWAYS = ("scores", "gap", "background", "over_forgotten", "verdicts")  # keys of every audit.json
_LATER = ("notes", "data", "over_forgotten_below", "evidence")  # keys that older ones may lack


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
    over_forgotten_below: the association below which the result is over-forgotten; None where that cannot be told.
    evidence: histograms of cosines and the accuracy of each class, for the page (see `evidence.evidence`).
    """

    scores: dict[str, dict[str, dict[str, dict[str, Any]]]]
    gap: dict[str, Any] | None
    background: float | None
    over_forgotten: bool | None
    verdicts: dict[str, str]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    over_forgotten_below: float | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Audit: {self.verdicts['forgetting']}>"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Audit:
        """Return the audit whose `to_dict()` this is. Raises InputError for anything else, or a newer format."""
        return _read(content, "the content")

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read an audit.json, or the one in a folder. Raises InputError where that fails."""
        file = user_path(path)
        file = file / FILE if file.is_dir() else file
        text = read_text(file, _LARGEST, "the audit ")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"cannot read the audit {file}: it is not JSON ({error}); audit again") from error
        return _read(content, str(file))

    def to_dict(self) -> dict[str, Any]:
        """What `audit.json` holds."""
        return {"format": FORMAT, **{name: getattr(self, name) for name in (*_ALWAYS, *_LATER)}}

    def summary(self) -> str:
        """The verdicts, a table of all scores in plain text, and the notes."""
        verdicts = [f"{group.capitalize()}: {said}" for group, said in self.verdicts.items()]
        return "\n\n".join(["\n".join(verdicts), audit_table(self.to_dict()), *self.notes])

    def html(self) -> str:
        """The page that `save()` writes: one file with everything in it, from what `to_dict()` holds."""
        return audit_page(printable_data(self.to_dict()))

    def save(self, directory: str | Path) -> Path:
        """Write audit.json and audit.html; returns the folder. Raises InputError where the folder cannot be made.

        A failure in audit.html does not affect audit.json: it becomes a warning.
        """
        directory = make_folder(directory, "the audit")
        with writing(directory / FILE):
            text = json.dumps(printable_data(self.to_dict()), indent=2, allow_nan=False)
            write_text_atomically(directory / FILE, text + "\n")
        try:
            write_text_atomically(directory / PAGE, self.html())
        except Exception as error:  # the scores are saved; drawing may fail in any way
            warnings.warn(f"{PAGE} is missing: {type(error).__name__}: {error}", stacklevel=2)
        return directory


def _read(content: Any, name: str) -> Audit:
    is_audit = isinstance(content, Mapping) and all(key in content for key in ("format", *_ALWAYS))
    scores = content["scores"] if is_audit else None
    if not isinstance(scores, Mapping) or not all(
        isinstance(scores.get(model), Mapping) for model in ("before", "after")
    ):
        raise InputError(f"{name} is not an audit: give the audit.json that Audit.save() wrote")
    if content["format"] != FORMAT:
        raise InputError(
            f"{name} has format {content['format']!r}, and this version reads {FORMAT}: use a newer cliperase_fast"
        )
    return Audit(**{key: content[key] for key in (*_ALWAYS, *_LATER) if key in content})
