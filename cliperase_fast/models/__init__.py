"""CLIP models of every supported kind behind one small interface: `load_model` gives a `ClipAdapter`."""

from __future__ import annotations

from cliperase_fast.models.adapter import ClipAdapter, GenericAdapter
from cliperase_fast.models.loading import load_model
from cliperase_fast.models.lora import merge_lora
from cliperase_fast.models.open_clip_adapter import OpenClipAdapter
from cliperase_fast.models.trainable import set_trainable
from cliperase_fast.models.transformers_adapter import TransformersAdapter

__all__ = [
    "ClipAdapter",
    "GenericAdapter",
    "OpenClipAdapter",
    "TransformersAdapter",
    "load_model",
    "merge_lora",
    "set_trainable",
]
