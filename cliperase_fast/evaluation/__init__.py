"""How well a model matches images and captions: zero-shot accuracy and retrieval, for forget and retain pairs
apart."""

from cliperase_fast.evaluation.encoding import (
    EncodedPairs,
    class_prompts,
    encode_pairs,
    pair_similarities,
    require_finite,
)
from cliperase_fast.evaluation.evaluating import evaluate
from cliperase_fast.evaluation.scoring import score

__all__ = ["EncodedPairs", "class_prompts", "encode_pairs", "evaluate", "pair_similarities", "require_finite", "score"]
