"""Compute the features of a model that the scores of `scores.py` need, once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.auditing import metrics
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.scores import Features, Variant
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.auditing.vocabulary import Wording
from cliperase_fast.data import PairDataset, caption_key, same_pairs
from cliperase_fast.data.loading import PixelCache, name_of, stack_images, transformed
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import EncodedPairs, encode_pairs, require_finite
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import inference
from cliperase_fast.progress import Steps

VIEWS = 4  # augmented views of an image, for membership
LARGEST_SAMPLE = 2048  # training pairs looked at, of each kind

T = TypeVar("T")
_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def keep_features() -> Iterator[None]:
    """Keep what the audits in this context encode, so that a model which several of them share is encoded once.

    The images must not change meanwhile: pairs are told apart by their names, captions and labels.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


@dataclass(frozen=True)
class Encoding:
    """Hold how models encode.

    batch_size: images in a forward pass. precision: arithmetic of the encoders, as in `encode_pairs`.
    seed: of the bootstrap, the augmented views and the attacks. ranks: processes that share the work.
    num_workers: processes that load images. cache: of images under the transform of the models; None keeps none.
    """

    batch_size: int
    device: torch.device
    precision: str = "fp32"
    seed: int = 0
    progress: bool = False
    ranks: Ranks = SINGLE_PROCESS
    num_workers: int = 0
    cache: PixelCache | None = None

    def for_model(self, adapter: ClipAdapter, other: ClipAdapter, pairs: PairDataset) -> Encoding:
        """Return a copy for `adapter`, without the cache if it turns images into other pixels than `other` does."""
        return self if shares_transform(adapter, other, pairs) else replace(self, cache=None)


def encode_model(
    adapter: ClipAdapter, sets: AuditSets, layout: Layout, wordings: Sequence[Wording], how: Encoding, name: str
) -> Features:
    """Encode all pairs of an audit with one model.

    adapter: on the device of `how`, in float32. name: of the model, for messages.
    Raises InputError if a feature is NaN or infinite.
    """
    return _kept(
        lambda: _encode_model(adapter, sets, layout, wordings, how, name),
        lambda: ("features", _key(adapter, sets, how), tuple(wordings)),
    )


def _encode_model(
    adapter: ClipAdapter, sets: AuditSets, layout: Layout, wordings: Sequence[Wording], how: Encoding, name: str
) -> Features:
    test = _encode(adapter, sets.test, how, name)
    concepts = test.caption_features if test.class_features is None else test.class_features
    others = {key: (_encode(adapter, pairs, how, name), pairs) for key, pairs in sets.other.items()}
    holdouts = {key: (_encode(adapter, pairs, how, name), pairs) for key, pairs in sets.holdouts.items()}
    training_cosines = test_cosines = None
    forget_test = sets.test.subset(layout.forget_images)
    if not same_pairs(sets.forget, forget_test):  # a single pair serves both
        training_cosines = view_cosines(adapter, sample(sets.forget, how.seed), concepts, how)
        test_cosines = view_cosines(adapter, sample(forget_test, how.seed), concepts, how)
    return Features(
        images=test.image_features,
        captions=test.caption_features,
        concepts=concepts,
        variants=tuple(_variants(adapter, wordings, how)),
        other={key: _classed(encoded, pairs) for key, (encoded, pairs) in others.items()},
        holdouts={key: _paired(encoded) for key, (encoded, _) in holdouts.items()},
        training_cosines=training_cosines,
        test_cosines=test_cosines,
    )


def training_correct(
    adapter: ClipAdapter, sets: AuditSets, concepts: Tensor, how: Encoding, name: str
) -> dict[str, np.ndarray]:
    """Whether training images are nearest to their class (of those of its kind): bool, under "forget" and "retain".

    concepts: [K, D], the class captions. At most `LARGEST_SAMPLE` images of each kind.
    """
    return _kept(
        lambda: _training_correct(adapter, sets, concepts, how, name),
        lambda: ("training", _key(adapter, sets, how)),
    )


