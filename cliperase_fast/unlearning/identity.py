"""What a resumed run must share with the one that wrote the checkpoint, beyond the model's weights and the settings.

`input_digests` serves queries, which keep features in a file.

Transforms and tokenizers are compared by their outputs for some of the images and captions, which are part of the
identity already, and for a fixed picture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.images import pixel_bytes
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import class_prompts
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import CaptionTable
from cliperase_fast.unlearning.splits import probe_rows

_SEED = 20241030


def transform_identity(transforms: Sequence[Callable[[Any], Tensor] | None], pairs: PairDataset) -> str:
    """Return a hex digest of the transforms' outputs for a fixed picture and some images of `pairs`.

    Images that are tensors are not transformed: the digest is that of some of them. A random transform gets the same
    seed each time. If its pixels still differ, it draws from a generator of its own, and is identified by its name.
    """
    images = [pairs.image(int(index)) for index in probe_rows(len(pairs))]
    digest = hashlib.sha256()
    if isinstance(images[0], Tensor):
        for image in images:
            digest.update(pixel_bytes(image))
        return digest.hexdigest()
    probes = [_picture(images[0].size), *images]
    for transform in transforms:
        if transform is None:
            digest.update(b"none")
            continue
        once, again = (_seen(transform, probes) for _ in range(2))
        digest.update(once if once == again else _name(transform).encode())
    return digest.hexdigest()


def input_digests(transform: Callable[[Any], Tensor] | None, pairs: PairDataset) -> list[str | None]:
    """Return digests of the model's inputs for a fixed picture and some images of `pairs`; None if unreadable."""
    found = [_input_digest(transform, _picture((64, 64)))]
    for index in probe_rows(len(pairs)):
        try:
            found.append(_input_digest(transform, pairs.image(int(index))))
        except InputError:
            found.append(None)
    return found


def _input_digest(transform: Callable[[Any], Tensor] | None, image: Image.Image | Tensor) -> str | None:
    if isinstance(image, Tensor):
        return hashlib.sha256(pixel_bytes(image)).hexdigest()
    if transform is None:
        return None
    once, again = (_seen(transform, [image]) for _ in range(2))
    return hashlib.sha256(once if once == again else _name(transform).encode()).hexdigest()


def tokenizer_identity(adapter: ClipAdapter, captions: CaptionTable, pairs: PairDataset) -> str:
    """Return a hex digest of the token ids of training captions, or some of many, and of `pairs`' prompts."""
    prompts = [prompt for of_class in class_prompts(pairs) or () for prompt in of_class]
    digest = hashlib.sha256()
    for tokens in (captions.first_tokens, *([adapter.token_ids(prompts)] if prompts else [])):  # [U, L], [X, L]
        digest.update(f"{list(tokens.shape)};".encode())
        digest.update(tokens.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _seen(transform: Callable[[Any], Tensor], probes: Sequence[Any]) -> bytes:
    digest = hashlib.sha256()
    for number, probe in enumerate(probes):
        with seeded(_SEED, number):
            try:
                pixels = transform(probe)
            except Exception as error:  # the fixed picture may not suit this transform
                if number > 0:
                    raise
                digest.update(type(error).__name__.encode())
                continue
        digest.update(f"{pixels.dtype} {list(pixels.shape)};".encode())
        digest.update(pixels.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _picture(size: tuple[int, int]) -> Image.Image:
    """Return noise that every flip, rotation, crop and colour change alters."""
    width, height = size
    pixels = np.random.default_rng(_SEED).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _name(transform: Any) -> str:
    """Return its name or repr without memory addresses."""
    named = getattr(transform, "__qualname__", None) or repr(transform)
    return f"{type(transform).__module__}.{type(transform).__qualname__} {re.sub(r' at 0x[0-9a-fA-F]+', '', named)}"
