"""Find datasets whose items differ each time they are read, such as those that augment in `__getitem__`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cliperase_fast.errors import InputError

_ITEMS = 8  # items to check
_READS = 5  # of each item, each with a different seed


class seeded(ContextDecorator):
    """Seed the global generators of torch, random and numpy inside a block, and restore their states afterwards.

    gpus: also seed those of the GPUs, which are not restored.
    """

    def __init__(self, *entropy: int, gpus: bool = True) -> None:
        self.entropy, self.gpus = entropy, gpus

    def _recreate_cm(self) -> seeded:  # each call of a decorated function restores its own states
        return seeded(*self.entropy, gpus=self.gpus)

    def __enter__(self) -> None:
        seed = int(np.random.SeedSequence(self.entropy).generate_state(1)[0])
        self.states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        if self.gpus:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self.states[0])
        random.setstate(self.states[1])
        np.random.set_state(self.states[2])


def is_redrawn(items: Any, positions: Sequence[int] | np.ndarray, name: str) -> bool:
    """Return whether the images of `items` differ from one reading to the next, judged by a few of the `positions`.

    Raises `InputError` if the captions differ too, or if the same seeds of the global generators give another image, so
    that a run could be neither repeated nor resumed.
    """
    if isinstance(items, (list, tuple)) or len(positions) == 0:
        return False  # the same objects every time
    chosen = np.unique(np.linspace(0, len(positions) - 1, _ITEMS).round().astype(int))
    found = False
    for index in (int(positions[number]) for number in chosen):
        reads = [read for draw in range(_READS) if (read := _read(items, index, draw)) is not None]
        if len(reads) < _READS:
            continue
        captions, images = zip(*reads, strict=True)
        other = next((caption for caption in captions if caption != captions[0]), None)
        if other is not None:
            raise InputError(
                f"the caption of item {index} of {name} differs each time it is read ({_short(captions[0])}, "
                f"then {_short(other)}); give all captions of an image as a list, (image, [caption, ...]); training "
                "uses them in turn"
            )
        if any(image != images[0] for image in images):
            found = True
            if any(_read(items, index, draw) != read for draw, read in enumerate(reads)):
                raise InputError(
                    f"the image of item {index} of {name} differs each time it is read and does not follow the seeds "
                    "of torch, random and numpy, so a run could be neither repeated nor resumed; draw from their "
                    "global generators, or return the plain image and pass the augmentation as transform="
                )
    return found


def _read(items: Any, index: int, draw: int) -> tuple[Any, Any] | None:
    """Return a caption and an image in a form to compare; None if the item cannot be read, which its use reports."""
    with seeded(draw, index, gpus=False):
        try:
            image, caption = items[index]
            return _comparable(caption), _pixels(image)
        except Exception:  # the caller's code may raise anything
            return None


def _comparable(caption: Any) -> Any:
    if isinstance(caption, (Tensor, np.ndarray)):
        return caption.tolist()
    return [_comparable(one) for one in caption] if isinstance(caption, (list, tuple)) else repr(caption)


def _pixels(image: Any) -> Any:
    if isinstance(image, Tensor):
        flat = image.detach().cpu().contiguous().flatten()
        return str(image.dtype), tuple(image.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(image, Image.Image):
        return image.mode, image.size, image.tobytes()
    return (str(image.dtype), image.shape, image.tobytes()) if isinstance(image, np.ndarray) else None


def _short(caption: Any) -> str:
    text = str(caption)
    return text if len(text) <= 60 else text[:59] + "…"
