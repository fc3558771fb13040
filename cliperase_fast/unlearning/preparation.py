"""From the arguments of `unlearn()` to a prepared run: load, check, measure the model as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, trained_on_notes
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.loading import PixelCache, transformed
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import DivergenceMeter
from cliperase_fast.evaluation.words import knows_words
from cliperase_fast.models import ClipAdapter, load_model, set_trainable
from cliperase_fast.models.adapters.open_clip_files import weights_in_file
from cliperase_fast.models.fast_paths.embedding import train_rows
from cliperase_fast.models.preprocessing import as_transform
from cliperase_fast.models.requirements import check_weights, require_dense_gradients, require_trainable
from cliperase_fast.models.runtime import in_float32
from cliperase_fast.progress import say
from cliperase_fast.unlearning.auditing import check_oracles
from cliperase_fast.unlearning.batches import BatchLoader, BatchPlan, CaptionTable, Substitutes
from cliperase_fast.unlearning.engines.deepspeed_config import read_deepspeed
from cliperase_fast.unlearning.evaluator import Evaluator
from cliperase_fast.unlearning.identity import tokenizer_identity, transform_identity
from cliperase_fast.unlearning.loggers import require_logger
from cliperase_fast.unlearning.methods.base import Method
from cliperase_fast.unlearning.precision import choose_precision
from cliperase_fast.unlearning.preflight import (
    check_captions,
    check_features,
    check_forgettable,
    check_gradient,
    check_teacher,
)
from cliperase_fast.unlearning.recipe import EXPECTED_STEPS, MAX_STEPS
from cliperase_fast.unlearning.related import RELATED, SIMILAR, UNRELATED, level_of
from cliperase_fast.unlearning.run import Baseline, Inputs, Models, Run, Setup
from cliperase_fast.unlearning.run_directory import RunDirectory, identity_settings, resume_from
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.splits import PreparedData, Split, open_sets, prepare_data
from cliperase_fast.unlearning.streaming import StreamLoader
from cliperase_fast.unlearning.teacher import BACKGROUND_WHOLE
from cliperase_fast.validation import choose

FORGET_PAIRS, RETAIN_PAIRS = 256, 1024  # of the validation split that the recipe evaluates at most


def load(inputs: Inputs, settings: UnlearnConfig, method: Method, directory: RunDirectory, runtime: Runtime) -> Setup:
    """Open the data, load the models and read the checkpoint to resume from. Raises InputError for what is wrong.

    What is cheap to get wrong is checked before a model is fetched or an image read.
    """
    ranks = runtime.ranks
    tell = say if ranks.first else _nothing
    deepspeed = ranks.run_on_all(lambda: _check_settings(inputs, settings, method, directory, runtime))
    tell("opening the data")
    sets = ranks.run_on_all(
        lambda: open_sets(
            inputs.forget,
            inputs.retain,
            inputs.test,
            settings,
            templates=inputs.templates,
            validation=inputs.validation,
        )
    )
    plain = {name: repr(value) if isinstance(value, dict) else value for name, value in settings.to_dict().items()}
    ranks.agree({**plain, "the pairs": sets.fingerprint()})
    tell("loading the model")
    sharded = deepspeed is not None and deepspeed["zero_optimization"]["stage"] == 3
    with weights_in_file() if sharded else nullcontext():
        models = ranks.run_on_all(lambda: _load_models(inputs, settings, runtime))
    original, teacher = models.original, models.teacher
    assert original is not None and teacher is not None
    ranks.run_on_all(partial(method.check_loss, original, teacher))
    if original.logit_bias() is not None:
        _choose_backend(settings, runtime, "bernoulli")
    tell("checking the images")
    data = prepare_data(sets, settings, progress=runtime.progress, ranks=ranks)
    if settings.automatic and method.trains and inputs.validation is None:
        data.validation = _limited(data.validation, settings.seed)
    if inputs.oracle is not None:
        tell("checking the oracles")
        ranks.run_on_all(partial(check_oracles, inputs, original, data, runtime))
    transform, random_views = _transforms(original, inputs.transform, data.train.pairs)
    precision = choose_precision(settings, original, data.validation, runtime)
    if precision.requested != precision.used:
        tell("precision %s: %s", precision.used, precision.reason)
        settings, runtime = replace(settings, precision=precision.used), replace(runtime, precision=precision.used)
        deepspeed = ranks.run_on_all(lambda: _deepspeed(settings, runtime))
    if random_views and settings.teacher_cache in ("memory", "disk"):
        raise InputError(
            f"teacher_cache={settings.teacher_cache!r} needs a deterministic transform and the one given is random (or "
            "the dataset draws its images anew each time); use 'auto' or 'off'"
        )
    teacher.transform = original.transform
    captions = ranks.run_on_all(partial(CaptionTable, data.train.pairs, original.token_ids))
    ranks.run_on_all(partial(check_captions, original, captions, runtime))
    ranks.run_on_all(partial(method.check_model, original, data.train, captions))
    identity = _identity(models, data, transform, captions, settings, directory)
    ranks.agree({f"the {name}": value for name, value in identity.items() if name != "config"})
    checkpoint = resume_from(directory.path, identity, ranks) if directory.resume else None
    streamed = data.stream is not None
    live = method.needs_teacher and (random_views or streamed or not _keeps_teacher(settings, data.train))
    return Setup(
        inputs, settings, directory, runtime, deepspeed, data, captions, models, transform, random_views, live,
        identity, checkpoint, sets.test is None, precision,
    )  # fmt: skip


def prepare(setup: Setup, method: Method, began: float) -> Run:
    """Make the student, measure the model as it is, and open the run directory."""
    settings, runtime, models = setup.settings, setup.runtime, setup.models
    ranks, data = runtime.ranks, setup.data
    original, teacher = models.original, models.teacher
    assert original is not None and teacher is not None
    student = _make_student(setup)
    parameters = set_trainable(student, settings.trainable, settings.lora_rank, settings.lora_alpha)
    if method.trains and settings.weight_decay == 0 and setup.captions.complete:
        parameters = train_rows(student, parameters, setup.captions.first_tokens)
    ranks.run_on_first(partial(setup.directory.check_room, parameters, student, original, settings.keep_checkpoints))
    cache = PixelCache(settings.image_cache_mib * 2**20) if settings.num_workers == 0 else None
    evaluator = Evaluator(runtime, cache)
    automatic = settings.automatic and method.trains
    baseline = _measure(original, data, evaluator, settings, automatic, ranks.first)
    level = _forget_level(setup, method, automatic)
    notes = ranks.run_on_first(
        partial(check_forgettable, automatic, level, data.validation, baseline, models.closeness)
    )
    of_level = _level_notes(settings, method, automatic)
    chosen_on = [data.train.pairs, data.validation.pairs]
    seen = [] if setup.test_held_out else trained_on_notes(chosen_on, [data.test.pairs])
    for note in (*notes, *of_level, *seen):
        (say if ranks.first else _nothing)("%s", note)
    if cache is not None:  # the test images are needed once more only, those for training in every epoch
        cache.make_room(data.train.pairs, data.test.pairs)
    loader = _make_loader(setup, cache, "forget" in method.needs)
    pixels, tokens = loader.pixels[0, 0], setup.captions.rows([0])
    if method.trains or method.needs_gradient:
        ranks.run_on_all(partial(check_gradient, student, parameters, pixels, tokens, settings, runtime))
    if method.needs_teacher:
        ranks.run_on_all(partial(check_teacher, settings, teacher, setup.captions, pixels, baseline.encoded, runtime))
    work = ranks.run_on_first(lambda: setup.directory.open(settings))
    told = [*setup.precision.notes(), *(notes if automatic else []), *of_level, *seen]
    return Run(
        setup, student, parameters, loader, evaluator, baseline, work, began, automatic, notes=told, forget_level=level
    )  # fmt: skip


def _forget_level(setup: Setup, method: Method, automatic: bool) -> str:
    """Return which background levels the run has, the same on every rank."""
    settings, runtime, teacher = setup.settings, setup.runtime, setup.models.teacher
    if settings.false_negatives != AUTO or not _reads_levels(settings, method, automatic):
        return UNRELATED

    def knows() -> bool:
        assert teacher is not None
        with runtime.inference(teacher):
            return knows_words(teacher)

    return level_of(method.forget_level, setup.data.train, lambda: all(runtime.ranks.gather_results(knows)))


def _reads_levels(settings: UnlearnConfig, method: Method, automatic: bool) -> bool:
    return automatic or settings.select == "divergence" or method.reads_levels


def _level_notes(settings: UnlearnConfig, method: Method, automatic: bool) -> list[str]:
    """Say where related levels were asked for and have nothing to decide."""
    level = settings.forget_level
    if level not in (RELATED, SIMILAR) or _reads_levels(settings, method, automatic):
        return []
    return [
        f"forget_level={level!r} makes no difference: the run has no target, because it is given its numbers and "
        "select is not 'divergence'"
    ]


def _keeps_teacher(settings: UnlearnConfig, train: Split) -> bool:
    """Return whether the teacher's features are kept: not if that would encode many more pairs than are drawn."""
    plan = make_plan(settings, train)
    if settings.teacher_cache != "auto" or not settings.open_ended or plan.n_retain <= BACKGROUND_WHOLE:
        return settings.teacher_cache != "off"
    used = plan.retain_used(MAX_STEPS * settings.accumulate)
    return len(used) <= EXPECTED_STEPS * settings.accumulate * plan.retain_pairs


