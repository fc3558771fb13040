"""Test whether a linear classifier still finds the forget images inside the image tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from cliperase_fast.auditing.features import Encoding, pixel_batches, sample
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data import PairDataset
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import inference


def probe_hits(
    adapter: ClipAdapter, sets: AuditSets, layout: Layout, how: Encoding
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return for each block which test images the probe classifies correctly, bool [n]; and which are forget images.

    The features of an image after a block are the mean over its tokens or positions; "features" are the model's image
    features. scikit-learn's LogisticRegression with balanced class weights is fitted on training images (at most 2,048
    of each kind), forget against rest, standardised by their mean and deviation. At most 2,048 test images of each
    kind.
    """
    forget, retain = sample(sets.forget, how.seed), sample(sets.retain, how.seed)
    mine = sample(sets.test.subset(layout.forget_images), how.seed)
    rest = sample(sets.test.subset(layout.retain_images), how.seed)
    fit = [pooled_features(adapter, pairs, how) for pairs in (forget, retain)]
    told = [pooled_features(adapter, pairs, how) for pairs in (mine, rest)]
    truth = np.arange(len(mine) + len(rest)) < len(mine)
    hits = {}
    for block in fit[0]:
        train = np.concatenate([part[block] for part in fit])
        answers = fit_probe(train, np.arange(len(train)) < len(forget), np.concatenate([part[block] for part in told]))
        hits[block] = answers == truth
    return hits, truth


def fit_probe(train: np.ndarray, is_forget: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return which rows of `test` a logistic regression fitted on `train` classifies as forget images; bool."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return probe.fit(train, is_forget).predict(test).astype(bool)


def pooled_features(adapter: ClipAdapter, pairs: PairDataset, how: Encoding) -> dict[str, np.ndarray]:
    """Return mean-pooled features after each image block as "block 1", ..., and "features"; float64 [n, W]."""
    blocks = adapter.blocks()[0]
    parts: dict[str, list[np.ndarray]] = {}
    with inference(adapter.module, how.device, how.precision):
        for pixels in pixel_batches(adapter, pairs, how):
            with _outputs(blocks) as outputs:
                features = adapter.encode_image(pixels.to(how.device))
            for number, output in sorted(outputs.items()):
                pooled = mean_pooled(output, len(pixels), _batch_first(adapter))
                parts.setdefault(f"block {number + 1}", []).append(pooled.double().cpu().numpy())
            parts.setdefault("features", []).append(features.double().cpu().numpy())
    return {block: np.concatenate(found) for block, found in parts.items()}


def _batch_first(adapter: ClipAdapter) -> bool:
    """Return whether a block's output has the image in its first dimension; some open_clip towers have tokens there."""
    transformer = getattr(getattr(adapter.module, "visual", None), "transformer", None)
    return bool(getattr(transformer, "batch_first", True))


def mean_pooled(output: Tensor, images: int, batch_first: bool = True) -> Tensor:
    """Average tokens [B, L, W] (or [L, B, W]) or maps [B, C, H, W] or [B, H, W, C] to [B, W]; vectors stay.

    A map's channels are taken to be its last dimension where the two before are equal and the first two are not.
    """
    if output.ndim == 3:
        return output.mean(1 if batch_first and len(output) == images else 0)
    if output.ndim == 4:
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.mean((1, 2) if channels_last else (2, 3))
    return output.reshape(images, -1)


@contextmanager
def _outputs(blocks: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect what each block returns in a forward pass inside the block."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                found[number] = first.detach().float()

        return hook

    handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
