"""`select_by_query()`: the pairs whose images are most similar to a text or to example images, by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cliperase_fast.coercion import shortly, whole
from cliperase_fast.data import PairDataset, as_pairs, open_source, parse_reference, select
from cliperase_fast.data.decoding import decode, item_image, tensor_fault
from cliperase_fast.data.intake import ItemError, Tally
from cliperase_fast.data.loading import stack_images, transformed
from cliperase_fast.data.pair_sets import read_pairs
from cliperase_fast.data.sources import require_indexed
from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.encoding import image_feature_parts
from cliperase_fast.evaluation.evaluating import check_settings
from cliperase_fast.evaluation.ranking import PART, best_rows, cosines, mean_query
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import in_float32, inference, pick_device, refuse_inputs
from cliperase_fast.plurals import counted
from cliperase_fast.progress import Steps, bars_by_default, say
from cliperase_fast.reading import user_path
from cliperase_fast.report.contact_sheet import Group, contact_sheet, thumbnails
from cliperase_fast.report.rendering import write_page
from cliperase_fast.storage import write_text_atomically, writing
from cliperase_fast.unlearning.feature_file import FeatureFile
from cliperase_fast.unlearning.identity import input_digests

SHOWN, AROUND = 96, 24  # pictures of the most similar pairs, and on each side of the cut
_CHECKED = 1024  # rows of given features whose lengths are checked
_LENGTH_ERROR = 0.01  # bfloat16 rounds by less


@dataclass(frozen=True)
class QueryMatches:
    """The pairs that a query found.

    query: in words. pairs: all pairs that were ranked. similarities: the cosine of each of them, float32 [n]; NaN for
    none. rows: of the pairs found, the most similar first. also: ids of the source's test pairs that are as similar,
    so that the forgetting is measured on them. skipped: what was left out.
    """

    query: str
    pairs: PairDataset
    similarities: np.ndarray
    rows: np.ndarray
    also: list[str] = field(default_factory=list)
    skipped: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[str]:
        """The ids of the pairs found, the most similar first."""
        return [self.pairs.ids[row] for row in self.rows]

    @property
    def found(self) -> PairDataset:
        """The pairs found, for `unlearn(forget=...)`."""
        return self.pairs.subset(self.rows)

    @property
    def rest(self) -> PairDataset:
        """All other pairs."""
        return self.pairs.without(self.rows)

    def save_ids(self, path: str | Path) -> Path:
        """Write the ids, one a line, for the selector `ids:FILE`; those of test pairs too."""
        odd = next((name for name in (*self.ids, *self.also) if name != name.strip() or set("\r\n") & set(name)), None)
        if odd is not None:
            raise InputError(f"the id {odd!r} does not fit into a file of ids: rename that image")
        path = user_path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, "".join(f"{name}\n" for name in (*self.ids, *self.also)))
        return path

    def save_sheet(self, path: str | Path) -> Path:
        """Write a page with pictures of the most similar pairs and of those on both sides of the cut."""
        with writing(path):
            return write_page(self.sheet(), path)

    def sheet(self) -> str:
        """Return that page."""
        values = self.similarities
        order = best_rows(values, k=len(self) + AROUND)
        below = order[np.isin(order, self.rows, invert=True)][:AROUND].tolist()

        def group(heading: str, text: str, rows: Sequence[int]) -> Group:
            return Group(heading, text, thumbnails(self.pairs, rows, [f"{values[row]:.3f}" for row in rows]))

        groups = [group("The most similar", "These would be forgotten.", self.rows[:SHOWN].tolist())]
        last = self.rows[max(SHOWN, len(self) - AROUND) :].tolist()
        if last:
            groups.append(group("The last that were found", "Should they still be forgotten?", last))
        if below:
            groups.append(group("The next, which were not found", "Should they be forgotten too?", below))
        facts = [
            ("Data", self.pairs.name),
            ("Found", f"{len(self)} of {len(self.pairs)} pairs"),
            ("Similarity", f"{values[self.rows[-1]]:.3f} to {values[self.rows[0]]:.3f}, a cosine"),
            *([("Test pairs", f"{len(self.also)} as similar")] if self.also else []),
        ]
        return contact_sheet(self.query, "Pairs found by a query", facts, groups)


@plain_torch()
def select_by_query(
    model: Any,
    data: Any,
    query: Any,
    *,
    k: int | None = None,
    threshold: float | None = None,
    features: str | Path | Tensor | None = None,
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    on_error: str = "raise",
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    num_workers: int = 0,
    progress: bool | None = None,
) -> QueryMatches:
    """Find the pairs whose images the model finds most similar to a query, to forget them.

    model: whatever `unlearn()` takes.
    data: a dataset of (image, caption) pairs, "SOURCE" or "SOURCE#SELECTOR". The test split of a source is ranked too.
    query: a text such as "photos of a red car", an example image (PIL, or a `Path`), or a list of these, whose mean
        direction counts.
    k, threshold: how many pairs are found at most, and the least cosine. At least one of them is needed.
    features: a file that keeps the image features, so that further queries need few images; it is written if it does
        not exist, or if it was made with another model, transform or precision, or from other pairs. Or the features
        themselves, unit rows [n, D].
    tokenizer, transform: needed only if the model does not have its own.
    on_error: for unreadable images: "raise", or "skip" to leave them out and count them.
    batch_size, device, precision, num_workers, progress: as in `evaluate()`.

    Memory holds one similarity for each pair and one batch; features are not kept in it. Raises `InputError` for wrong
    arguments, and if nothing or everything matches.
    """
    if k is None and threshold is None:
        raise InputError("say how many pairs to find: give k=, or the least similarity threshold=")
    k = None if k is None else whole("k", k, 1)
    if threshold is not None and not (isinstance(threshold, Real) and -1 <= threshold <= 1):
        raise InputError(f"threshold={threshold} must be a cosine, a number between -1 and 1")
    chosen = pick_device(device)
    batch_size, num_workers = whole("batch_size", batch_size, 1), whole("num_workers", num_workers, 0)
    check_settings(precision, chosen, "error")
    named = isinstance(features, (str, Path)) and Path(features).name
    if not (features is None or isinstance(features, Tensor) or named):
        raise InputError(f"features={shortly(features)} must be the name of a file, or a tensor [n, D]")
    show = bars_by_default() if progress is None else progress
    train, test = _open(data, on_error)
    skipped = Tally()
    if on_error == "skip" and not isinstance(features, Tensor):
        train = read_pairs(train, train.name, skipped, on_error=on_error, progress=show)
        test = None if test is None else read_pairs(test, test.name, skipped, on_error=on_error, progress=show)
    adapter = in_float32(load_model(model, tokenizer=tokenizer, transform=transform, device=chosen))
    check_weights(adapter, "model")
    words = _in_words(query)
    with inference(adapter.module, chosen, precision):
        direction = mean_query(_encoded_query(adapter, query, chosen))

    def ranked(pairs: PairDataset, given: Any) -> np.ndarray:
        width = direction.shape[-1]
        parts = _features(adapter, pairs, given, width, batch_size, chosen, precision, num_workers, show)
        return cosines(parts, direction, len(pairs))

    say("ranking %d images of %s", len(train), train.name)
    similarities = ranked(train, features)
    rows = best_rows(similarities, k=k, threshold=threshold)
    _check_found(rows, similarities, train, words, threshold)
    also = []
    if test is not None:
        of_test = ranked(test, None if features is None or isinstance(features, Tensor) else _beside(Path(features)))
        also = [test.ids[row] for row in best_rows(of_test, threshold=float(similarities[rows[-1]]))]
    return QueryMatches(words, train, similarities, rows, also, skipped.to_dict())


def _open(data: Any, on_error: str) -> tuple[PairDataset, PairDataset | None]:
    """Return the pairs to rank, and the test pairs of their source."""
    if not isinstance(data, str):
        pairs, test = as_pairs(data, "data", on_error=on_error), None
    else:
        spec, selector = parse_reference(data)
        require_indexed(spec)
        source = open_source(spec, on_error=on_error)
        pairs, test = source.train, source.test
        if selector is not None:
            pairs = pairs.subset(select(pairs, selector, other=test))
            test = None  # the selector may match none of it
    if len(pairs) < 2:
        raise InputError(f"{pairs.name} has {counted(len(pairs), 'pair')}; ranking needs at least two")
    return pairs, test


def _in_words(query: Any) -> str:
    parts = list(query) if isinstance(query, (list, tuple)) else [query]
    if not parts:
        raise InputError("the query is an empty list: give a text or an example image")
    return ", ".join(part if isinstance(part, str) else str(part) if isinstance(part, Path) else "an example image"
                     for part in parts)  # fmt: skip


def _encoded_query(adapter: ClipAdapter, query: Any, device: torch.device) -> Tensor:  # [Q, D]
    parts = list(query) if isinstance(query, (list, tuple)) else [query]
    features = []
    for part in parts:
        if isinstance(part, str):
            if not part.strip():
                raise InputError("the query is an empty text: describe what to find, such as 'photos of a red car'")
            tokens = adapter.tokenize([part], truncate=True)
            if part in adapter.cut_captions:
                raise InputError(
                    f"the query has {adapter.cut_captions[part]} tokens (start and end tokens included) and the "
                    f"model's context holds {tokens.shape[1]}: shorten it, or give several texts"
                )
            features.append(adapter.encode_text(tokens))
            continue
        image = decode(str(part), str(part)) if isinstance(part, Path) else part
        if isinstance(image, Image.Image):
            if adapter.transform is None:
                raise InputError("the example image needs a transform and the model brings none: pass transform=")
            image = transformed(adapter.transform, item_image(image, "the example image"), "the example image")
        if not isinstance(image, Tensor):
            raise InputError(f"the query is a {type(part).__name__}: give a text, a PIL image or the Path of an image")
        fault = tensor_fault(image)
        if fault is not None:
            raise InputError(f"the example image {fault}")
        failure = f"the model cannot encode an example image of shape {tuple(image.shape)}"
        with refuse_inputs(failure, "give a PIL image, or a tensor [3, H, W] of the size it was built for"):
            features.append(adapter.encode_image(stack_images([image]).to(device)))
    return torch.cat([part.float().cpu() for part in features])


def _features(
    adapter: ClipAdapter, pairs: PairDataset, given: Any, width: int, batch_size: int, device: torch.device,
    precision: str, num_workers: int, progress: bool,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the image features in parts: given, read from a file, or encoded and maybe written to it."""
    if isinstance(given, Tensor):
        _check_features(given, pairs, width)
        yield from given.split(PART)
        return
    file = None
    if given is not None:
        file = _feature_file(Path(given), adapter, pairs, width, precision)
        if file.state() == "whole":
            for start in range(0, len(pairs), PART):
                yield torch.from_numpy(file.part(start, min(start + PART, len(pairs))))
            return
        foreign = file.path if file.note == file.path else file.foreign()
        if foreign is not None:
            raise InputError(
                f"features={str(given)!r} would replace {foreign}, which does not hold features: give another name, "
                "with an ending other than .json (the features have a note of that ending beside them)"
            )
        file.create()
    start = 0
    try:
        with Steps(len(pairs), "encoding", "image", bar=progress) as steps:
            for part in image_feature_parts(adapter, pairs, batch_size, device, precision, num_workers):
                if file is not None:
                    file.write(start, part.numpy())
                start += len(part)
                steps.update(len(part))
                yield part
        if file is not None:
            file.finish()
    except BaseException as error:
        if file is not None:
            file.discard()
        if isinstance(error, ItemError):
            raise InputError(f"{error}, or pass on_error='skip' to leave such images out and count them") from error
        raise


