"""Load, adapt, train and save CLIP models of every supported kind: `load_model` returns a `ClipAdapter`."""

from __future__ import annotations

from cliperase_fast.models.adapters.base import ClipAdapter
from cliperase_fast.models.adapters.generic import GenericAdapter
from cliperase_fast.models.adapters.open_clip import OpenClipAdapter
from cliperase_fast.models.adapters.transformers import TransformersAdapter
from cliperase_fast.models.loading import load_model
from cliperase_fast.models.lora import merge_lora
from cliperase_fast.models.trainable import set_trainable

__all__ = [
    "ClipAdapter",
    "GenericAdapter",
    "OpenClipAdapter",
    "TransformersAdapter",
    "load_model",
    "merge_lora",
    "set_trainable",
]
