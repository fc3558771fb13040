"""`audit()`: from what the caller names to the scores of all models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.allocation import reuse_freed_memory
from cliperase_fast.auditing.comparison import audit_models
from cliperase_fast.auditing.depth import check_depth
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.loading import check_alike, load_models
from cliperase_fast.auditing.result import Audit
from cliperase_fast.auditing.sets import AuditSets, open_sets, read_sets
from cliperase_fast.auditing.vocabulary import TEMPLATES, check_synonyms
from cliperase_fast.coercion import whole
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.classes import check_templates
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.loading import PixelCache
from cliperase_fast.defaults import plain_torch
from cliperase_fast.distributed import Ranks, init_distributed
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.evaluating import check_settings
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import device_of_rank
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import check_writable, output_folder


@reuse_freed_memory()
@plain_torch()
def audit(
    before: Any,
    after: Any,
    forget: Any,
    retain: Any,
    *,
    oracle: Any = None,
    test: Any = None,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    other: Mapping[str, Any] | None = None,
    holdouts: Mapping[str, Any] | None = None,
    depth: bool | str = False,
    test_fraction: float = UnlearnConfig.test_fraction,
    output_dir: str | Path | None = None,
    templates: Sequence[str] | str | None = None,
    paraphrase_templates: Sequence[str] | str = TEMPLATES,
    tokenizer: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    long_captions: str = "error",
    on_error: str = "raise",
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    num_workers: int = 0,
    progress: bool | None = None,
) -> Audit:
    """Measure what unlearning left behind and what it damaged.

    before, after: the original and the unlearned model, each as `unlearn()` takes them. No model is changed.
    forget, retain, test: the pairs, as `unlearn()` takes them. Scores are those of the test pairs.
    oracle: a model, or a list of models, trained like the original but without the forget pairs. The mean of their
        scores is the target, and their differences from each other are the noise floor. Pass at least three: models
        that were trained with different seeds differ, and one model does not show by how much. Without oracles, the
        background level of the original is the reference for the association, and the other scores have no target.
    synonyms: {class: [other names]}; None takes a small built-in list (digits, shapes, CIFAR-10).
    other: {name: data set with classes} that the model should still classify. Its pairs must not show what was
        forgotten.
    holdouts: {"association": data, "identity": data}, pairs that unlearning did not see: other facts of the entities
        that the forget pairs are about, and facts of other entities. None takes those of the source, if it has some.
    depth: True also attacks copies of the models (probes, relearning, soft prompts, rounding); "full" also relearns
        from fewer shots and from other data.
    test_fraction: share of the pairs that is scored where the data has no test split. With the same number and seed as
        in `unlearn()`, these are the pairs that it did not train on.
    output_dir: where to save the result (`Audit.save`).
    templates: captions that represent a class, "a photo of a {}"; default: the data's own.
    paraphrase_templates: further templates, to ask for the concepts in other words.
    tokenizer, transform: needed only if the models do not have their own.
    seed: of the bootstrap, the augmented views and the attacks. The same call returns the same result.
    long_captions, on_error, batch_size, device, precision, num_workers, progress: as in `evaluate()`.

    Data without classes gets a reduced audit. Every caption is then a concept of its own, ranks are taken among all
    captions, and scores of classes are None: zero_shot_top1, paraphrase_top1, worst_class_drop, neighbours_top1 and
    tug_of_war.

    Several processes, started with torchrun, share the encoding, the scores and the attacks. All of them return the
    same result, and the first one saves it.

    Returns an `Audit`. Raises `InputError` before any encoding for wrong arguments, unreadable images and models that
    read captions or images differently, and later for features that are NaN or infinite. Warns if an oracle knows the
    concept, knows the rest far less well than the original, or is a copy of another one, of `before` or of `after`.
    """
    name = str(device) if str(device) != "auto" else str(_device_of(before) or "auto")
    checked = check_templates(templates)
    paraphrase_templates = check_templates(paraphrase_templates or None) or ()
    check_depth(depth)
    for named, given in (("synonyms", synonyms), ("other", other), ("holdouts", holdouts)):
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"{named} is a {type(given).__name__}; pass a mapping with names as its keys")
    batch_size, num_workers = whole("batch_size", batch_size, 1), whole("num_workers", num_workers, 0)
    seed = whole("seed", seed, 0)
    test_fraction = UnlearnConfig(test_fraction=test_fraction).test_fraction  # checks it
    # What reading data and trying a transform draws must not come from the caller's generators.
    with init_distributed(name, UnlearnConfig.rank_timeout) as ranks, seeded(seed, gpus=False):
        show = (bars_by_default() if progress is None else progress) and ranks.first
        how = ranks.run_on_all(
            lambda: Encoding(
                batch_size, device_of_rank(name, ranks), precision, seed, show, ranks, num_workers,
                PixelCache(UnlearnConfig.image_cache_mib * 2**20),
            )
        )  # fmt: skip
        ranks.run_on_all(lambda: check_settings(precision, how.device, long_captions))
        if output_dir is not None:
            ranks.run_on_first(lambda: check_writable(output_folder(output_dir, "output_dir="), "output_dir="))
        opened = ranks.run_on_all(
            lambda: open_sets(
                forget,
                retain,
                test,
                other=other,
                holdouts=holdouts,
                templates=checked,
                on_error=on_error,
                seed=seed,
                test_fraction=test_fraction,
            )
        )
        models = ranks.run_on_all(
            lambda: load_models(
                before, after, oracle, tokenizer=tokenizer, transform=transform, device=how.device,
                truncate=long_captions == "truncate",
            )
        )  # fmt: skip
        wanted = {
            "depth": depth, "precision": precision, "seed": seed, "batch_size": batch_size,
            "test_fraction": test_fraction,
        }  # fmt: skip
        words = {"synonyms": repr(synonyms), "paraphrase_templates": repr(paraphrase_templates)}
        ranks.agree({**wanted, **words, "the pairs": opened.fingerprint(), **_identities(models, ranks)})
        sets = read_sets(opened, on_error=on_error, seed=seed, test_fraction=test_fraction, progress=show, ranks=ranks)
        ranks.run_on_all(lambda: _check_fit(models, sets, synonyms))
        result = audit_models(
            models, sets, how, synonyms=synonyms, paraphrase_templates=paraphrase_templates, depth=depth
        )
        if output_dir is not None:
            ranks.run_on_first(lambda: result.save(output_dir))
    return result


def _device_of(model: Any) -> torch.device | None:
    """Return the device of a model that the caller holds; None for a name."""
    module = model.module if isinstance(model, ClipAdapter) else model
    first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return None if first is None else first.device


def _identities(models: Mapping[str, ClipAdapter], ranks: Ranks) -> dict[str, str]:
    """Return a digest of each model, where other ranks have some to compare."""
    return {f"the model {name!r}": adapter.identity() for name, adapter in models.items()} if ranks.size > 1 else {}


def _check_fit(
    models: Mapping[str, ClipAdapter], sets: AuditSets, synonyms: Mapping[str, Sequence[str]] | None
) -> None:
    check_synonyms(synonyms, sets.test)
    check_alike(models, sets)
