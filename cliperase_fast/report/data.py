"""What a report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class ReportData:
    """Everything but `title` and `result` may be left out; the report then leaves out what it would show.

    title: heading of the page, such as "Forgetting class:apple".
    result: the content of `result.json`.
    metrics: the lines of `metrics.jsonl`: a dictionary a step with "step", "total", "retain", "forget",
        "consistency", "learning_rate", and one a look at the validation split with "step" and "validation".
    similarities: {"before" | "after": {"forget" | "retain": cosines of matching pairs, float [pairs]}}.
    embeddings: {"before" | "after": image features of the same n test images, float [n, D]}; a few hundred
        suffice.
    embedding_sets: "forget" or "retain" for each of the n images.
    embedding_labels: class name (or "") of each of the n images.
    """

    title: str
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    similarities: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    embedding_sets: Sequence[str] = ()
    embedding_labels: Sequence[str] = ()
