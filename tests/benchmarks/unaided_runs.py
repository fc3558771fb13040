"""Runs, audits and a study of the benchmark without settings, which the tests here share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from cliperase_fast.benchmarks import records, unaided
from cliperase_fast.benchmarks.unaided_verdicts import CALIBRATED, GIVEN

FOUND = {"learning_rate": 3.16228e-05, "batch_size": 128, "forget_fraction": 0.25, "steps": 60, "chosen_step": 40}


def entry(value, low=None):
    return {"value": value, "low": value if low is None else low, "high": value}


def one(method=CALIBRATED, concept="seven", seed=0, *, forget=0.0, retain=0.97, worst=(0.02, 0.0), gap=0.05, **more):
    """A run of a method that is audited."""
    levels = {"association": 0.0, "image_side": 0.0, "text_side": 0.0, "intra_identity": 0.8, "inter_identity": 0.8}
    own = {"zero_shot_top1": entry(forget), "retain_top1": entry(retain), "worst_class_drop": entry(*worst)}
    others = {"zero_shot_top1": 0.9, "retain_top1": 0.98, "worst_class_drop": 0.0, **levels}
    scores = {
        "before": others,
        "after": {**{name: entry(value) for name, value in levels.items()}, **own},
        "oracle": {**others, "zero_shot_top1": 0.0},
    }
    recipe = {**FOUND, "probes": 2, "target_reached": True, "within_floor": True}
    run = {
        "concept": concept, "seed": seed, "method": method, "commit": "c", "recipe": recipe, "seconds": 10.0,
        "cpu_seconds": 9.0, "audit_seconds": 1.0, "scores": scores, "gap": {"mean": gap}, "floor": 0.02,
    }  # fmt: skip
    return {**run, **more}


def given(concept="seven", seed=0, seconds=8.0, chosen=5.0):
    run = {"concept": concept, "seed": seed, "method": GIVEN, "commit": "c", "seconds": seconds, "cpu_seconds": 6.0}
    return {**run, "chosen": {"steps": 40, "seconds": chosen, "cpu_seconds": 4.0}}


def failure(method=CALIBRATED, concept="seven", seed=0):
    return {"concept": concept, "seed": seed, "method": method, "commit": "c", "error": "UnlearningError: no"}


def audited(after=0.1, oracles=(0.0, 0.2)):
    """What `audit()` returns."""
    names = {name: group for group, of_group in unaided.SCORES.items() for name in of_group}
    missing = ("intra_identity", "inter_identity", "general")

    def groups(value):
        found = {group: {} for group in unaided.SCORES}
        for name, group in names.items():
            found[group][name] = {"value": None if name in missing else value, "low": value - 0.1, "high": value + 0.1}
        return found

    mean = sum(oracles) / len(oracles)
    gap = {name: abs(after - mean) for name in names if name not in missing}
    gap |= {"association": 0.4, "image_side": 0.2, "retain_association": 9.0}
    models = {"before": groups(0.9), "after": groups(after), "oracle": groups(mean)}
    models |= {f"oracle {number}": groups(value) for number, value in enumerate(oracles, 1)}
    gap["floors"] = dict.fromkeys(names, 0.2) | {"text_side": 0.6, "retain_association": 9.0}
    data = {"scores": models, "gap": gap, "over_forgotten": False}
    return SimpleNamespace(to_dict=lambda: data)


def study(calls, **changes):
    def original(seed):
        calls.originals.append(seed)
        return Path(f"original-{seed}")

    concepts = {"seven": "class:seven", "three": "class:three"}
    parts = {
        "source": "demo", "concepts": concepts, "fixed": dict.fromkeys(concepts, records.DEMO),
        "original": original, "oracles": lambda concept: [Path(f"{concept}-1"), Path(f"{concept}-2")], "test": "t",
    }  # fmt: skip
    return unaided.Study(**{**parts, **changes})
