"""`audit()`: from what the caller names to the scores of all models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.auditing.comparison import audit_models
from cliperase_fast.auditing.depth import check_depth
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.loading import check_alike, load_models
from cliperase_fast.auditing.result import Audit
from cliperase_fast.auditing.sets import open_sets, read_sets
from cliperase_fast.auditing.vocabulary import TEMPLATES, check_synonyms
from cliperase_fast.data.classes import check_templates
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import check_precision, pick_device
from cliperase_fast.storage import check_writable


@torch_defaults()
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
    output_dir: str | Path | None = None,
    templates: Sequence[str] | str | None = None,
    paraphrase_templates: Sequence[str] | str = TEMPLATES,
    tokenizer: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: str = "fp32",
    progress: bool | None = None,
) -> Audit:
    """Measure what unlearning left behind and what it damaged.

    before, after: the original and the unlearned model, in every form that `unlearn()` takes. None of the models is
        changed.
    forget, retain, test: the pairs, as `unlearn()` takes them. Scores are those of the test pairs.
    oracle: a model, or a list of models, trained like the original but without the forget pairs. Their mean is the
        target. Give three at least: one alone is one sample of what not knowing looks like. Without any, the background
        level of the original is the reference for the association.
    synonyms: {class: [other names]}; None takes a small built-in list (digits, shapes, CIFAR-10).
    other: {name: data set with classes} that the model should still be able to name; they must not show the forget
        concepts. holdouts: {"association": data, "identity": data}, held-out pairs of the same and of other entities.
    depth: True also attacks copies of the models (probes, relearning, soft prompts, rounding); "full" relearns from
        fewer shots and other data too.
    output_dir: where to save the result (`Audit.save`).
    templates: captions that stand for a class, "a photo of a {}"; the data's own otherwise.
    paraphrase_templates: other templates under which the concepts are asked for.
    tokenizer, transform: needed only where the models do not bring them.
    seed: of the bootstrap, the augmented views and the attacks. The same call gives the same result.
    batch_size, device, precision, progress: as in `evaluate()`.

    Data without classes gets a reduced audit: every caption is a concept of its own, and scores of classes are None.
    Raises InputError for wrong arguments, models that take different images or captions, and features that are NaN or
    infinite. Warns of an oracle that knows the concept.
    """
    check_depth(depth)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if output_dir is not None:
        check_writable(Path(output_dir), "output_dir")
    chosen = _device(device, before)
    check_precision(precision, chosen)
    checked = check_templates(templates)
    opened = open_sets(forget, retain, test, other=other, holdouts=holdouts, templates=checked, seed=seed)
    models = load_models(before, after, oracle, tokenizer, transform, chosen)
    sets = read_sets(opened, seed=seed)
    check_synonyms(synonyms, sets.test)
    check_alike(models, sets)
    show = sys.stderr.isatty() if progress is None else progress
    how = Encoding(batch_size, chosen, precision, seed, show)
    result = audit_models(models, sets, how, synonyms=synonyms, paraphrase_templates=paraphrase_templates, depth=depth)
    if output_dir is not None:
        result.save(output_dir)
    return result


def _device(device: str | torch.device, model: Any) -> torch.device:
    if str(device) == "auto":
        module = model.module if isinstance(model, ClipAdapter) else model
        first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        if first is not None:
            return first.device
    return pick_device(device)
