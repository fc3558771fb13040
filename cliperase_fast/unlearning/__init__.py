"""The unlearning itself: data preparation, methods, training, choice of a checkpoint, result."""

from cliperase_fast.unlearning.api import unlearn
from cliperase_fast.unlearning.result import UnlearnResult

__all__ = ["UnlearnResult", "unlearn"]
