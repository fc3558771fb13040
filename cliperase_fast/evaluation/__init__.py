"""Measure how well a model matches images and captions, for forget and retain pairs separately."""

from cliperase_fast.evaluation.background import Background, association_margin, closeness
from cliperase_fast.evaluation.divergence import Divergence, DivergenceMeter
from cliperase_fast.evaluation.encoding import (
    EncodedPairs,
    Unchanged,
    class_prompts,
    encode_pairs,
    pair_similarities,
    require_finite,
)
from cliperase_fast.evaluation.evaluating import evaluate
from cliperase_fast.evaluation.metrics import METRICS, PRIMARY, Metric, find_metric
from cliperase_fast.evaluation.queries import QueryResults
from cliperase_fast.evaluation.scoring import score

__all__ = [
    "METRICS",
    "PRIMARY",
    "Background",
    "Divergence",
    "DivergenceMeter",
    "EncodedPairs",
    "Metric",
    "QueryResults",
    "Unchanged",
    "association_margin",
    "class_prompts",
    "closeness",
    "encode_pairs",
    "evaluate",
    "find_metric",
    "pair_similarities",
    "require_finite",
    "score",
]
