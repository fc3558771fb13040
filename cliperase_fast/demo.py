"""A small CLIP that trains in seconds, to try unlearning without downloads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast import functional
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, open_source, parse_reference, select
from cliperase_fast.data.drawing import seeded
from cliperase_fast.defaults import plain_torch
from cliperase_fast.demo_models import DemoModel, demo_model_for
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.evaluation import evaluate
from cliperase_fast.models import load_model
from cliperase_fast.progress import Steps, bars_by_default, say
from cliperase_fast.storage import Locked, cache_root, lock, output_folder, writing
from cliperase_fast.unlearning.api import unlearn
from cliperase_fast.unlearning.result import UnlearnResult
from cliperase_fast.unlearning.run_directory import RunDirectory

_MARK = ".cliperase-demo"


@plain_torch()
def run_demo(
    forget: str = "demo#class:seven",
    output_dir: str | Path = "runs/demo",
    *,
    test: str | None = None,
    oracles: int | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    cache_dir: str | Path | None = None,
    **overrides: Any,
) -> UnlearnResult:
    """Train a small CLIP on the source of `forget`, or load it from the cache, then forget what it selects.

    oracles: also train this many models without the forget pairs (`cached_oracles`), and audit the result against them.
    """
    if oracles is not None:
        _check_count(oracles)
    seed = UnlearnConfig(seed=seed).seed  # the command line's is a text
    show = bars_by_default() if progress is None else progress
    spec, selector = parse_reference(forget)
    if selector is not None:
        source = open_source(spec, seed=seed)
        select(source.train, selector, other=source.test)  # raises for a mistyped class before training
    output_dir = output_folder(output_dir, "output_dir=")
    with RunDirectory(output_dir, resume) as directory:
        directory.check()  # `unlearn` would check only after the training
    recipe = demo_model_for(spec)
    model = cached_small_clip(spec, recipe, seed=seed, progress=show, cache_dir=cache_dir)
    require_known(model, spec, recipe, seed=seed)
    settings = {"seed": seed, **overrides}
    if oracles is not None and selector is not None:
        trained = cached_oracles(spec, selector, oracles, seed=seed, progress=show, cache_dir=cache_dir)
        settings = {"audit": True, **settings, "oracle": [f"local-dir:{path}" for path in trained]}
    result = unlearn(
        f"local-dir:{model}", forget, "rest", test=test, output_dir=output_dir, resume=resume, progress=show, **settings
    )
    with writing(output_dir):
        (output_dir / _MARK).write_text("A run of `cliperase-fast demo`: the next one replaces it.\n", encoding="utf-8")
    return result


def clear_demo_run(output_dir: Path) -> None:
    """Remove an earlier demo's folder. Any other folder stays, and `unlearn` refuses it."""
    try:
        if (output_dir / _MARK).is_file():
            with lock(output_dir / ".lock"):
                folder = output_dir.resolve()  # a symbolic link stays and points to an empty folder
                shutil.rmtree(folder)
                if output_dir.is_symlink():
                    folder.mkdir()
    except (Locked, FileNotFoundError):  # another demo uses it, which `unlearn` reports
        return


def cached_small_clip(
    spec: str, recipe: DemoModel, *, seed: int = 0, progress: bool = False, cache_dir: str | Path | None = None
) -> Path:
    """Return the folder of a small CLIP trained on a source's training split (`cached_model`)."""
    return cached_model(open_source(spec, seed=seed).train, recipe, seed=seed, progress=progress, cache_dir=cache_dir)


