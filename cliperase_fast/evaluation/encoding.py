"""Encode a set of pairs: each image once, and each different caption once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cliperase_fast.data import PairDataset, caption_key
from cliperase_fast.data.loading import PixelCache, load_batches, name_of, stack_images, transformed
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.models.runtime import inference, refuse_inputs
from cliperase_fast.progress import Steps

SAME = 1e-6  # features closer than this in every component are equal


@dataclass(frozen=True)
class EncodedPairs:
    """Features of n images, their U different captions and, where there are classes, C classes.

    All tensors are float32 on the CPU, with rows of unit length.
    """

    image_features: Tensor  # [n, D]
    caption_features: Tensor  # [U, D]
    caption_index: list[np.ndarray]  # the rows of each image's captions, int64, at least one
    class_features: Tensor | None  # [C, D], see `class_prompts`

    def __len__(self) -> int:
        return len(self.image_features)


@dataclass
class Unchanged:
    """The parts of a model in training that are not trained: what they compute is kept and reused.

    Every `encode_pairs` with this object must be of the same pairs, batches and precision. text: whether no parameter
    of the text tower is trained. front: of the image tower, if its first layers are not trained; it is used only if it
    gives the same bits as the whole tower. budget: bytes for the output of the front.
    """

    text: bool = False
    front: FrozenFront | None = None
    budget: int = 0
    text_features: Tensor | None = None  # [U + X, D]
    activations: list[Tensor] = field(default_factory=list)  # of this process's batches
    complete: bool = False  # whether they are those of all its batches

    def encode(self, adapter: ClipAdapter, inputs: Tensor, images: int) -> Tensor:  # -> [B, D]
        """Encode pixels, and keep what the front makes of them; once all is kept, encode that.

        images: how many there are in all.
        """
        if self.complete and self.front is not None:
            return self.front.rest(inputs)
        features = adapter.encode_image(inputs)
        if self.front is not None:
            kept = self.front.first(inputs)
            if self.activations or self._fits(kept, features, images):
                self.activations.append(kept.cpu())
            else:
                self.front = None
        return features

    @property
    def size(self) -> int:
        """The bytes that are kept."""
        return sum(kept.numel() * kept.element_size() for kept in self.activations)

    def _fits(self, kept: Tensor, features: Tensor, images: int) -> bool:
        assert self.front is not None
        size = kept[0].numel() * kept.element_size() * images
        return size <= self.budget and torch.equal(self.front.rest(kept), features)


def encode_pairs(
    adapter: ClipAdapter,
    pairs: PairDataset,
    *,
    batch_size: int,
    device: torch.device | str,
    precision: str = "fp32",
    num_workers: int = 0,
    progress: bool = False,
    templates: Sequence[str] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    cache: PixelCache | None = None,
    unchanged: Unchanged | None = None,
) -> EncodedPairs:
    """Encode all images and captions in evaluation mode, and restore each module's mode afterwards.

    adapter: its module is on `device`. PIL images go through its `transform`; tensors [3, H, W] are used unchanged.
    batch_size: images (or captions) in a forward pass.
    precision: arithmetic of the encoders: fp32 (that of the parameters), or bf16 or fp16 (autocast).
    num_workers: processes that load images. The global random generators are not touched.
    progress: show a bar; otherwise a line is logged from time to time.
    ranks: processes that call this together. Each encodes a part of the images, in the same batches as a single
        process would; every process gets all features.
    templates: class prompts instead of `pairs.prompts`, see `class_prompts`.
    cache: of transformed images; used only without loader processes.
    unchanged: what need not be computed again.

    Raises `InputError` for captions that the model cannot encode and for images of different sizes, `UnlearningError`
    if a batch does not fit in memory. NaN and infinite features are returned as they are; see `require_finite`.
    """
    device = torch.device(device)
    captions, caption_index = pairs.different_captions()
    prompts = class_prompts(pairs, templates)
    # A prompt that is also a caption is encoded once.
    known = {caption_key(caption): row for row, caption in enumerate(captions)}
    extra: list[Any] = []
    for prompt in (prompt for of_class in prompts or () for prompt in of_class):
        if caption_key(prompt) not in known:
            known[caption_key(prompt)] = len(captions) + len(extra)
            extra.append(prompt)
    # All captions are checked before anything is encoded: U captions, then X prompts.
    parts = [adapter.token_ids(part) for part in (captions, extra) if part]  # [U, L], [X, L]
    with inference(adapter.module, device, precision):
        text = None if unchanged is None else unchanged.text_features  # [U + X, D]
        if text is None:
            text = torch.cat([_encode_text(adapter, part, batch_size, progress) for part in parts])
            if unchanged is not None and unchanged.text:
                unchanged.text_features = text
        image = _encode_images(
            adapter, pairs, batch_size, device, num_workers, progress, ranks, cache, unchanged or Unchanged()
        )  # [n, D]
    class_features = None
    if prompts is not None:
        rows = [[known[caption_key(prompt)] for prompt in of_class] for of_class in prompts]
        class_features = F.normalize(torch.stack([text[of_class].mean(0) for of_class in rows]), dim=-1)
    return EncodedPairs(image, text[: len(captions)], caption_index, class_features)


def pair_similarities(encoded: EncodedPairs) -> np.ndarray:
    """Compute the mean cosine of each image and its own captions; float32 [n], from -1 to 1."""
    image_of, caption_of = matching(encoded)
    sums = np.zeros(len(encoded), dtype=np.float64)
    step = 1 << 16  # pairs gathered at a time
    for start in range(0, len(image_of), step):
        images, captions = image_of[start : start + step], caption_of[start : start + step]
        cosine = (encoded.image_features[images] * encoded.caption_features[captions]).sum(-1)  # [step]
        np.add.at(sums, images, cosine.double().numpy())
    counts = np.bincount(image_of, minlength=len(encoded))
    return (sums / counts).astype(np.float32)


def require_finite(encoded: EncodedPairs, pairs: PairDataset) -> None:
    """Raise `InputError` if a feature is NaN or infinite. The message names the first such image."""
    if not encoded.caption_features.isfinite().all():
        raise InputError(
            "the model's text features are not finite (NaN or infinity): its weights are damaged, its arithmetic "
            "overflows, or it normalises features that are all zero"
        )
    finite = encoded.image_features.isfinite().all(-1)  # [n]
    if not finite.all():
        first = int(finite.long().argmin())
        raise InputError(
            f"{int((~finite).sum())} of the {len(finite)} image features are not finite (NaN or infinity), first that "
            f"of {pairs.ids[first]!r} in {pairs.name}: the model's weights or the pixels contain such values, its "
            "arithmetic overflows, or it normalises features that are all zero"
        )


def matching(encoded: EncodedPairs) -> tuple[np.ndarray, np.ndarray]:
    """Return all (image, caption) pairs as two int64 arrays [P]: image rows, ascending, and caption rows."""
    counts = np.array([len(rows) for rows in encoded.caption_index], dtype=np.int64)
    if len(counts) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.repeat(np.arange(len(counts)), counts), np.concatenate(encoded.caption_index)


def class_prompts(pairs: PairDataset, templates: Sequence[str] | None = None) -> list[tuple[Any, ...]] | None:
    """Return the captions that represent each class in zero-shot classification (CLIP, arXiv 2103.00020, 3.1.4).

    They are the data's own, or `templates` ("a photo of a {}") with the class name in the braces. None for data
    without classes.
    """
    if pairs.classes is None or pairs.prompts is None:
        return None
    if templates is None:
        return [tuple(of_class) for of_class in pairs.prompts]
    return [tuple(template.replace("{}", name) for template in templates) for name in pairs.classes]


def _encode_text(adapter: ClipAdapter, tokens: Tensor, batch_size: int, progress: bool) -> Tensor:
    features: list[Tensor] = []
    with Steps(len(tokens), "encoding", "caption", bar=progress) as steps:
        for part in tokens.split(batch_size):
            features.append(_encode_tokens(adapter, part).float().cpu())
            steps.update(len(part))
    return torch.cat(features)  # [U, D]


def _encode_tokens(adapter: ClipAdapter, tokens: Tensor) -> Tensor:
    if adapter.in_step:  # the exchange of weights has errors of its own
        return adapter.encode_text(tokens)
    ids = f"ids from {int(tokens.min())} to {int(tokens.max())}"
    with refuse_inputs(
        f"the model cannot encode captions of {tokens.shape[1]} tokens with {ids}", "use its own tokenizer"
    ):
        return adapter.encode_text(tokens)


def _encode_images(
    adapter: ClipAdapter,
    pairs: PairDataset,
    batch_size: int,
    device: torch.device,
    num_workers: int,
    progress: bool,
    ranks: Ranks,
    cache: PixelCache | None,
    unchanged: Unchanged,
) -> Tensor:
    if len(pairs) == 0:
        raise InputError(f"{pairs.name} is empty: give at least one (image, caption) pair")
    batches = [list(range(start, min(start + batch_size, len(pairs)))) for start in range(0, len(pairs), batch_size)]
    own = batches[ranks.share(len(batches))]

    if adapter.in_step:
        loader = _loader(adapter, pairs, own, device, num_workers, cache)
        return _encode_in_step(adapter, loader, batches, device, progress, ranks)

    def encoded() -> list[Tensor]:
        parts: list[Tensor] = []
        with Steps(sum(map(len, own)), "encoding", "image", bar=progress) as steps:
            for features in _image_features(adapter, pairs, own, device, num_workers, cache, unchanged):
                parts.append(features)
                steps.update(len(features))
        unchanged.complete = unchanged.front is not None
        return parts

    return ranks.all_gather_rows(encoded, [sum(map(len, batches[share])) for share in ranks.shares(len(batches))])


def _encode_in_step(
    adapter: ClipAdapter,
    loader: DataLoader,
    batches: list[list[int]],
    device: torch.device,
    progress: bool,
    ranks: Ranks,
) -> Tensor:
    """Encode with equally many forward passes on every rank: a rank without a batch repeats an image."""
    shares = ranks.shares(len(batches))
    own = load_batches(loader)
    parts: list[Tensor] = []

    def next_pixels() -> tuple[Tensor, bool]:
        for pixels in islice(own, 1):
            return pixels, True
        return stack_images([loader.dataset[0]]), False

    with Steps(len(batches), "encoding", "batch", bar=progress) as steps:
        for _ in range(max(share.stop - share.start for share in shares)):
            pixels, mine = ranks.run_on_all(next_pixels)
            features = adapter.encode_image(pixels.to(device)).float().cpu()  # [B, D]
            if mine:
                parts.append(features)
            steps.update(ranks.size)
    return ranks.all_gather_rows(lambda: parts, [sum(map(len, batches[share])) for share in shares])


def image_feature_parts(
    adapter: ClipAdapter, pairs: PairDataset, batch_size: int, device: torch.device, precision: str, num_workers: int
) -> Iterator[Tensor]:
    """Yield the features [B, D] of all images in order, a batch at a time; float32 on the CPU. See `encode_pairs`."""
    batches = [list(range(start, min(start + batch_size, len(pairs)))) for start in range(0, len(pairs), batch_size)]
    with inference(adapter.module, device, precision):
        yield from _image_features(adapter, pairs, batches, device, num_workers, None, Unchanged())


def _loader(
    adapter: ClipAdapter,
    pairs: PairDataset,
    batches: list[list[int]],
    device: torch.device,
    num_workers: int,
    cache: PixelCache | None,
) -> DataLoader:
    return DataLoader(
        _Pixels(pairs, adapter.transform, cache),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=stack_images,
        pin_memory=device.type == "cuda",
        generator=torch.Generator("cpu"),  # otherwise the loader would draw from the global generator
    )


def _image_features(
    adapter: ClipAdapter,
    pairs: PairDataset,
    batches: list[list[int]],
    device: torch.device,
    num_workers: int,
    cache: PixelCache | None,
    unchanged: Unchanged,
) -> Iterator[Tensor]:
    encode = partial(unchanged.encode, adapter, images=len(pairs))
    if unchanged.complete:
        for activations in unchanged.activations:
            yield _encode_image(encode, activations.to(device)).float().cpu()  # [B, D]
        return
    loader = _loader(adapter, pairs, batches, device, num_workers, cache)
    for pixels in load_batches(loader):
        yield _encode_image(encode, pixels.to(device, non_blocking=True)).float().cpu()  # [B, D]


def _encode_image(encode: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    with refuse_inputs(
        f"the model cannot encode images of shape {tuple(pixels.shape[1:])}",
        "give tensors of the size it was built for, or PIL images, which its transform resizes",
    ):
        return encode(pixels)


class _Pixels(Dataset):
    def __init__(self, pairs: PairDataset, transform: Callable[[Any], Tensor] | None, cache: PixelCache | None) -> None:
        self.pairs, self.transform, self.cache = pairs, transform, cache

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        if self.cache is not None and self.transform is not None:
            return self.cache.pixels(self.pairs, index, self.transform)
        image = self.pairs.image(index)
        if isinstance(image, Tensor):
            return image
        if self.transform is None:
            raise InputError(
                f"{self.pairs.name} gives PIL images and the model has no transform: pass transform= "
                "(PIL image -> tensor [3, H, W]), or give tensors"
            )
        return transformed(self.transform, image, name_of(self.pairs, index))
