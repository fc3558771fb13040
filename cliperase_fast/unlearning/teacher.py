"""The frozen teacher's features of training pairs: computed once and kept, or computed in every step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.data import PairDataset
from cliperase_fast.data.loading import PixelCache, stack_images
from cliperase_fast.distributed import Ranks
from cliperase_fast.evaluation import Background
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import inference
from cliperase_fast.models.tower_features import with_tower_features
from cliperase_fast.progress import say
from cliperase_fast.unlearning.batches import Batch, CaptionTable, PixelDataset
from cliperase_fast.unlearning.engines.base import pad_rows
from cliperase_fast.unlearning.engines.zero3 import ShardedTeacher
from cliperase_fast.unlearning.feature_file import FeatureFile
from cliperase_fast.unlearning.identity import transform_identity
from cliperase_fast.unlearning.related import (
    SIMILAR,
    UNRELATED,
    PairFeatures,
    related_pairs,
    relatives_of,
    with_most_similar,
    with_related_levels,
)
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.runtime import Runtime

# Returns an adapter whose encoders return more after the features. Takes an adapter and whether it is the teacher's.
Widen = Callable[[ClipAdapter, bool], ClipAdapter]
_Keep = Callable[[int, np.ndarray], None]  # takes the number of the first row, and rows [n, D°]

# Retain pairs up to which all give the background levels, and how many of more.
BACKGROUND_WHOLE, BACKGROUND_SAMPLE = 10_000, 4_096
MEMORY_LIMIT = 2**30  # bytes of cached features above which `auto` keeps them in a file


class Teacher(Protocol):
    """Teacher features of the retain pairs of a batch, image [N, D°] and text [N, D°]; with `joint` of all M + N pairs.

    float32, on the training device.
    """

    joint: bool

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]: ...


class LiveTeacher:
    """Encodes every batch. Random transforms need it, as the teacher must see the student's view.

    joint: see `Teacher`. equal_parts: every rank encodes the same number of parts. A sharded teacher needs it, as each
        part gathers parameters from all ranks.
    """

    def __init__(
        self, adapter: ClipAdapter | ShardedTeacher, runtime: Runtime, joint: bool = False, equal_parts: bool = False
    ) -> None:
        self.adapter, self.runtime, self.joint, self.equal_parts = adapter, runtime, joint, equal_parts

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        count, device = batch.count(self.joint), self.runtime.device
        unique, inverse = torch.unique(batch.text_of_pair[-count:], return_inverse=True)
        with inference(self.adapter.module, device, self.runtime.precision):
            image = self._encode(self.adapter.encode_image, batch.pixels[-count:])
            text = self._encode(self.adapter.encode_text, batch.tokens[unique])
        return image, text[inverse.to(device)]

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:  # [B, ...] -> [B, D°]
        count = -(-len(inputs) // self.runtime.batch_size)
        if self.equal_parts:
            (count,) = self.runtime.ranks.all_reduce_max(count)
        parts = pad_rows(inputs, count).tensor_split(count)
        return torch.cat([encode(part.to(self.runtime.device)).float() for part in parts])[: len(inputs)]


class CachedTeacher:
    """Features encoded once for the pairs a run will visit, in memory or in a file."""

    def __init__(
        self,
        image: np.ndarray | FeatureFile,
        text: Tensor,
        row_of_index: np.ndarray,
        device: torch.device,
        joint: bool = False,
        width: int | None = None,
        row_of_caption: np.ndarray | None = None,
    ) -> None:
        self.image = image  # [rows, D°] float32
        self.text = text  # [U, D°] float32
        self.row_of_index = row_of_index  # [training pairs]
        self.row_of_caption = row_of_caption  # [captions], None if `text` has all of them
        self.device, self.joint = device, joint
        self.width = width  # D of the features if more follows them, else None

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = self.row_of_index[batch.pairs[-batch.count(self.joint) :]]
        image = torch.from_numpy(np.ascontiguousarray(self.image[rows]))
        captions = self.caption_rows(batch.caption_of_pair[-len(rows) :])
        text = self.text[torch.as_tensor(captions, dtype=torch.int64, device="cpu")]
        return image.to(self.device), text.to(self.device)

    def has(self, pairs: np.ndarray, captions: np.ndarray | None) -> bool:
        """Return whether it has these training pairs, and these captions of the table or, for None, all of them."""
        known = self.row_of_caption
        text = known is None or (captions is not None and bool((known[captions] >= 0).all()))
        return text and bool((self.row_of_index[pairs] >= 0).all())

    def caption_rows(self, captions: np.ndarray) -> np.ndarray:
        """Return the rows of `text` for captions of the table."""
        return captions if self.row_of_caption is None else self.row_of_caption[captions]


def make_teacher(
    run: Run,
    batches: int,
    *,
    joint: bool = False,
    whole: bool = False,
    widen: Widen | None = None,
) -> Teacher:
    """Return the run's teacher, live or cached for the pairs that so many batches visit.

    joint: for all pairs of a batch, not only for its retain pairs. whole: cache all training pairs, for the background,
    unless that is measured on a sample.
    widen: see `Widen`; None for the features alone.
    """
    setup = run.setup
    frozen, zero = setup.models.teacher, setup.deepspeed
    assert frozen is not None
    if widen is not None:
        frozen = widen(frozen, True)
    if setup.teacher_is_live:
        if zero is not None and zero["zero_optimization"]["stage"] == 3:
            return LiveTeacher(ShardedTeacher(frozen, zero, run.runtime.device), run.runtime, joint, equal_parts=True)
        return LiveTeacher(frozen, run.runtime, joint)
    whole = whole and run.loader.plan.n_retain <= BACKGROUND_WHOLE
    used, rows = run.loader.drawn(batches, forget=joint, whole=whole)
    if widen is None:
        return _cache_of_run(run, used, joint, rows=rows)
    cached = _cache_of_run(run, used, joint, frozen, rows)
    cached.width = run.feature_width
    return cached


def wide_adapter(run: Run, adapter: ClipAdapter, teaches: bool = False) -> ClipAdapter:
    """Return `with_tower_features` of a model of the run."""
    with run.runtime.inference(adapter):
        pixels = stack_images([run.loader.pixels[0, 0]]).to(run.runtime.device)
        return with_tower_features(adapter, pixels, run.captions.rows([0]))


def measure_background(run: Run, teacher: Teacher | None) -> Background:
    """Compute the background levels of the teacher's features of the training split, once.

    teacher: has them already if it caches all pairs; otherwise they are encoded here, with the transform of evaluation.
    Of more than `BACKGROUND_WHOLE` retain pairs a sample counts, with one caption each. Which classes have
    levels of their own depends on `Run.forget_level`.
    """
    train, of_pair, level = run.data.train, run.captions.of_pair, run.forget_level
    n_retain, rows, seed = len(train.pairs) - train.n_forget, None, run.settings.seed
    whole = n_retain <= BACKGROUND_WHOLE

    def index(part: np.ndarray) -> list[np.ndarray]:  # of their captions in the table
        own = [of_pair[pair] for pair in map(int, part)]
        return own if whole else [of[[pair % len(of)]] for pair, of in zip(map(int, part), own, strict=True)]

    relatives = {} if level == UNRELATED else relatives_of(train, level == SIMILAR)
    of_class = related_pairs(train, relatives, None if whole else BACKGROUND_SAMPLE, seed)
    if whole:
        pairs, used = np.arange(train.n_forget, len(train.pairs)), np.arange(len(train.pairs))
    else:
        drawn = np.random.default_rng([seed, n_retain]).permutation(n_retain)[:BACKGROUND_SAMPLE]
        pairs = np.unique(run.loader.readable(train.n_forget + np.sort(drawn)))
        of_class = {label: _of_label(run, found, label) for label, found in of_class.items()}
        used = np.unique(np.concatenate([pairs, *of_class.values()]))
        rows = None if run.captions.complete else np.unique(np.concatenate(index(used)))
    if not (isinstance(teacher, CachedTeacher) and teacher.has(used, rows)):
        teacher = _cache_of_run(run, used, False, rows=rows, name="background")
    width = teacher.width
    image, row_of_index, text = teacher.image, teacher.row_of_index, teacher.text[:, :width]

    def images(part: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(image[row_of_index[part]][:, :width]))

    def captions(part: np.ndarray) -> list[np.ndarray]:
        return [teacher.caption_rows(own) for own in index(part)]

    features = PairFeatures(images, text, captions)
    background = features.means(pairs)
    if level == SIMILAR:
        relatives, of_class = with_most_similar(relatives, train, pairs, of_class, features)
    return with_related_levels(background, relatives, of_class, features)


def _of_label(run: Run, pairs: np.ndarray, label: int) -> np.ndarray:
    """Return the pairs to use in place of these, those of another class left out."""
    labels = run.data.train.pairs.labels
    assert labels is not None
    found = np.unique(run.loader.readable(pairs))
    return found[labels[found] == label]


def _cache_of_run(
    run: Run,
    used: np.ndarray,
    joint: bool,
    wide: ClipAdapter | None = None,
    rows: np.ndarray | None = None,
    name: str = "teacher",
) -> CachedTeacher:
    """Cache the `used` training pairs. A random transform is replaced by that of evaluation.

    wide: the teacher whose encoders return more after the features. rows: see `cache_teacher`. name: of a file of them.
    """
    teacher, loader, where = run.setup.models.teacher, run.loader, run.settings.teacher_cache
    assert teacher is not None
    width = None
    if wide is not None:
        with run.runtime.inference(teacher):
            width = wide.encode_image(stack_images([loader.pixels[0, 0]]).to(run.runtime.device)).shape[1]
    return cache_teacher(
        wide or teacher,
        run.data.train.pairs,
        run.captions,
        used,
        run.runtime,
        transform=teacher.transform if run.setup.random_views else loader.pixels.transform,
        where="auto" if where == "off" else where,  # off: the training does not use them
        directory=run.directory / "cache",
        pixels=loader.pixels.cache,
        joint=joint,
        image_width=width,
        rows=rows,
        name=name,
    )


def cache_teacher(
    adapter: ClipAdapter,
    pairs: PairDataset,
    captions: CaptionTable,
    used: np.ndarray,
    runtime: Runtime,
    *,
    transform: Callable[[Any], Tensor] | None,
    where: str,
    directory: Path | None,
    pixels: PixelCache | None = None,
    joint: bool = False,
    image_width: int | None = None,
    rows: np.ndarray | None = None,
    name: str = "teacher",
) -> CachedTeacher:
    """Encode the `used` pairs (sorted indices) and captions, a part on each rank; every rank gets all.

    rows: of the captions to encode, sorted; None for all.

    where: "memory", "disk" (a file in `directory` on each machine), or "auto" (a file above `MEMORY_LIMIT` bytes if
    there is a directory). image_width: of an adapter whose image features are not as wide as its text features.
    A complete file that an interrupted run left is reused if it was made from the same inputs.
    """
    ranks = runtime.ranks
    if ranks.first:
        say("computing the teacher's features of %d pairs", len(used))
    text = _encode_captions(adapter, captions, runtime, rows)  # [U, D°]
    row_of_caption = None
    if rows is not None:
        row_of_caption = np.full(len(captions), -1, dtype=np.int64)
        row_of_caption[rows] = np.arange(len(rows))
    shape = (len(used), image_width or text.shape[1])
    row_of_index = np.full(len(pairs), -1, dtype=np.int64)
    row_of_index[used] = np.arange(len(used))
    large = shape[0] * shape[1] * 4 > MEMORY_LIMIT
    if directory is None or where == "memory" or (where == "auto" and not large):
        image = np.empty(shape, dtype=np.float32)

        def keep(start: int, rows: np.ndarray) -> None:
            image[start : start + len(rows)] = rows

        _encode_images(adapter, pairs, used, keep, transform, runtime, pixels)
        return CachedTeacher(image, text, row_of_index, runtime.device, joint, row_of_caption=row_of_caption)

    made_from = {
        "model": adapter.identity(),
        "data": pairs.fingerprint(),
        "transform": transform_identity([transform], pairs),
        "precision": runtime.precision,
        "shape": list(shape),
        "used": hashlib.sha256(used.tobytes()).hexdigest(),
    }
    part = "" if ranks.size == 1 else f"-{ranks.rank - ranks.local_rank}"
    file = FeatureFile(directory / f"{name}_image_features{part}.f32", shape, made_from)
    _fill(file, ranks, lambda keep: _encode_images(adapter, pairs, used, keep, transform, runtime, pixels))
    return CachedTeacher(file, text, row_of_index, runtime.device, joint, row_of_caption=row_of_caption)


def _fill(file: FeatureFile, ranks: Ranks, encode: Callable[[_Keep | None], None]) -> None:
    """Complete the file of each machine, unless all of them are complete. The first rank of a machine writes it.

    encode: encodes all images and passes the features to its argument.
    """
    writes = ranks.local_rank == 0

    def usable() -> bool:
        state = file.state()
        if state == "damaged":
            warnings.warn(f"{file.path} is damaged or missing; the teacher's features are computed again", stacklevel=2)
        if state != "whole":
            file.create()
        return state == "whole"

    if all(ranks.gather_results(lambda: not writes or usable())):
        return
    try:
        encode(file.write if writes else None)
        ranks.gather_results(lambda: file.finish() if writes else None)  # no rank opens it earlier
    except BaseException:
        if writes:
            file.discard()
        raise


def _encode_captions(adapter: ClipAdapter, captions: CaptionTable, runtime: Runtime, rows: np.ndarray | None) -> Tensor:
    chosen = torch.as_tensor(np.arange(len(captions)) if rows is None else rows, dtype=torch.int64, device="cpu")
    parts = chosen.split(runtime.batch_size)
    shares = runtime.ranks.shares(len(parts))
    own = parts[shares[runtime.ranks.rank]]
    with runtime.inference(adapter):
        return runtime.ranks.all_gather_rows(
            lambda: [adapter.encode_text(captions.rows(part)).float().cpu() for part in own],
            [sum(map(len, parts[share])) for share in shares],
        )


def _encode_images(
    adapter: ClipAdapter,
    pairs: PairDataset,
    used: np.ndarray,
    keep: _Keep | None,
    transform: Callable[[Any], Tensor] | None,
    runtime: Runtime,
    cache: PixelCache | None,
) -> None:
    """Pass each part to `keep` with the number of its first row. With None, encode only for the other ranks."""

    def keep_rows(start: int, rows: Tensor) -> None:
        assert keep is not None
        keep(start, rows.numpy().astype(np.float32, copy=False))

    with runtime.inference(adapter):
        runtime.encode_images(
            PixelDataset(pairs, transform, None, cache),
            used,
            lambda pixels: adapter.encode_image(pixels).float(),
            None if keep is None else keep_rows,
            "teacher's features",
        )
