"""The data of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cliperase_fast.report.drawing import Drawing


@dataclass
class ReportData:
    """A run's data. All but `title` and `result` is optional; the report leaves out what it has no data for.

    title: heading of the page, such as "Forgetting class:apple".
    result: the content of `result.json`.
    metrics: the lines of `metrics.jsonl`: a dictionary for each step with "step", "total", the method's terms and
        "learning_rate", in this order, and one for each evaluation with "step" and "validation".
    similarities: {"before" | "after": {"forget" | "retain": cosines of matching pairs, float [pairs]}}.
    embeddings: {"before" | "after": image features of the same n test images, float [n, D]}; a few hundred
        are enough.
    embedding_sets: "forget" or "retain" for each of the n images.
    embedding_labels: class name (or "") of each of the n images.
    audit: the content of audit.json, if the run has one; audit.html stands beside the report.
    """

    title: str
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    similarities: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    embedding_sets: Sequence[str] = ()
    embedding_labels: Sequence[str] = ()
    audit: Mapping[str, Any] | None = None
    # What is drawn in the light theme, by the function that draws it: the plots and the page share it.
    drawings: dict[Any, Drawing | None] = field(default_factory=dict, init=False, repr=False, compare=False)