def _training_correct(
    adapter: ClipAdapter, sets: AuditSets, concepts: Tensor, how: Encoding, name: str
) -> dict[str, np.ndarray]:
    found = {}
    for kind, pairs in (("forget", sets.forget), ("retain", sets.retain)):
        some = sample(pairs, how.seed)
        images = _encode(adapter, some, how, name).image_features
        rows, labels = np.arange(len(some)), np.asarray(some.labels)
        kinds = sets.test.class_kinds
        found[kind] = metrics.wrong_before_right(images, concepts, rows, labels, item_kinds=kinds) == 0
    return found


def _kept(compute: Callable[[], T], key: Callable[[], Any]) -> T:
    """Return what is computed, or was computed before in the same context of `keep_features`."""
    kept = _KEPT.get()
    if kept is None:
        return compute()
    name = key()
    if name not in kept:
        kept[name] = compute()
    return kept[name]


def _key(adapter: ClipAdapter, sets: AuditSets, how: Encoding) -> tuple[Any, ...]:
    """Return what the features of a model depend on."""
    named = {"forget": sets.forget, "retain": sets.retain, "test": sets.test, **sets.other, **sets.holdouts}
    pairs = tuple((name, of.fingerprint()) for name, of in named.items())
    model = (adapter.identity(), repr(adapter.transform))
    return (*model, pairs, sets.forget_mask.tobytes(), how.batch_size, str(how.device), how.precision, how.seed)


def sample(pairs: PairDataset, seed: int, count: int = LARGEST_SAMPLE) -> PairDataset:
    """Return at most `count` of the pairs, drawn with the seed, in their order."""
    if len(pairs) <= count:
        return pairs
    return pairs.subset(np.sort(np.random.default_rng([seed, len(pairs)]).choice(len(pairs), count, replace=False)))


def view_cosines(adapter: ClipAdapter, pairs: PairDataset, concepts: Tensor, how: Encoding) -> np.ndarray:
    """Return for each image the mean cosine of its `VIEWS` augmented views with its own captions; float64 [n].

    concepts: [K, D], the class captions. Data without classes takes the mean over the captions of the image.
    """
    if pairs.labels is not None:
        own = concepts[torch.as_tensor(np.asarray(pairs.labels), dtype=torch.int64, device="cpu")]  # [n, D]
    else:
        captions, index = pairs.different_captions()
        text = encode_captions(adapter, captions, how)
        own = torch.stack([text[rows].mean(0) for rows in index])  # the mean cosine is that with the mean caption
    starts = range(0, len(pairs), how.batch_size)

    def work() -> list[np.ndarray]:
        with (
            inference(adapter.module, how.device, how.precision),
            Steps(len(pairs), "encoding views", "image", bar=how.progress) as steps,
        ):
            found = []
            for start in starts[how.ranks.share(len(starts))]:
                mine = own[start : start + how.batch_size]
                pixels = pixels_of(adapter, pairs, range(start, start + len(mine)), how.cache)
                cosines = torch.zeros(len(pixels), dtype=torch.float64, device="cpu")
                for view in augmented_views(pixels, start, how.seed):
                    features = adapter.encode_image(view.to(how.device)).float().cpu()
                    cosines += (features * mine).sum(1).double()
                found.append((cosines / VIEWS).numpy())
                steps.update(len(pixels))
            return found

    return np.concatenate([part for of_rank in how.ranks.gather_results(work) for part in of_rank])


