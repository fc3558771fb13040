"""`unlearn()`: from a model and two sets of pairs to an unlearned model with its evidence."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast._version import installed_versions
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.loading import PixelCache
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.distributed import init_distributed
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import pair_similarities
from cliperase_fast.models import ClipAdapter, load_model, set_trainable
from cliperase_fast.models.fast_paths.blocks import disable_recompute, enable_recompute
from cliperase_fast.models.fast_paths.embedding import merge_rows, train_rows
from cliperase_fast.models.preprocessing import as_transform, try_transform
from cliperase_fast.models.requirements import check_weights, require_trainable
from cliperase_fast.models.runtime import in_float32, weight_dtypes
from cliperase_fast.ops import choose
from cliperase_fast.progress import say
from cliperase_fast.report import verdict
from cliperase_fast.unlearning.batches import BatchLoader, BatchPlan, CaptionTable
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.engines.deepspeed import ShardedTeacher, ZeroEngine, read_deepspeed, restore_torch_linear
from cliperase_fast.unlearning.engines.frozen_features import keep_front
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.evaluator import Evaluator, by_set, embeddings, lowest, per_class
from cliperase_fast.unlearning.identity import tokenizer_identity, transform_identity
from cliperase_fast.unlearning.loggers import require_logger
from cliperase_fast.unlearning.output_model import give_back
from cliperase_fast.unlearning.preflight import check_captions, check_features, check_gradient, check_teacher
from cliperase_fast.unlearning.result import UnlearnResult
from cliperase_fast.unlearning.run_directory import RunDirectory, fixed_settings, resume_from
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Selection
from cliperase_fast.unlearning.splits import PreparedData, Split, open_sets, prepare_data
from cliperase_fast.unlearning.step_effect import merge_lora, notes
from cliperase_fast.unlearning.teacher import LiveTeacher, Teacher, cache_teacher
from cliperase_fast.unlearning.trainer import Trainer


@torch_defaults()
@torch.inference_mode(False)
@torch.enable_grad()
def unlearn(
    model: Any,
    forget: Any,
    retain: Any,
    *,
    test: Any = None,
    teacher: Any = None,
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    templates: Sequence[str] | None = None,
    progress: bool | None = None,
    **overrides: Any,
) -> UnlearnResult:
    """Make `model` forget the associations in `forget` while it keeps those in `retain` (CLIPErase, arXiv 2410.23330).

    model: an open_clip model, a transformers CLIPModel, a module with encode_image, encode_text and logit_scale, or a
        string ("ViT-B-32:openai", "ARCH:/path/to/checkpoint", "local-dir:DIR", a transformers folder). It is left
        untouched. Training is in float32 whatever the weights are; those of an instance in another type are rounded to
        that type once at the end, unless that would undo the forgetting (result.record["weights"] says which).
    forget, retain: map-style datasets of (image, caption) pairs, or source strings: forget "SOURCE#SELECTOR" such as
        "cifar10:/data#class:airplane", retain "rest", "SOURCE" or "SOURCE#SELECTOR". An image is a PIL image or a
        tensor [3, H, W] that is passed on as it is; a caption is a string, a list of strings, or token ids [L].
    test: where the result is measured: a dataset or source of both kinds, or (forget_test, retain_test). By default the
        source's own test split, else a share `test_fraction` of the pairs, which are then not trained on.
    teacher: the model to stay consistent with; by default `model` as it is now.
    tokenizer, transform: inferred for open_clip and transformers models.
    config, overrides: an UnlearnConfig, a mapping or a YAML/JSON file; keywords win over it.
    output_dir: the run directory (checkpoints, metrics, report, model); without it nothing is kept on disk.
    resume: go on from the last checkpoint in output_dir. On the CPU the weights come out as those of an uninterrupted
        run, bit for bit.
    templates: caption templates ("a photo of a {}") of class sources.
    progress: progress bars; by default when standard error is a terminal. Without them the logger "cliperase_fast" has
        a line for each phase and every few seconds (`logging.basicConfig(level=logging.INFO)` shows them).

    Under torchrun or the deepspeed launcher, or where torch.distributed is initialised, every process calls it with the
    same arguments: each has its share of every batch, all get the result, the first shows progress and writes files
    (docs/many-devices.md).

    Returns an `UnlearnResult`. Raises `InputError` before any training when something given is wrong, `UnlearningError`
    when the training fails.
    """
    settings = _settings(config, overrides)
    show = sys.stderr.isatty() if progress is None else progress
    directory = RunDirectory(Path(output_dir) if output_dir is not None else None, resume)
    # What reading data and trying a transform draws must not come from the caller's generators.
    with (
        init_distributed(settings.device, settings.rank_timeout) as ranks,
        directory,
        seeded(settings.seed, gpus=False),
    ):
        runtime = ranks.run_on_all(lambda: Runtime.from_config(settings, show, ranks))
        return _unlearn(
            model, forget, retain, test, teacher, tokenizer, transform, templates, settings, directory, runtime
        )


def _unlearn(
    model: Any,
    forget: Any,
    retain: Any,
    test: Any,
    teacher: Any,
    tokenizer: Callable[[Sequence[str]], Tensor] | None,
    transform: Callable[[Any], Tensor] | None,
    templates: Sequence[str] | None,
    settings: UnlearnConfig,
    directory: RunDirectory,
    runtime: Runtime,
) -> UnlearnResult:
    ranks = runtime.ranks
    began = time.perf_counter()

    # Cheap to get wrong, so looked at before a model is fetched or an image read.
    zero = ranks.run_on_all(lambda: _check_settings(settings, directory, runtime))
    tell = say if ranks.first else _nothing
    tell("opening the data")
    sets = ranks.run_on_all(lambda: open_sets(forget, retain, test, settings, templates=templates))
    ranks.agree({**settings.to_dict(), "the pairs": sets.fingerprint()})
    tell("loading the model")
    given, original, frozen = ranks.run_on_all(lambda: _models(model, teacher, tokenizer, settings, runtime))
    tell("checking the images")
    data = prepare_data(sets, settings, progress=runtime.progress, ranks=ranks)
    train_transform, random_transform = _transforms(original, transform, data.train.pairs)
    if random_transform and settings.teacher_cache in ("memory", "disk"):
        raise InputError(
            f"teacher_cache={settings.teacher_cache!r} needs a deterministic transform and the one given is random (or "
            "the dataset draws its images anew each time); use 'auto' or 'off'"
        )
    frozen.transform = original.transform
    captions = ranks.run_on_all(partial(CaptionTable, data.train.pairs, original.token_ids))
    ranks.run_on_all(partial(check_captions, original, captions, runtime))

    identity = {
        "model": given.identity(),
        "teacher": frozen.identity(),
        "data": data.fingerprint(),
        "transform": transform_identity([train_transform, original.transform], data.train.pairs)
        if directory.path
        else "",
        "tokenizer": tokenizer_identity(original, captions, data.test.pairs),
        "config": fixed_settings(settings),
    }
    ranks.agree({f"the {name}": value for name, value in identity.items() if name != "config"})
    checkpoint = resume_from(directory.path, identity, ranks) if directory.resume else None

    with ExitStack() as stack:
        stack.enter_context(seeded(settings.seed))  # the caller's own random state is put back
        if zero is not None:
            stack.enter_context(restore_torch_linear())
        live = _teacher_is_live(settings, random_transform)
        # A model made here is nobody else's: it is trained itself, once the teacher's features are kept.
        ours = original is not given or isinstance(model, (str, Path))
        student = original if ours and not (live and teacher is None) else original.clone()
        parameters = set_trainable(student, settings.trainable, settings.lora_rank, settings.lora_alpha)
        if settings.weight_decay == 0:
            parameters = train_rows(student, parameters, captions.tokens)
        ranks.run_on_first(partial(directory.check_room, parameters, student, original, settings.keep_checkpoints))

        cache = PixelCache(settings.image_cache_mib * 2**20) if settings.num_workers == 0 else None
        examiner = Evaluator(runtime, cache)
        tell("measuring the model as it is, on %d test pairs", len(data.test.pairs))
        test_before = examiner.encode(original, data.test, finite=True)
        check_features(test_before, data.test.pairs)
        scores_before = examiner.score(test_before, data.test)
        validation_before = examiner.candidate(original, data.validation, 0, 0)

        plan = _plan(settings, data.train)
        loader = BatchLoader(
            data.train.pairs,
            plan,
            captions,
            transform=train_transform,
            random_transform=random_transform,
            group_ids=_group_ids(settings, data.train),
            num_workers=settings.num_workers,
            ranks=ranks,
            cache=cache,
        )
        pixels, tokens = loader.pixels[0, 0], captions.rows([0])
        ranks.run_on_all(partial(check_gradient, student, parameters, pixels, tokens, settings, runtime))
        if settings.lambda_consistency > 0:
            ranks.run_on_all(partial(check_teacher, settings, frozen, captions, pixels, test_before, runtime))
        work = ranks.run_on_first(lambda: directory.open(settings))
        engine = _engine(student, parameters, settings, runtime, zero)
        trainer = Trainer(
            engine,
            _teacher(settings, frozen, data, captions, loader, runtime, work, zero),
            frozen.logit_scale().detach().float().clone(),
            loader,
            settings,
            runtime,
            Selection(validation_before.retain, settings.retain_floor, settings.select == "last"),
            lambda step, epoch: examiner.candidate(student, data.validation, step, epoch),
            work,
            identity,
            resumable=directory.path is not None,
        )
        weights = {"given": weight_dtypes(given), "trained": "float32"}
        rounded_to = None if given is original else given
        del frozen, original, given  # the student may be all that is left of them
        if isinstance(engine, LocalEngine):  # DeepSpeed follows the order of modules, which recomputing changes
            enable_recompute(student)  # not before: what was measured and cached is the model's as it came
            if ranks.size == 1 and not random_transform and not live:
                keep_front(
                    engine, loader, trainer.total_steps * settings.accumulate, settings.image_cache_mib * 2**20, runtime
                )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        done = trainer.run()
        trainer.load_chosen()
        merge_rows(student)
        disable_recompute(student)
        if settings.trainable == "lora":
            merge_lora(student, settings)
        for parameter in student.module.parameters():  # what was frozen for this run is the caller's to train again
            parameter.requires_grad_(parameter.is_floating_point())
        tell("measuring the unlearned model")
        back = give_back(student, rounded_to, test_before, examiner, data.test)

    assert done.best is not None
    record = {
        "before": {name: scores_before[name] for name in ("forget", "retain")},
        "after": {name: back.scores[name] for name in ("forget", "retain")},
        "per_class": per_class(scores_before["per_class"], back.scores["per_class"]),
        "selection": {
            "epoch": done.best.epoch,
            "step": done.best.step,
            "reason": trainer.selection.reason(done.best, len(done.evaluations)),
            "within_floor": trainer.selection.within(done.best),
            "validation": {
                "forget": done.best.forget,
                "retain": done.best.retain,
                "forget_before": validation_before.forget,
                "retain_before": validation_before.retain,
            },
            "lowest": lowest(done.evaluations),
            "stopped_early": done.stopped_early,
        },
        "notes": [*notes(done.metrics, settings.to_dict()), *([back.note] if back.note else []), *_cut(student)],
        "weights": {**weights, "returned": weight_dtypes(back.adapter)},
        "model": str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        "data": {
            **data.names,
            "fingerprint": data.fingerprint(),
            "forget_pairs": data.train.n_forget,
            "retain_pairs": len(data.train.pairs) - data.train.n_forget,
            "skipped": data.intake.skipped.to_dict(),
            "ignored": data.intake.ignored.to_dict(),
            "cut_captions": len(student.cut_captions),
        },
        "config": settings.to_dict(),
        "seconds": {
            "total": time.perf_counter() - began,
            "train": done.seconds,
            "evaluate": examiner.seconds,
        },
        "ranks": ranks.size,
        "pairs_per_second": done.step * settings.accumulate * (plan.forget_pairs + plan.retain_pairs) / done.seconds,
        "versions": installed_versions("torch", "open_clip_torch", "transformers", "numpy"),
        "seed": settings.seed,
    }
    record["verdict"] = asdict(verdict(record))
    result = UnlearnResult(
        adapter=back.adapter,
        config=settings,
        history=done.metrics,
        record=record,
        similarities={
            "before": by_set(pair_similarities(test_before), data.test),
            "after": by_set(pair_similarities(back.encoded), data.test),
        },
        **embeddings(test_before, back.encoded, data.test, settings.seed),
    )
    if directory.path is not None:
        tell("writing the model and the result to %s", directory.path)
        ranks.run_on_first(lambda: directory.save(result))
    if ranks.local_rank == 0:
        shutil.rmtree(work / "cache", ignore_errors=True)  # the teacher's features, of no more use
    return result


def _nothing(*words: object) -> None:
    """The other ranks are silent."""


def _settings(
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None, overrides: Mapping[str, Any]
) -> UnlearnConfig:
    if config is None:
        config = UnlearnConfig()
    elif isinstance(config, (str, Path)):
        config = UnlearnConfig.from_file(config)
    elif not isinstance(config, UnlearnConfig):
        config = UnlearnConfig.from_dict(config)
    return UnlearnConfig.from_dict({**config.to_dict(), **overrides})


def _check_settings(settings: UnlearnConfig, directory: RunDirectory, runtime: Runtime) -> dict[str, Any] | None:
    """Raise InputError for what can be told of the settings alone; the DeepSpeed configuration, if any."""
    ranks = runtime.ranks
    probe = torch.empty(1, 1, dtype=torch.float32, device=runtime.device)
    choose(settings.backend, probe, probe)  # a wrong or missing backend is an error now, not in the first step
    if ranks.size > 1 and settings.backend == "eager":
        raise InputError("backend='eager' does not work on several ranks; use 'auto' or 'torch'")
    smaller = min(settings.forget_pairs, settings.retain_pairs)
    if smaller < ranks.size:
        raise InputError(
            f"batch_size={settings.batch_size} makes batches of {settings.forget_pairs} forget and "
            f"{settings.retain_pairs} retain pairs, and each of the {ranks.size} ranks needs one of both: raise "
            "batch_size or start fewer ranks"
        )
    require_logger(settings.logger, directory.path)
    if ranks.first:
        directory.check()
    return read_deepspeed(settings.deepspeed, settings, ranks) if settings.deepspeed else None


def _transforms(
    adapter: ClipAdapter, transform: Callable[[Any], Tensor] | None, pairs: PairDataset
) -> tuple[Callable[[Any], Tensor] | None, bool]:
    """(transform for training, whether images are other ones in every step: by it, or by the dataset).

    Evaluation uses the model's own when the given one is random.
    """
    image, redrawn = pairs.image(0), pairs.store.redrawn()
    if isinstance(image, Tensor):
        return None, redrawn
    if transform is None:
        if adapter.transform is None:
            raise InputError("the images need a transform and the model brings none: pass transform=")
        return adapter.transform, redrawn
    transform = as_transform(transform)
    views = [try_transform(transform, image) for _ in range(8)]
    is_random = any(not torch.equal(view, views[0]) for view in views[1:])
    if not is_random or adapter.transform is None:
        adapter.transform = transform
    if is_random and not torch.equal(*(seeded(0, gpus=False)(transform)(image) for _ in range(2))):
        warnings.warn(
            "the transform does not follow the seeds of torch, random and numpy: another run draws other views, and a "
            "resumed one does not end in the same weights",
            stacklevel=2,
        )
    return transform, is_random or redrawn


def _models(
    model: Any,
    teacher: Any,
    tokenizer: Callable[[Sequence[str]], Tensor] | None,
    settings: UnlearnConfig,
    runtime: Runtime,
) -> tuple[ClipAdapter, ClipAdapter, ClipAdapter]:
    """The model as it was given and in float32 (the same object where it is), and the teacher in float32, which reads
    the same tokens and pixels; its width may differ."""
    cut = settings.long_captions == "truncate"
    given = load_model(model, tokenizer=tokenizer, truncate=cut, device=runtime.device)
    check_weights(given, "model")
    require_trainable(given.module)
    original = in_float32(given)
    original.check_saveable()
    if isinstance(model, (str, Path)):
        given = original
    if teacher is None:
        return given, original, original
    frozen = load_model(teacher, tokenizer=original.tokenize, device=runtime.device)
    check_weights(frozen, "teacher")
    return given, original, in_float32(frozen)


def _plan(config: UnlearnConfig, train: Split) -> BatchPlan:
    n_retain = len(train.pairs) - train.n_forget
    return BatchPlan(
        n_forget=train.n_forget,
        n_retain=n_retain,
        forget_pairs=min(config.forget_pairs, train.n_forget),
        retain_pairs=min(config.retain_pairs, n_retain),
        epoch_over=config.epoch_over,
        seed=config.seed,
    )


def _group_ids(config: UnlearnConfig, train: Split) -> np.ndarray | None:
    """Class of each retain pair; empty when captions are to be compared; None when nothing is masked."""
    if config.false_negatives == "none":
        return None
    if config.false_negatives == "auto" and train.pairs.labels is not None:
        return np.asarray(train.pairs.labels[train.n_forget :])
    return np.empty(0, dtype=np.int64)


def _engine(
    student: ClipAdapter,
    parameters: list[tuple[str, nn.Parameter]],
    settings: UnlearnConfig,
    runtime: Runtime,
    zero: dict[str, Any] | None,
) -> Engine:
    if zero is None:
        return LocalEngine(student, parameters, settings, runtime)
    return ZeroEngine(student, parameters, settings, runtime, zero)


def _teacher_is_live(config: UnlearnConfig, random_transform: bool) -> bool:
    """Whether the teacher encodes every batch, so that its weights must stay as they are."""
    return config.lambda_consistency > 0 and (random_transform or config.teacher_cache == "off")


def _teacher(
    config: UnlearnConfig,
    frozen: ClipAdapter,
    data: PreparedData,
    captions: CaptionTable,
    loader: BatchLoader,
    runtime: Runtime,
    work: Path,
    zero: dict[str, Any] | None,
) -> Teacher | None:
    if config.lambda_consistency == 0:
        return None
    if _teacher_is_live(config, random_transform=loader.pixels.seed is not None):
        if zero is not None and zero["zero_optimization"]["stage"] == 3:
            return LiveTeacher(ShardedTeacher(frozen, zero), runtime, together=True)
        return LiveTeacher(frozen, runtime)
    plan = loader.plan
    retain = data.train.pairs.subset(np.arange(data.train.n_forget, len(data.train.pairs)))
    return cache_teacher(
        frozen,
        retain,
        captions,
        plan.retain_used(config.epochs * plan.steps_per_epoch(config.accumulate) * config.accumulate),
        runtime,
        transform=loader.pixels.transform,
        where=config.teacher_cache,
        directory=work / "cache",
        pixels=loader.pixels.cache,
    )


def _cut(adapter: ClipAdapter) -> list[str]:
    """A note where captions were cut to the model's context."""
    if not adapter.cut_captions:
        return []
    caption, count = next(iter(adapter.cut_captions.items()))
    return [
        f"{len(adapter.cut_captions)} different captions were cut to the {adapter.context_length} tokens of the "
        f"model's context (the first has {count}: {caption[:80]!r})"
    ]
