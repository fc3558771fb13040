"""The audit of a run: the original and the returned model on the pairs that the run was trained and tested on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np

from cliperase_fast.auditing import Audit
from cliperase_fast.auditing.comparison import audit_models
from cliperase_fast.auditing.features import Encoding, pixels_of
from cliperase_fast.auditing.loading import check_alike, load_models
from cliperase_fast.auditing.sets import AuditSets, held_out_notes
from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import in_float32, refuse_inputs
from cliperase_fast.report import audit_advice
from cliperase_fast.unlearning.result import UnlearnResult
from cliperase_fast.unlearning.run import Inputs, Run
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.splits import PreparedData, Split

_DEPTHS: dict[bool | str, bool | str] = {True: False, "depth": True, "full": "full"}  # setting -> audit(depth=...)


def check_oracles(inputs: Inputs, original: ClipAdapter, data: PreparedData, runtime: Runtime) -> None:
    """Load the oracles and drop them again. Raises InputError for one that cannot be compared with the original."""
    models = _load_beside(original, original, inputs, runtime)
    sets = _audit_sets(data)
    check_alike(models, sets)
    pixels = pixels_of(original, sets.test, [0])  # [1, 3, H, W]
    tokens = original.token_ids([sets.test.captions[0][0]])  # [1, L]
    for name, adapter in models.items():
        failure = f"{name} cannot encode the images and captions of the original"
        with runtime.inference(adapter), refuse_inputs(failure, "give models of the same kind"):
            adapter.encode_image(pixels.to(runtime.device))
            adapter.encode_text(tokens.to(runtime.device))


def add_audit(run: Run, result: UnlearnResult) -> None:
    """Audit the result that is already saved, and save the audit beside it. All ranks call it together.

    An audit that fails is an error which says that the result is saved. Without a run directory the result would be
    lost with it, so there it is a warning, and a note of the result.
    """
    path = run.setup.directory.path
    run.say("auditing the unlearned model")
    began = time.perf_counter()
    try:
        with seeded(run.settings.seed):
            found = _audit(run, result)
    except Exception as error:  # of any kind: the training is done
        said = str(error) if isinstance(error, (InputError, UnlearningError)) else f"{type(error).__name__}: {error}"
        if path is None:
            result.record["notes"].append(f"The audit failed: {said}")
            warnings.warn(f"the audit failed, and the result has none: {said}", stacklevel=2)
            return
        kind = InputError if isinstance(error, InputError) else UnlearningError
        raise kind(
            f"the audit failed ({said}); the unlearned model and its result are saved in {path}. To audit it: "
            f"{audit_advice(result.record, path / 'model', path)}"
        ) from error
    result.add_audit(found, time.perf_counter() - began)
    if path is not None:
        run.ranks.run_on_first(partial(run.setup.directory.save_audit, result))


def _audit_sets(data: PreparedData, notes: Sequence[str] = ()) -> AuditSets:
    """Return the run's pairs as an audit takes them."""
    return AuditSets.of(*_parts(data.train), _parts(data.test), holdouts=data.holdouts, names=data.names, notes=notes)


def _audit(run: Run, result: UnlearnResult) -> Audit:
    """Audit the returned weights. The original is loaded again, as nothing kept it through the training."""
    runtime, settings = run.runtime, run.settings
    held_out = run.setup.test_held_out
    notes = held_out_notes(settings.test_fraction, run.data.train.n_forget) if held_out else ()
    sets = _audit_sets(run.data, notes)
    models = run.ranks.run_on_all(partial(_load_models, run, result, sets))
    how = Encoding(
        runtime.batch_size, runtime.device, runtime.precision, settings.seed, runtime.progress, run.ranks,
        runtime.num_workers, run.evaluator.cache,
    )  # fmt: skip
    found = audit_models(models, sets, how, depth=_DEPTHS[settings.audit])
    return run.ranks.run_on_first(lambda: found)


def _load_models(run: Run, result: UnlearnResult, sets: AuditSets) -> dict[str, ClipAdapter]:
    inputs = run.setup.inputs
    original = inputs.load_model(run.settings, run.runtime.device)
    if not inputs.model_is_the_callers:
        original = in_float32(original)
    if original.identity() != run.setup.identity["model"]:
        raise UnlearningError(f"{inputs.model_name} has other weights than when the run began")
    original.transform = run.student.transform
    models = _load_beside(original, result.adapter, inputs, run.runtime)
    check_alike(models, sets)
    return models


def _load_beside(original: ClipAdapter, after: ClipAdapter, inputs: Inputs, runtime: Runtime) -> dict[str, ClipAdapter]:
    """Load the oracles, which read what the original reads."""
    return load_models(
        original, after, inputs.oracle, tokenizer=inputs.tokenizer, transform=original.transform,
        device=runtime.device, truncate=original.truncate,
    )  # fmt: skip


def _parts(split: Split) -> tuple[PairDataset, PairDataset]:
    """Return (forget, retain) pairs."""
    return split.pairs.subset(np.flatnonzero(split.forget_mask)), split.pairs.subset(np.flatnonzero(~split.forget_mask))
