"""The unlearning methods: one file each, and the registry that finds them by name."""

from cliperase_fast.unlearning.methods.base import (
    TERM_SETTINGS,
    TRAINING_SETTINGS,
    ClosedFormMethod,
    Method,
    TrainingMethod,
)
from cliperase_fast.unlearning.methods.registry import make_method, methods, register_method

__all__ = [
    "TERM_SETTINGS",
    "TRAINING_SETTINGS",
    "ClosedFormMethod",
    "Method",
    "TrainingMethod",
    "make_method",
    "methods",
    "register_method",
]