def augmented_views(pixels: Tensor, start: int, seed: int) -> Iterator[Tensor]:
    """Yield `VIEWS` augmented versions of images [B, 3, H, W].

    Each view shifts the image by up to a sixteenth of its sides (at least one pixel), repeating the edge, and
    multiplies its pixels by 0.9 to 1.1. Images are not mirrored, which could change what they show. The draws depend on
    the seed and the number of the image (`start` is that of the first), so that all models see the same views.
    """
    height, width = pixels.shape[-2:]
    reach = max(1, height // 16), max(1, width // 16)
    padded = F.pad(pixels, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    drawn = [np.random.default_rng([seed, start + row]) for row in range(len(pixels))]
    for _ in range(VIEWS):
        views = []
        for row, rng in enumerate(drawn):
            top, left = rng.integers(0, 2 * reach[0] + 1), rng.integers(0, 2 * reach[1] + 1)
            views.append(padded[row, :, top : top + height, left : left + width] * rng.uniform(0.9, 1.1))
        yield torch.stack(views)


def pixel_batches(adapter: ClipAdapter, pairs: PairDataset, how: Encoding) -> Iterator[Tensor]:
    """Yield the images as the model takes them, [B, 3, H, W] on the CPU, in order."""
    for start in range(0, len(pairs), how.batch_size):
        yield pixels_of(adapter, pairs, range(start, min(start + how.batch_size, len(pairs))), how.cache)


def pixels_of(
    adapter: ClipAdapter, pairs: PairDataset, rows: Sequence[int] | np.ndarray, cache: PixelCache | None = None
) -> Tensor:
    """Return some images as the model takes them, [B, 3, H, W] on the CPU."""
    return stack_images([_pixels(adapter, pairs, int(row), cache) for row in rows])


def _pixels(adapter: ClipAdapter, pairs: PairDataset, row: int, cache: PixelCache | None) -> Tensor:
    if cache is not None and adapter.transform is not None:
        return cache.pixels(pairs, row, adapter.transform).cpu()
    image = pairs.image(row)
    if isinstance(image, Tensor):
        return image.cpu()
    if adapter.transform is None:
        raise InputError("the images need a transform and the model brings none: pass transform=")
    return transformed(adapter.transform, image, name_of(pairs, row))


def shares_transform(first: ClipAdapter, second: ClipAdapter, pairs: PairDataset) -> bool:
    """Return whether two models turn images into the same pixels: whether repr and one image agree."""
    if first.transform is second.transform or isinstance(pairs.image(0), Tensor):
        return True
    if repr(first.transform) != repr(second.transform):
        return False
    return torch.equal(pixels_of(first, pairs, [0]), pixels_of(second, pairs, [0]))


def encode_captions(adapter: ClipAdapter, captions: Sequence[Any], how: Encoding) -> Tensor:
    """Encode captions; float32 [n, D] on the CPU."""
    tokens = adapter.token_ids(captions)
    with inference(adapter.module, how.device, how.precision):
        return torch.cat([adapter.encode_text(part).float().cpu() for part in tokens.split(how.batch_size)])


def _variants(adapter: ClipAdapter, wordings: Sequence[Wording], how: Encoding) -> Iterator[Variant]:
    if not wordings:
        return
    row: dict[Any, int] = {}
    for caption in (one for wording in wordings for group in wording.captions for one in group):
        row.setdefault(caption_key(caption), len(row))
    text = encode_captions(adapter, list(row), how)
    for wording in wordings:
        means = torch.stack([text[[row[one] for one in group]].mean(0) for group in wording.captions])
        yield Variant(wording.name, wording.concept, F.normalize(means, dim=-1))


def _encode(adapter: ClipAdapter, pairs: PairDataset, how: Encoding, name: str) -> EncodedPairs:
    encoded = encode_pairs(
        adapter,
        pairs,
        batch_size=how.batch_size,
        device=how.device,
        precision=how.precision,
        num_workers=how.num_workers,
        progress=how.progress,
        ranks=how.ranks,
        cache=how.cache if how.num_workers == 0 else None,
    )
    try:
        require_finite(encoded, pairs)
    except InputError as error:
        raise InputError(f"the model {name!r} cannot be audited: {error}") from error
    return encoded


def _classed(encoded: EncodedPairs, pairs: PairDataset) -> tuple[Tensor, Tensor, np.ndarray]:
    assert encoded.class_features is not None
    return encoded.image_features, encoded.class_features, np.asarray(pairs.labels)


def _paired(encoded: EncodedPairs) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    image_of = np.repeat(np.arange(len(encoded)), [len(rows) for rows in encoded.caption_index])
    return encoded.image_features, encoded.caption_features, image_of, np.concatenate(encoded.caption_index)
