"""The models of the demo: how each small CLIP is made and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DemoModel:
    """How to train the small model on a source.

    context_length: of the text tower, in tokens. forget: what the demo forgets unless told. least_top1: the zero-shot
    accuracy on test portraits that the model must reach for its data to be of use, a fraction.
    """

    image_size: int
    vision: Mapping[str, Any]  # open_clip's vision_cfg, without the image size
    epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    flip_and_shift: bool = False  # for natural images: mirror, and shift by a few pixels
    context_length: int = 16
    forget: str | None = None
    least_top1: float = 0.0

    def training(self) -> dict[str, Any]:
        """Return what the trained weights depend on. Models of earlier versions stay in the cache."""
        made_from = {**asdict(self), "unlearning": {}}  # once a field that no weight depended on
        for name in ("forget", "least_top1", *(["context_length"] if self.context_length == 16 else [])):
            del made_from[name]
        return made_from


_TRANSFORMER = {"patch_size": 4, "width": 96, "layers": 3, "head_width": 32}
# 250,000 parameters, and no batch statistics that training on forget pairs would shift.
_CONVOLUTION = {
    "timm_model_name": "test_convnext",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
}
DEMO_MODELS = {
    "demo": DemoModel(16, _TRANSFORMER, epochs=25, forget="class:seven"),
    "shapes": DemoModel(
        32,
        _CONVOLUTION,
        epochs=12,
        learning_rate=2e-3,
        forget="class:red circle",
    ),
    "personas": DemoModel(
        32,
        _CONVOLUTION,
        epochs=20,
        learning_rate=2e-3,
        context_length=24,
        forget="class:person 0* phone",
        least_top1=0.8,
    ),
    "images": DemoModel(32, _CONVOLUTION, epochs=60, learning_rate=2e-3, flip_and_shift=True),
}


def demo_model_for(spec: str) -> DemoModel:
    """Return how the model of a source is trained: the digits, the shapes, the personas, or small photographs."""
    return DEMO_MODELS.get(spec.partition(":")[0].partition("?")[0], DEMO_MODELS["images"])