def make_plan(settings: UnlearnConfig, train: Split, with_forget: bool = True) -> BatchPlan:
    """Return which pairs are in which batch. with_forget: see `BatchPlan`."""
    n_retain = len(train.pairs) - train.n_forget
    return BatchPlan(
        n_forget=train.n_forget,
        n_retain=n_retain,
        forget_pairs=min(settings.forget_pairs, train.n_forget),
        retain_pairs=min(settings.retain_pairs, n_retain),
        epoch_over=settings.epoch_over,
        seed=settings.seed,
        with_forget=with_forget,
    )


def _limited(part: Split, seed: int) -> Split:
    """Return a split with a seeded sample of its pairs, as the recipe evaluates often."""
    generator = np.random.default_rng([seed, len(part.pairs)])
    forget, retain = (
        first + np.sort(generator.permutation(count)[:most])
        for first, count, most in (
            (0, part.n_forget, FORGET_PAIRS),
            (part.n_forget, len(part.pairs) - part.n_forget, RETAIN_PAIRS),
        )
    )
    return Split(part.pairs.subset(np.concatenate([forget, retain])), len(forget))


def _choose_backend(settings: UnlearnConfig, runtime: Runtime, loss: str = "softmax") -> None:
    """Raise InputError for a backend that is missing or does not have the loss: now, not in the first step."""
    probe = torch.empty(1, 1, dtype=torch.float32, device=runtime.device)
    choose(settings.backend, probe, probe, loss=loss)


