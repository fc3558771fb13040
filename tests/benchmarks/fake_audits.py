"""Audits as the audit benchmark gets and records them, without models."""

from types import SimpleNamespace

from cliperase_fast.benchmarks import audit


def entry(value, **more):
    return {"value": value, "low": None if value is None else value - 0.1, "high": value, **more}


def scores(association, relearned=None):
    depth = {} if relearned is None else {f"relearn@{step}": entry(relearned) for step in (5, 10, 20)}
    return {"forgetting": {"association": entry(association, note="n")}, "collateral": {}, "depth": depth}


def found(after=-0.9, oracles=(-0.04, 0.06), relearned=None):
    """What an audit returns."""
    mean = sum(oracles) / len(oracles)
    models = {"before": scores(0.84, relearned), "after": scores(after, relearned), "oracle": scores(mean, relearned)}
    data = {
        "scores": models | {f"oracle {i}": scores(value, relearned) for i, value in enumerate(oracles, 1)},
        "gap": {"mean": 0.5, "floor": 0.1, "tug_of_war": 0.8},
        "background": -0.1, "over_forgotten": after < -0.5, "verdicts": {"forgetting": "Gone."}, "notes": [],
        "data": {}, "format": 1,
    }  # fmt: skip
    return SimpleNamespace(to_dict=lambda: data, summary=lambda: "a table")


def run(concept="seven", method="cliperase", **options):
    return {"concept": concept, "method": method, "settings": {}, "seconds": 1.0, **audit.kept(found(**options))}
