"""Any transform (a function, a transformers image processor) as one from a PIL image to a float tensor [3, H, W]."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cliperase_fast.errors import InputError


class ImageProcessorTransform:
    """A transformers image processor as a function of one PIL image; picklable, for loader processes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:  # -> float32 [3, H, W]
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def as_transform(transform: Any) -> Any:
    """A transformers image processor, or a processor with one, as a function of one image; others pass."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(transform, transformers.ProcessorMixin):
        transform = transform.image_processor
    if hasattr(transform, "image_mean") and callable(getattr(transform, "save_pretrained", None)):
        return ImageProcessorTransform(transform)
    return transform


def try_transform(transform: Callable[[Any], Any] | None, image: Any) -> Tensor:
    """What `transform` makes of one PIL image; InputError unless that is a float tensor [3, H, W]."""
    wanted = "it must turn a PIL image into a float tensor [3, H, W]"
    assert transform is not None
    try:
        pixels: Any = transform(image)
    except InputError:
        raise
    except Exception as error:  # the caller's own code
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"the transform fails on an image ({type(error).__name__}: {said}); {wanted}") from error
    if not isinstance(pixels, Tensor):
        raise InputError(f"the transform returned a {type(pixels).__name__}; {wanted}")
    if pixels.ndim != 3 or not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        scaled = "" if pixels.is_floating_point() else ", with the model's mean and deviation taken out"
        raise InputError(f"the transform returned a {kind} tensor {list(pixels.shape)}; {wanted}{scaled}")
    return pixels