def _nothing(*words: object) -> None:
    """Log nothing: only the first rank logs."""


def _check_settings(
    inputs: Inputs, settings: UnlearnConfig, method: Method, directory: RunDirectory, runtime: Runtime
) -> dict[str, Any] | None:
    """Raise InputError for what the settings alone show to be wrong. Returns DeepSpeed's configuration, if any."""
    ranks = runtime.ranks
    method.check_inputs(inputs.teacher)
    if inputs.oracle is not None and not settings.audit:
        raise InputError("oracle= is for the audit: pass audit=True too, or leave it out")
    require_logger(settings.logger, directory.path)
    _choose_backend(settings, runtime)
    if ranks.size > 1 and settings.backend == "eager":
        raise InputError("backend='eager' does not work on several ranks; use 'auto' or 'torch'")
    counts = {"forget": settings.forget_pairs, "retain": settings.retain_pairs}
    read = [name for name in counts if name in method.needs]
    if any(counts[name] < ranks.size for name in read):
        raise InputError(
            f"batch_size={settings.pairs_per_batch} makes batches of {settings.forget_pairs} forget and "
            f"{settings.retain_pairs} retain pairs, and each of the {ranks.size} ranks needs one "
            f"{' and one '.join(read)} pair: raise batch_size or start fewer ranks"
        )
    if ranks.first:
        directory.check()
    return _deepspeed(settings, runtime)


def _deepspeed(settings: UnlearnConfig, runtime: Runtime) -> dict[str, Any] | None:
    return read_deepspeed(settings.deepspeed, settings, runtime.ranks) if settings.deepspeed else None


def _load_models(inputs: Inputs, settings: UnlearnConfig, runtime: Runtime) -> Models:
    """Load the model and the teacher, which is the model itself unless one is given."""
    given = inputs.load_model(settings, runtime.device)
    check_weights(given, "model")
    require_trainable(given.module)
    require_dense_gradients(given.module)
    original = in_float32(given)
    original.check_saveable()
    if not inputs.model_is_the_callers:
        given = original
    if inputs.teacher is None:
        return Models(given, original, original)
    teacher = load_model(inputs.teacher, tokenizer=original.tokenize, device=runtime.device)
    check_weights(teacher, "teacher")
    return Models(given, original, in_float32(teacher))