def _check_features(given: Tensor, pairs: PairDataset, width: int) -> None:
    """Raise InputError unless these can be the features of the pairs, unit rows [n, width]."""
    if given.is_meta or given.layout != torch.strided or not given.is_floating_point():
        raise InputError(
            f"features is a {given.dtype} tensor ({given.layout}, on {given.device}): give a dense floating-point "
            "tensor [n, D] with values"
        )
    if given.shape != (len(pairs), width):
        raise InputError(
            f"features is a tensor {list(given.shape)}; {pairs.name} has {counted(len(pairs), 'pair')} and the model's "
            f"features have width {width}: give [{len(pairs)}, {width}]"
        )
    lengths = given[:_CHECKED].detach().float().norm(dim=1)
    wrong = (lengths - 1).abs() > _LENGTH_ERROR  # false for NaN, which is never found
    if bool((wrong & (lengths != 0)).any()):
        raise InputError(
            f"the rows of features have lengths from {float(lengths.min()):.3g} to {float(lengths.max()):.3g}, not 1: "
            "pass torch.nn.functional.normalize(features, dim=1)"
        )


def _feature_file(path: Path, adapter: ClipAdapter, pairs: PairDataset, width: int, precision: str) -> FeatureFile:
    """Return the file of features, which counts as made from other inputs if what can be read of them differs."""
    made_from: dict[str, Any] = {"model": adapter.identity(), "data": pairs.fingerprint(), "precision": precision}
    file = FeatureFile(path, (len(pairs), width), made_from, remedy="or leave out features=, which only saves time")
    seen, kept = input_digests(adapter.transform, pairs), file.noted().get("inputs")
    same = isinstance(kept, list) and len(kept) == len(seen)
    same = same and all(now is None or now == then for now, then in zip(seen, kept or (), strict=True))
    made_from["inputs"] = kept if same else seen
    return file


def _beside(path: Path) -> Path:
    """Return the file of the test split's features."""
    return path.with_name(f"{path.stem}-test{path.suffix}")


def _check_found(
    rows: np.ndarray, similarities: np.ndarray, pairs: PairDataset, words: str, threshold: float | None
) -> None:
    if len(rows) == len(pairs):
        raise InputError(
            f"all {len(pairs)} pairs of {pairs.name} match {words!r}, so nothing would be left to keep: give a smaller "
            "k or a higher threshold"
        )
    if len(rows):
        return
    if not np.isfinite(similarities).any():
        raise InputError(f"the model's features of {pairs.name} are not finite, so nothing can be ranked")
    best = int(np.nanargmax(similarities))
    raise InputError(
        f"no pair of {pairs.name} has a similarity of {threshold:g} to {words!r}: the highest is "
        f"{similarities[best]:.3f} ({pairs.ids[best]!r}); give a lower threshold, or k"
    )
