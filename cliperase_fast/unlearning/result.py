"""What `unlearn()` returns, and the folder it is saved to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.models import ClipAdapter
from cliperase_fast.report import ReportData, Verdict, text_table, verdict, write_html, write_plots
from cliperase_fast.unlearning.checkpoints import write_text_atomically


@dataclass
class UnlearnResult:
    """The unlearned model and the evidence.

    model: a copy of the caller's model with the chosen weights. history: the lines of metrics.jsonl. before, after:
    scores on the test split, fractions from 0 to 1, under "forget" and "retain". selection: why this checkpoint.
    record: all of result.json.
    """

    adapter: ClipAdapter
    config: UnlearnConfig
    history: list[dict[str, Any]]
    record: dict[str, Any]
    similarities: dict[str, dict[str, np.ndarray]]
    embeddings: dict[str, np.ndarray]
    embedding_sets: list[str]
    embedding_labels: list[str]

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
        """What came of it in words, and what to change; report.html and result.json say the same."""
        return verdict(self.record)

    def summary(self) -> str:
        """What came of it, a before/after table in plain text, why this checkpoint was chosen, and what to know."""
        table, reason = text_table(self.before, self.after), self.selection["reason"]
        return "\n\n".join([self.verdict.text, table, reason, *(f"{note}." for note in self.record["notes"])])

    def save(self, directory: str | Path) -> Path:
        """Write config.json, metrics.jsonl, result.json, model/, plots/ and report.html; returns the folder.

        model/ loads in the library the model came from: `open_clip.create_model_and_transforms("local-dir:.../model")`
        or `CLIPModel.from_pretrained(".../model")`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.adapter.save(directory / "model")
        write_text_atomically(directory / "config.json", json.dumps(self.config.to_dict(), indent=2) + "\n")
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_text_atomically(directory / "metrics.jsonl", lines)
        if self.config.report:
            report = ReportData(
                title=f"Forgetting {self.record['data']['forget']}",
                result=self.record,
                metrics=self.history,
                similarities=self.similarities,
                embeddings=self.embeddings,
                embedding_sets=self.embedding_sets,
                embedding_labels=self.embedding_labels,
            )
            write_plots(report, directory / "plots")
            write_html(report, directory / "report.html")
        # Last: its presence says that everything else is there.
        write_text_atomically(directory / "result.json", json.dumps(self.record, indent=2) + "\n")
        return directory