def _transforms(
    adapter: ClipAdapter, transform: Callable[[Any], Tensor] | None, pairs: PairDataset
) -> tuple[Callable[[Any], Tensor] | None, bool]:
    """Return the transform for training, and whether a pair's image differs from step to step.

    Evaluation uses the model's own transform if the given one is random.
    """
    image, redrawn = pairs.image(0), pairs.store.redrawn()
    if isinstance(image, Tensor):
        return None, redrawn
    if transform is None:
        if adapter.transform is None:
            raise InputError("the images need a transform and the model brings none: pass transform=")
        return adapter.transform, redrawn
    transform = as_transform(transform)
    views = [transformed(transform, image) for _ in range(8)]
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


def _identity(
    models: Models,
    data: PreparedData,
    transform: Callable[[Any], Tensor] | None,
    captions: CaptionTable,
    settings: UnlearnConfig,
    directory: RunDirectory,
) -> dict[str, Any]:
    """Return what a run that resumes must share with the one that wrote the checkpoint, method and options included."""
    assert models.given is not None and models.original is not None and models.teacher is not None
    transforms = [transform, models.original.transform]
    return {
        "model": models.given.identity(),
        "teacher": models.teacher.identity(),
        "data": data.fingerprint(),
        "transform": transform_identity(transforms, data.train.pairs) if directory.path else "",
        "tokenizer": tokenizer_identity(models.original, captions, data.test.pairs),
        "config": identity_settings(settings),
    }


def _make_student(setup: Setup) -> ClipAdapter:
    """Return a copy of the original, or the original itself if it is ours and nothing else needs its weights."""
    models = setup.models
    assert models.original is not None
    ours = models.original is not models.given or not setup.inputs.model_is_the_callers
    teaches = setup.teacher_is_live and setup.inputs.teacher is None
    return models.original if ours and not teaches else models.original.clone()


def _measure(
    original: ClipAdapter,
    data: PreparedData,
    evaluator: Evaluator,
    settings: UnlearnConfig,
    automatic: bool,
    first: bool,
) -> Baseline:
    (say if first else _nothing)("measuring the model as it is, on %d test pairs", len(data.test.pairs))
    encoded = evaluator.encode(original, data.test, finite=True)
    check_features(encoded, data.test.pairs)
    scores = evaluator.score(encoded, data.test)
    part = data.validation
    of_validation = evaluator.encode(original, part)
    candidate = evaluator.candidate(of_validation, part, 0, 0)
    if not automatic and settings.select != "divergence":
        return Baseline(encoded, scores, candidate, of_validation)
    scale = float(original.logit_scale().detach())
    labels, same_classes = data.train.pairs.labels, data.train.pairs.space == part.pairs.space
    retained = None  # derived classes can differ between splits if most of the captions are unique
    if labels is not None and same_classes:
        retained = np.unique(np.asarray(labels)[data.train.n_forget :])
    meter = DivergenceMeter(of_validation, scale, part.pairs, ~part.forget_mask, classes=retained, seed=settings.seed)
    return Baseline(encoded, scores, candidate, of_validation, meter)


def _make_loader(setup: Setup, cache: PixelCache | None, with_forget: bool) -> BatchLoader:
    settings, data, original = setup.settings, setup.data, setup.models.original
    train = data.train
    make: Callable[..., BatchLoader] = BatchLoader
    if data.stream is not None:
        assert original is not None
        make = partial(StreamLoader, stream=data.stream, token_ids=original.token_ids, skipped=data.intake.skipped)
    return make(
        train.pairs,
        make_plan(settings, train, with_forget),
        setup.captions,
        transform=setup.transform,
        random_transform=setup.random_views,
        group_ids=_group_ids(settings, train),
        num_workers=settings.num_workers,
        ranks=setup.runtime.ranks,
        cache=cache,
        substitutes=_substitutes(setup, cache),
    )


def _substitutes(setup: Setup, cache: PixelCache | None) -> Substitutes | None:
    """Return what replaces unreadable pairs while training, where they are skipped and not all were read before."""
    data, transform = setup.data, setup.transform
    if data.all_read or setup.settings.on_error != "skip":
        return None
    pairs = data.train.pairs
    if cache is not None and transform is not None and not setup.random_views:
        return Substitutes(pairs, data.train.n_forget, lambda row: cache.pixels(pairs, row, transform))
    return Substitutes(pairs, data.train.n_forget, pairs.image)


def _group_ids(settings: UnlearnConfig, train: Split) -> np.ndarray | None:
    """Return the entity or class of each pair; empty if captions are to be compared; None if nothing is masked."""
    if settings.false_negatives == "none":
        return None
    if settings.false_negatives == "auto" and train.pairs.group_ids is not None:
        return np.asarray(train.pairs.group_ids)
    return np.empty(0, dtype=np.int64)