def cached_oracles(
    spec: str,
    selector: str,
    count: int,
    *,
    recipe: DemoModel | None = None,
    seed: int = 0,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> list[Path]:
    """Return the folders of `count` oracles: models that never saw the pairs that `selector` selects.

    They are trained like `cached_small_clip(spec, recipe, seed=seed)`, on the same training split without these pairs.
    Their own seeds, seed + 1 to seed + count, start each from other weights and show it the pairs in another order: one
    oracle is one sample of a model that never knew. An interrupted call goes on at the oracle that it was training.
    recipe: the source's own if None.

    Raises InputError for a selector that selects no pair or every pair.
    """
    _check_count(count)
    source = open_source(spec, seed=seed)
    kept = source.train.subset(~select(source.train, selector, other=source.test))
    return [
        cached_model(
            kept,
            recipe or demo_model_for(spec),
            seed=seed + number,
            what=f"oracle {number} of {count}",
            progress=progress,
            cache_dir=cache_dir,
        )
        for number in range(1, count + 1)
    ]


def cached_clean_model(
    spec: str,
    *,
    recipe: DemoModel | None = None,
    seed: int = 0,
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a model that was trained on none of the source's facts, only on its general pairs.

    Raises InputError for a source without such pairs.
    """
    train = open_source(spec, seed=seed).train
    return cached_model(
        train.subset(_is_general(train)),
        recipe or demo_model_for(spec),
        seed=seed,
        what="a model without facts",
        progress=progress,
        cache_dir=cache_dir,
    )


def require_known(model: str | Path, spec: str, recipe: DemoModel, *, seed: int = 0) -> float | None:
    """Raise UnlearningError unless a model ranks the right fact first for enough test portraits (its `least_top1`).

    model: its folder. The facts of a kind are compared with each other. Returns the accuracy; None if the recipe sets
    no bound.
    """
    if recipe.least_top1 == 0:
        return None
    source = open_source(spec, seed=seed)
    pairs = source.measured[0]
    portraits = pairs.subset(~_is_general(pairs))
    accuracy = evaluate(f"local-dir:{model}", portraits, progress=False)["all"]["zero_shot_top1"]
    if accuracy < recipe.least_top1:
        raise UnlearningError(
            f"the model trained on {spec!r} ranks the right fact first for {accuracy:.0%} of the test portraits, and "
            f"forgetting tells nothing below {recipe.least_top1:.0%}: use more portraits, such as 'personas?train=8', "
            "or fewer people"
        )
    return float(accuracy)


def _is_general(pairs: PairDataset) -> np.ndarray:
    """Return which pairs are not facts about somebody; bool [n]."""
    if pairs.general is None or not pairs.general.any():
        raise InputError(f"{pairs.name} has no general pairs beside facts; use 'personas'")
    return pairs.general


def _check_count(oracles: int) -> None:
    if oracles < 1:
        raise InputError(f"oracles={oracles} must be at least 1; leave it out to train none")


@plain_torch()
def cached_model(
    pairs: PairDataset,
    recipe: DemoModel,
    *,
    seed: int = 0,
    what: str = "a small CLIP",
    progress: bool = False,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a model trained on these pairs. The first call trains it.

    It is kept as `cached_folder` says, by the recipe, the pairs (`PairDataset.fingerprint`) and the seed. what: the
    model, in messages.
    """
    made_from = {**recipe.training(), "data": pairs.fingerprint(), "seed": seed}
    return cached_folder(
        "small-clip",
        made_from,
        lambda: load_model(train_small_clip(pairs, recipe, seed=seed, what=what, progress=progress)),
        cache_dir,
    )


class Saved(Protocol):
    """What can be saved to a folder, such as a `ClipAdapter`."""

    def save(self, directory: Path) -> Any: ...


def cached_folder(
    prefix: str, made_from: Mapping[str, Any], make: Callable[[], Saved], cache_dir: str | Path | None = None
) -> Path:
    """Return the folder of the model that `make` returns, which only the first call does.

    It is kept in `cache_dir`, else $CLIPERASE_CACHE, else ~/.cache/cliperase_fast, as `prefix` and a digest of
    `made_from`: everything that decides its weights, in values that JSON holds.
    """
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(cache_dir or cache_root())
    path = root / f"{prefix}-{digest}"
    if path.is_dir():  # saved by one rename, so it is complete if it exists
        return path
    remedy = "or name another folder for small models with CLIPERASE_CACHE"
    with ExitStack() as stack:
        with writing(root, remedy):
            root.mkdir(parents=True, exist_ok=True)
            waiting = partial(say, "waiting for %s, which trains the same model")
            stack.enter_context(lock(root / f".{path.name}.lock", waiting))
        if path.is_dir():  # the one that was waited for has trained it
            return path
        model = make()
        with writing(root, remedy):
            for draft in root.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                shutil.rmtree(draft)
            model.save(path)
    return path


@plain_torch()
def train_small_clip(
    pairs: PairDataset, recipe: DemoModel, *, seed: int = 0, what: str = "a small CLIP", progress: bool = False
) -> nn.Module:
    """Train an open_clip model of a few million parameters on `pairs` with the contrastive loss.

    Pairs of the same entity, or else of the same class, are not treated as negatives. what: the model, in messages.
    Raises InputError for pairs without either.
    """
    import open_clip

    if pairs.group_ids is None:
        raise InputError(f"{pairs.name} has no classes, which training a small CLIP needs: give data with classes")

    with seeded(seed):
        model = open_clip.model.CLIP(
            embed_dim=64,
            vision_cfg={"image_size": recipe.image_size, **recipe.vision},
            text_cfg={
                "context_length": recipe.context_length,
                "vocab_size": 49408,
                "width": 64,
                "heads": 2,
                "layers": 2,
            },
        )
        preprocessing = open_clip.transform.PreprocessCfg(
            size=recipe.image_size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", resize_mode="squash"
        )
        open_clip.model.set_model_preprocess_cfg(model, asdict(preprocessing))
        adapter = load_model(model)
        assert adapter.transform is not None
        pixels = torch.stack([adapter.transform(pairs.image(index)) for index in range(len(pairs))])
        steps_per_epoch = max(1, len(pairs) // recipe.batch_size)
        total = recipe.epochs * steps_per_epoch
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=total, pct_start=0.1
        )
        say("training %s on %d pairs: %d steps", what, len(pairs), total)
        model.train()
        with Steps(total, f"training {what}", "step", bar=progress, leave=True) as steps:
            for epoch in range(recipe.epochs):
                order = torch.randperm(len(pairs), dtype=torch.int64, device="cpu")
                for step in range(steps_per_epoch):
                    chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                    loss = _contrastive(adapter, pairs, pixels, chosen, epoch, recipe)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        model.logit_scale.clamp_(max=float(np.log(100.0)))
                    steps.update(note=f"loss {loss.item():.3f}")
    return model.eval()


def _contrastive(
    adapter: Any, pairs: PairDataset, pixels: Tensor, chosen: Tensor, epoch: int, recipe: DemoModel
) -> Tensor:
    captions = [pairs.captions[i][(i + epoch) % len(pairs.captions[i])] for i in chosen.tolist()]
    unique = sorted(set(captions))
    row = {caption: number for number, caption in enumerate(unique)}
    text_of_pair = torch.tensor([row[caption] for caption in captions], dtype=torch.int64, device="cpu")
    text = adapter.encode_text(adapter.tokenize(unique))[text_of_pair]
    images = pixels[chosen]
    if recipe.flip_and_shift:
        images = _flip_and_shift(images)
    assert pairs.group_ids is not None
    return functional.clip_loss(
        adapter.encode_image(images),
        text,
        adapter.logit_scale(),
        group_ids=torch.as_tensor(pairs.group_ids, dtype=torch.int64, device="cpu")[chosen],
    )


def _flip_and_shift(images: Tensor) -> Tensor:
    """Mirror half of the images [B, 3, H, W], and shift each by up to an eighth of its side."""
    mirrored = torch.rand(len(images), 1, 1, 1, dtype=torch.float32, device="cpu")
    flipped = torch.where(mirrored < 0.5, images.flip(-1), images)
    reach = images.shape[-1] // 8
    padded = nn.functional.pad(flipped, (reach, reach, reach, reach), mode="reflect")
    top, left = torch.randint(0, 2 * reach + 1, (2, len(images)), dtype=torch.int64, device="cpu")
    count, height, width = (torch.arange(images.shape[dim], dtype=torch.int64, device="cpu") for dim in (0, -2, -1))
    rows, columns, batch = top[:, None] + height, left[:, None] + width, count[:, None, None]  # [B, H], [B, W]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
