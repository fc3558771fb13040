"""Audit loaded models on prepared pairs: features, scores, and the gap to the oracles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cliperase_fast.auditing.depth import check_depth, score_depth
from cliperase_fast.auditing.estimates import Estimate, mean_estimate, resampled_counts
from cliperase_fast.auditing.evidence import evidence
from cliperase_fast.auditing.features import Encoding, encode_model, training_correct
from cliperase_fast.auditing.gap import background, gaps, noise_floor, over_forgotten_below, tug_of_war
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.relearning import PAIRS, SHOTS
from cliperase_fast.auditing.result import Audit
from cliperase_fast.auditing.scores import View, score_features
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.auditing.verdict import verdicts
from cliperase_fast.auditing.vocabulary import TEMPLATES, Wording, check_synonyms, fitting, wordings
from cliperase_fast.data.classes import check_templates
from cliperase_fast.evaluation.encoding import SAME
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.requirements import require_dense_gradients
from cliperase_fast.plurals import counted
from cliperase_fast.progress import Steps, say
from cliperase_fast.report.wording import plain_number

Scores = dict[str, dict[str, Estimate]]

WEAK_BY = 0.1  # an oracle whose retain accuracy is lower than the original's by more is weak


def audit_models(
    models: Mapping[str, ClipAdapter],
    sets: AuditSets,
    how: Encoding,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    paraphrase_templates: Sequence[str] | str = TEMPLATES,
    depth: bool | str = False,
) -> Audit:
    """Score models on pairs that have been opened and read.

    models: "before", "after" and, for models that never saw the forget pairs, "oracle 1", "oracle 2", ...; on the
        device of `how`, in float32. All of them must read the same captions and images (`check_alike`).
    synonyms, paraphrase_templates, depth: as in `audit()`.
    Raises InputError for features that are NaN or infinite. Warns of an oracle that knows the concept, that knows the
    rest far less well than the original, that is one of the audited models, or that is a copy of an earlier one, which
    is left out.
    """
    check_depth(depth)
    if depth:
        for adapter in models.values():
            require_dense_gradients(adapter.module)
    layout = Layout.of(sets.test, sets.forget_mask, sets.holdouts)
    asked = wordings(
        sets.test, layout.forget_concepts, check_synonyms(synonyms, sets.test),
        check_templates(paraphrase_templates or None) or (),
    )  # fmt: skip
    names, too_long = fitting(asked, models["before"])
    if too_long:
        what = "template or synonym is" if len(too_long) == 1 else "templates and synonyms are"
        note = f"{len(too_long)} {what} longer than the model's context and not asked for"
        sets = replace(sets, notes=(*sets.notes, f"{note} (the first: {too_long[0].name!r})."))
    try:
        return _audit(models, sets, layout, names, how, depth)
    finally:
        resampled_counts.cache_clear()


def _audit(
    models: Mapping[str, ClipAdapter],
    sets: AuditSets,
    layout: Layout,
    names: Sequence[Wording],
    how: Encoding,
    depth: bool | str,
) -> Audit:
    tell = say if how.ranks.first else _nothing
    views: dict[str, View] = {}
    for name, adapter in models.items():
        tell("encoding the pairs with the model %r", name)
        features = encode_model(adapter, sets, layout, names, how.for_model(adapter, models["before"], sets.test), name)
        views[name] = View(layout, features, views["before"].features if views else features, how.seed)
    copies = _copies(views)
    models = {name: adapter for name, adapter in models.items() if name not in copies}
    views = {name: view for name, view in views.items() if name not in copies}
    scores = _score_all(views, how)
    if depth:
        tell("attacking copies of %d models", len(models))
        for name, found in score_depth(models, views, sets, how, full=depth == "full").items():
            scores[name]["depth"] |= found
    oracles = [scores[name] for name in models if name.startswith("oracle")]
    level = background(scores["before"])
    faults = [*_copied_oracles(copies), *_no_oracles(views), *_knowing_oracles(scores, layout), *_weak_oracles(scores)]
    if how.ranks.first:
        for fault in faults:
            warnings.warn(fault, stacklevel=2)
    notes = [*sets.notes, *_unscored(sets, layout), *_few_oracles(len(oracles), level), *faults]
    notes += _few_shots(sets) if depth else []
    gap = None
    if oracles:
        scores["oracle"] = _mean_scores(oracles)
        floor, floors = noise_floor(oracles)
        tug = _tug_of_war(models, views, sets, how) if layout.has_classes else None
        gap = {**gaps(scores["after"], scores["oracle"]), "floor": floor, "floors": floors, "tug_of_war": tug}
    limit = over_forgotten_below(oracles, level, float(models["before"].logit_scale().detach()))
    own = scores["after"]["forgetting"]["association"].value
    over = None if own is None or limit is None else own < limit
    table = {
        model: {group: {name: found.to_dict() for name, found in of.items()} for group, of in groups.items()}
        for model, groups in scores.items()
    }
    data = {
        **sets.names,
        "forget_test_pairs": len(layout.forget_images),
        "retain_test_pairs": len(layout.retain_images),
        "concepts": [str(layout.names[concept]) for concept in layout.forget_concepts[:20]],
        "skipped": sets.skipped.to_dict(),
    }
    said = verdicts(table, gap, level, over, min(SHOTS, len(sets.forget)))
    return Audit(table, gap, level, over, said, notes, data, limit, evidence(views))


def _nothing(*words: object) -> None:
    """Log nothing: only the first rank logs."""


def _score_all(views: Mapping[str, View], how: Encoding) -> dict[str, Scores]:
    """Compute the scores that need features only, by model. Ranks share the models."""
    own = list(views)[how.ranks.rank :: how.ranks.size]

    def work() -> dict[str, Scores]:
        with Steps(len(own), "scoring", "model", bar=how.progress) as steps:
            found = {}
            for name in own:
                found[name] = score_features(views[name])
                steps.update()
            return found

    found = {name: scores for of_rank in how.ranks.gather_results(work) for name, scores in of_rank.items()}
    return {name: found[name] for name in views}


def _unscored(sets: AuditSets, layout: Layout) -> list[str]:
    """Return a note on forgotten classes that no test pair shows."""
    if sets.forget.labels is None or sets.forget.classes is None:
        return []
    absent = np.setdiff1d(sets.forget.labels, layout.forget_concepts)
    if len(absent) == 0:
        return []
    first = sets.forget.classes[absent[0]]
    if len(absent) == 1:
        return [f"No test pair shows the forgotten class {first!r}, which has no scores."]
    return [f"No test pair shows {len(absent)} of the forgotten classes, which have no scores (the first: {first!r})."]


def _few_oracles(count: int, level: float | None) -> list[str]:
    """Return a note on what the scores are compared with, if there are fewer than two oracles."""
    if count == 0:
        known = "unknown" if level is None else plain_number(level, 3)
        return [
            f"No oracle was given: the background level of the original ({known}) is the reference for the "
            "association, and the other scores have no target. A model that knows the parts of a concept, such as red "
            "things and circles for red circles, stands above that level without having seen it."
        ]
    if count == 1:
        return ["One oracle is a single sample of a model that never knew the concept. Give three for a noise floor."]
    return []


def _few_shots(sets: AuditSets) -> list[str]:
    """Return a note if there are fewer training pairs than relearning takes."""
    shots = min(SHOTS, len(sets.forget))
    rest = min(PAIRS - shots, len(sets.retain))
    if (shots, rest) == (SHOTS, PAIRS - SHOTS):
        return []
    pairs = f"{shots} forget and {counted(rest, 'retain pair')}"
    return [f"Relearning trains on {pairs}: there are too few for {SHOTS} and {PAIRS - SHOTS}."]


def _copies(views: Mapping[str, View]) -> dict[str, str]:
    """Return the oracles whose features are those of an earlier one, and that one."""
    found: dict[str, str] = {}
    kept: list[str] = []
    for name in (one for one in views if one.startswith("oracle ")):
        first = next((other for other in kept if _same(views[name], views[other])), None)
        if first is None:
            kept.append(name)
        else:
            found[name] = first
    return found


def _same(first: View, second: View) -> bool:
    """Whether two models give the same features, up to rounding."""
    return all(
        ours.shape == theirs.shape and bool(((ours - theirs).abs() <= SAME).all())
        for ours, theirs in (
            (first.features.images, second.features.images),
            (first.features.captions, second.features.captions),
            (first.features.concepts, second.features.concepts),
        )
    )


def _copied_oracles(copies: Mapping[str, str]) -> list[str]:
    """Return warnings of oracles that are left out."""
    return [
        f"{name} has the same features as {first}, so it is not a second sample and is left out. Give models that were "
        "trained with different seeds."
        for name, first in copies.items()
    ]


def _no_oracles(views: Mapping[str, View]) -> list[str]:
    """Return warnings of oracles that are one of the audited models."""
    found = []
    for name in (one for one in views if one.startswith("oracle ")):
        audited = {"before": "the original", "after": "the unlearned model"}
        same = [what for other, what in audited.items() if _same(views[name], views[other])]
        if same:
            found.append(
                f"{name} has the same features as {same[0]}, so it does not show what a model is like that never saw "
                "the forget pairs. Give models that were trained without them."
            )
    return found


def _weak_oracles(scores: Mapping[str, Scores]) -> list[str]:
    """Return warnings of oracles that know the rest less well than the original.

    By more than `WEAK_BY` of the retain images, and with an interval below the original's.
    """
    before = scores["before"]["collateral"]["retain_top1"]
    found = []
    for model, groups in scores.items():
        own = groups["collateral"]["retain_top1"]
        if not model.startswith("oracle ") or own.value is None or before.value is None:
            continue
        if own.interval is None or before.interval is None:
            continue
        if own.value < before.value - WEAK_BY and own.interval[1] < before.interval[0]:
            found.append(
                f"{model} knows the rest less well than the original: it names {100 * own.value:.0f} % of the retain "
                f"images, and the original {100 * before.value:.0f} %. Its scores do not show what the missing forget "
                "pairs change. Train oracles like the original, and leave out only the forget pairs."
            )
    return found


def _knowing_oracles(scores: Mapping[str, Scores], layout: Layout) -> list[str]:
    """Return warnings of oracles whose forget accuracy is above chance (its lower bound is)."""
    chance = layout.chance
    found = []
    for model, groups in scores.items():
        value, interval = groups["forgetting"]["zero_shot_top1"].value, groups["forgetting"]["zero_shot_top1"].interval
        if model.startswith("oracle ") and value is not None and interval is not None and interval[0] > chance:
            found.append(
                f"{model} seems to know the concept: it names {100 * value:.0f} % of the forget images, and chance is "
                f"{100 * chance:.0f} %. Train oracles without the forget pairs; if they were, the concept follows "
                "from what they saw."
            )
    return found


def _mean_scores(oracles: Sequence[Scores]) -> Scores:
    return {
        group: {
            name: mean_estimate([oracle[group][name] for oracle in oracles if name in oracle[group]]) for name in found
        }
        for group, found in oracles[0].items()
    }


def _tug_of_war(models: Mapping[str, ClipAdapter], views: Mapping[str, View], sets: AuditSets, how: Encoding) -> float:
    found = {}
    for name, view in views.items():
        if name == "before":
            continue
        own = how.for_model(models[name], models["before"], sets.test)
        correct = training_correct(models[name], sets, view.features.concepts, own, name)
        correct["test"] = view.correct
        found[name] = {kind: float(hits.mean()) for kind, hits in correct.items()}
    oracles = [values for name, values in found.items() if name != "after"]
    return tug_of_war(found["after"], {kind: float(np.mean([one[kind] for one in oracles])) for kind in oracles[0]})
