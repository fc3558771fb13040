"""The adapters of transformers' SiglipModel and Siglip2Model, which were trained with the sigmoid loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.models.adapters.base import Projection, Tower
from cliperase_fast.models.adapters.transformers import PretrainedAdapter, family_of, pooled
from cliperase_fast.models.preprocessing import ImageProcessorTransform

_TAIL = re.compile(r"(vision_model\.(post_layernorm|head)|text_model\.(final_layer_norm|head))\b")


class SiglipAdapter(PretrainedAdapter):
    """Wrap a SiglipModel. SigLIP 2 checkpoints of a fixed resolution are of this class too.

    The text tower reads the whole context, padding included, so captions are always padded to it. The scale is trained
    like CLIP's; `logit_bias` stays as it is.
    """

    kind = "siglip"
    model_class, config_class, processor_class = "SiglipModel", "SiglipConfig", "SiglipImageProcessor"
    _number_shapes = {"logit_scale": (1,), "logit_bias": (1,)}  # noqa: RUF012

    def tower(self, name: str) -> Tower | None:
        if name in ("logit_scale", "logit_bias"):
            return "scale" if name == "logit_scale" else None
        return "image" if name.startswith("vision_model.") else "text"

    def is_tail(self, name: str) -> bool:
        return _TAIL.match(name) is not None

    def projection(self, tower: Tower) -> Projection | None:
        """The image tower ends with attention pooling, which is not a projection of its own features."""
        return None if tower == "image" else Projection(self._model.text_model, "head", nn.Identity())


class Siglip2Adapter(SiglipAdapter):
    """Wrap a Siglip2Model (NaFlex). Images are resized to a square of the number of patches that it was trained with.

    A saved folder has the model's own processor, which keeps the aspect ratio of images.
    """

    kind = "siglip2"
    model_class, config_class = "Siglip2Model", "Siglip2Config"

    @property
    def _side(self) -> int:
        """Patches along a side of an image."""
        return int(self._config.vision_config.num_patches**0.5)

    @property
    def _image_size(self) -> tuple[int, int]:
        size = self._side * int(self._config.vision_config.patch_size)
        return size, size

    def _image_features(self, pixels: Tensor) -> Tensor:
        count, channels, height, width = pixels.shape
        patch = int(self._config.vision_config.patch_size)
        rows, columns = height // patch, width // patch
        parts = pixels.reshape(count, channels, rows, patch, columns, patch)
        patches = parts.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, patch * patch * channels)
        shapes = torch.tensor([[rows, columns]], dtype=torch.int64, device=pixels.device).expand(count, 2)
        mask = torch.ones(count, rows * columns, dtype=torch.int64, device=pixels.device)
        features = self._model.get_image_features(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        )
        return pooled(features)

    @classmethod
    def load_image_processor(cls, directory: Path) -> Any:
        """Return None: the processor beside the model gives patches of varying shapes, not images."""
        return None

    def _processor_to_save(self) -> Any:
        import transformers

        if not isinstance(self.transform, ImageProcessorTransform):
            return None
        vision = self._config.vision_config
        return transformers.Siglip2ImageProcessor(patch_size=vision.patch_size, max_num_patches=vision.num_patches)


FAMILY = family_of(SiglipAdapter, "siglip")
FAMILY_2 = family_of(Siglip2Adapter, "siglip2")
