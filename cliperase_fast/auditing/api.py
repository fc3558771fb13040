"""`audit()`: from what the caller names to the scores of all models."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.auditing.depth import check_depth, score_depth
from cliperase_fast.auditing.estimates import Estimate, mean_estimate, resampled_counts
from cliperase_fast.auditing.features import Encoding, encode_model, pixels_of, training_correct
from cliperase_fast.auditing.gap import background, gaps, noise_floor, over_forgotten, tug_of_war
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.result import Audit
from cliperase_fast.auditing.scores import Features, View, score_features
from cliperase_fast.auditing.sets import AuditSets, open_sets
from cliperase_fast.auditing.verdict import verdicts
from cliperase_fast.auditing.vocabulary import TEMPLATES, Wording, check_synonyms, wordings
from cliperase_fast.data.classes import check_templates
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import check_precision, in_float32, pick_device
from cliperase_fast.progress import say
from cliperase_fast.storage import check_writable

Scores = dict[str, dict[str, Estimate]]


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
    sets = open_sets(forget, retain, test, other=other, holdouts=holdouts, templates=checked, seed=seed)
    layout = Layout.of(sets.test, sets.forget_mask)
    names = list(
        wordings(
            sets.test, layout.forget_concepts, check_synonyms(synonyms, sets.test),
            check_templates(paraphrase_templates) or (),
        )
    )  # fmt: skip
    models = _models(before, after, oracle, tokenizer, transform, chosen)
    _check_alike(models, sets)
    show = sys.stderr.isatty() if progress is None else progress
    how = Encoding(batch_size, chosen, precision, seed, show)
    try:
        result = _audit(models, sets, layout, names, how, depth)
    finally:
        resampled_counts.cache_clear()
    if output_dir is not None:
        result.save(output_dir)
    return result


def _audit(
    models: Mapping[str, ClipAdapter],
    sets: AuditSets,
    layout: Layout,
    names: Sequence[Wording],
    how: Encoding,
    depth: bool | str,
) -> Audit:
    features: dict[str, Features] = {}
    scores: dict[str, Scores] = {}
    for name, adapter in models.items():
        say("auditing %s", name)
        features[name] = encode_model(adapter, sets, layout, names, how, name)
        view = View(layout, features[name], features["before"], how.seed)
        scores[name] = score_features(view)
        if depth:
            scores[name]["depth"] |= score_depth(adapter, view, sets, how, full=depth == "full")
    oracles = [scores[name] for name in models if name.startswith("oracle")]
    notes = [*sets.notes, *_knowing_oracles(scores, layout)]
    level = background(scores["before"])
    gap = None
    if oracles:
        scores["oracle"] = _mean_scores(oracles)
        floor, floors = noise_floor(oracles)
        tug = _tug_of_war(models, features, sets, layout, how) if layout.has_classes else None
        gap = {**gaps(scores["after"], scores["oracle"]), "floor": floor, "floors": floors, "tug_of_war": tug}
    over = over_forgotten(scores["after"], oracles, level)
    table = {
        model: {group: {name: found.to_dict() for name, found in of.items()} for group, of in groups.items()}
        for model, groups in scores.items()
    }
    data = {
        "forget": sets.forget.name,
        "test": sets.test.name,
        "forget_test_pairs": len(layout.forget_images),
        "retain_test_pairs": len(layout.retain_images),
        "concepts": [str(layout.names[concept]) for concept in layout.forget_concepts[:20]],
    }
    return Audit(table, gap, level, over, verdicts(table, gap, level, over), notes, data)


def _device(device: str | torch.device, model: Any) -> torch.device:
    if str(device) == "auto":
        module = model.module if isinstance(model, ClipAdapter) else model
        first = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        if first is not None:
            return first.device
    return pick_device(device)


def _models(
    before: Any, after: Any, oracle: Any, tokenizer: Any, transform: Any, device: torch.device
) -> dict[str, ClipAdapter]:
    """The models by name, on the device and in float32: the given ones where they are so, else copies."""
    given = {"before": before, "after": after}
    oracles = list(oracle) if isinstance(oracle, (list, tuple)) else [] if oracle is None else [oracle]
    given |= {f"oracle {number}": one for number, one in enumerate(oracles, 1)}
    found = {}
    for name, model in given.items():
        try:
            adapter = load_model(model, tokenizer=tokenizer, transform=transform, device=device)
            check_weights(adapter, "model")
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        found[name] = in_float32(adapter)
    return found


def _check_alike(models: Mapping[str, ClipAdapter], sets: AuditSets) -> None:
    """Raise InputError unless all models read the same captions and images as the original."""
    captions = [group[0] for group in sets.test.captions[:8]]
    first = models["before"]
    tokens, pixels = first.token_ids(captions), pixels_of(first, sets.test, [0])
    for name, adapter in models.items():
        own = adapter.token_ids(captions)
        if own.shape != tokens.shape or not torch.equal(own, tokens):
            raise InputError(
                f"the models 'before' and {name!r} have different tokenizers ({captions[0]!r} gives other ids): audit "
                "models of the same kind"
            )
        size = pixels_of(adapter, sets.test, [0]).shape
        if size != pixels.shape:
            raise InputError(
                f"the models 'before' and {name!r} take images of different sizes ({list(pixels.shape[1:])} and "
                f"{list(size[1:])}): audit models of the same kind"
            )


def _knowing_oracles(scores: Mapping[str, Scores], layout: Layout) -> list[str]:
    """Warnings about oracles that name forget images more often than chance, by the lower end of the interval."""
    chance = layout.chance
    found = []
    for model, groups in scores.items():
        value, interval = groups["forgetting"]["zero_shot_top1"].value, groups["forgetting"]["zero_shot_top1"].interval
        if model.startswith("oracle ") and value is not None and interval is not None and interval[0] > chance:
            found.append(
                f"{model} seems to know the concept: it names {100 * value:.0f} % of the forget images, and chance is "
                f"{100 * chance:.0f} %. An oracle must be trained without the forget pairs."
            )
            warnings.warn(found[-1], stacklevel=4)
    return found


def _mean_scores(oracles: Sequence[Scores]) -> Scores:
    return {
        group: {
            name: mean_estimate([oracle[group][name] for oracle in oracles if name in oracle[group]]) for name in found
        }
        for group, found in oracles[0].items()
    }


def _tug_of_war(
    models: Mapping[str, ClipAdapter],
    features: Mapping[str, Features],
    sets: AuditSets,
    layout: Layout,
    how: Encoding,
) -> float:
    found = {}
    for name, adapter in models.items():
        if name == "before":
            continue
        correct = training_correct(adapter, sets, features[name].concepts, how, name)
        correct["test"] = View(layout, features[name], features["before"]).correct
        found[name] = {kind: float(hits.mean()) for kind, hits in correct.items()}
    oracles = [values for name, values in found.items() if name != "after"]
    return tug_of_war(found["after"], {kind: float(np.mean([one[kind] for one in oracles])) for kind in oracles[0]})
