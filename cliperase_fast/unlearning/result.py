"""The result of `unlearn()`, and the folder it is saved to."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cliperase_fast.auditing import Audit
from cliperase_fast.auditing.result import FILE as AUDIT_FILE
from cliperase_fast.auditing.result import PAGE as AUDIT_PAGE
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.defaults import plain_torch
from cliperase_fast.models import ClipAdapter
from cliperase_fast.reading import printable_data
from cliperase_fast.report import ReportData, Verdict, model_card, text_table, verdict, write_html, write_plots
from cliperase_fast.report.wording import left_out_lines
from cliperase_fast.storage import make_folder, write_text_atomically, writing


@dataclass(repr=False)
class UnlearnResult:
    """The unlearned model and the evidence.

    model: a copy of the caller's model with the chosen weights, in the caller's dtypes, or in float32 if rounding to
    those would undo the forgetting (record["weights"] says which). history: the lines of metrics.jsonl.
    before, after: scores of these weights on the test split, fractions from 0 to 1, under "forget" and "retain".
    selection: why this checkpoint. audit: of `unlearn(audit=True)`. record: all of result.json.
    """

    adapter: ClipAdapter
    config: UnlearnConfig
    history: list[dict[str, Any]]
    record: dict[str, Any]
    similarities: dict[str, dict[str, np.ndarray]]
    embeddings: dict[str, np.ndarray]
    embedding_sets: list[str]
    embedding_labels: list[str]
    audit: Audit | None = None
    report_failure: str | None = None  # why plots or report.html could not be written

    def __repr__(self) -> str:
        return f"<UnlearnResult of {type(self.model).__name__}: {self.verdict.text}>"

    @property
    def model(self) -> nn.Module:
        return self.adapter.module

    @property
    def before(self) -> dict[str, Any]:
        return self.record["before"]

    @property
    def after(self) -> dict[str, Any]:
        return self.record["after"]

    @property
    def selection(self) -> dict[str, Any]:
        return self.record["selection"]

    @property
    def verdict(self) -> Verdict:
        """The outcome in words, and what to change; report.html and result.json say the same."""
        return verdict(self.record)

    def summary(self) -> str:
        """Return the verdict, a before/after table in plain text, why this checkpoint was chosen, and notes."""
        table, reason = text_table(self.before, self.after), self.selection["reason"]
        parts = [self.verdict.text, table, reason, *(f"{note}." for note in self.record["notes"])]
        if self.audit is not None:
            parts.append("\n".join(["Audit:", *(f"  {verdict}" for verdict in self.audit.verdicts.values())]))
        skipped = self.record["data"]["skipped"]
        if skipped:
            parts.append("\n".join(["Left out:", *(f"  {line}" for line in left_out_lines(skipped))]))
        if self.report_failure is not None:
            parts.append(f"Warning: the report is missing: {self.report_failure}")
        return "\n\n".join(parts)

    @plain_torch()
    def save(self, directory: str | Path) -> Path:
        """Write config.json, metrics.jsonl, model/, result.json, plots/ and report.html; returns the folder.

        With an audit also audit.json and audit.html. model/README.md is the model's card.

        A failure in plots/ or report.html does not affect the rest: it becomes a warning in `summary()`.

        model/ loads in the library the model came from: `open_clip.create_model_and_transforms("local-dir:.../model")`
        or `CLIPModel.from_pretrained(".../model")`.

        Raises `InputError` if the folder cannot be made, `UnlearningError` if a file cannot be written.
        """
        with writing(directory):
            return self.write(directory)

    def write(self, directory: str | Path) -> Path:
        """Write what `save` writes; an error of the file system is raised as it is."""
        directory = make_folder(directory, "the result")
        for name in ("result.json", AUDIT_FILE, AUDIT_PAGE):  # from an earlier call
            (directory / name).unlink(missing_ok=True)
        self.adapter.save(directory / "model")
        write_text_atomically(directory / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_text_atomically(directory / "metrics.jsonl", lines)
        self.save_evidence(directory)
        return directory

    def add_audit(self, audit: Audit, seconds: float) -> None:
        """Keep an audit of the model, which took `seconds`, and mention it in the record."""
        self.audit = audit
        self.record["audit"] = {
            "depth": self.config.audit,
            "verdicts": audit.verdicts,
            "over_forgotten": audit.over_forgotten,
            "background": audit.background,
            "gap": None if audit.gap is None else audit.gap["mean"],
        }
        self.record["seconds"]["audit"] = seconds
        self.record["seconds"]["total"] += seconds

    @plain_torch()
    def save_evidence(self, directory: Path) -> None:
        """Write what `save` writes beside the model's weights and the history: the audit, the card, the record."""
        record = printable_data(self.record)
        if self.audit is not None:
            self.audit.save(directory)
        write_text_atomically(directory / "model" / "README.md", model_card(record, directory / "model", directory))
        # Last: its presence says that the result is complete.
        write_text_atomically(directory / "result.json", json.dumps(record, indent=2) + "\n")
        if self.config.report:
            self._try_report(record, directory)

    def _try_report(self, record: dict[str, Any], directory: Path) -> None:
        self.report_failure = None
        try:
            report = ReportData(
                title=f"Forgetting {record['data']['forget']}",
                result=record,
                metrics=[line for line in self.history if "probe" not in line],
                similarities=self.similarities,
                embeddings=self.embeddings,
                embedding_sets=self.embedding_sets,
                embedding_labels=printable_data(self.embedding_labels),
                audit=None if self.audit is None else printable_data(self.audit.to_dict()),
            )
            write_plots(report, directory / "plots")
            write_html(report, directory / "report.html")
        except Exception as error:  # the work is saved; drawing may fail in any way
            self.report_failure = f"{type(error).__name__}: {error}"
            warnings.warn(f"plots and report.html are incomplete: {self.report_failure}", stacklevel=3)
