"""A small made-up audit for the report's tests: the content of audit.json."""

from __future__ import annotations

from typing import Any

EVIL = "<script>alert(1)</script>"
STEPS = (0, 1, 5, 10, 20, 50, 100)
MODELS = {"before": 0.9, "after": 0.1, "oracle 1": 0.2, "oracle 2": 0.3, "oracle 3": 0.4}


def score(value: float | None, **notes: Any) -> dict[str, Any]:
    ends = (None, None) if value is None else (value - 0.05, value + 0.05)
    return {"value": value, "low": ends[0], "high": ends[1], **notes}


def scores_of(level: float, depth: bool, classes: bool) -> dict[str, Any]:
    accuracy = score(level) if classes else score(None, reason="the data has no classes")
    groups = {
        "forgetting": {
            "association": score(level - 0.5),
            "mrr": score(level),
            "mrr_image_to_text": score(level),
            "mrr_text_to_image": score(level),
            "zero_shot_top1": accuracy,
            "image_to_text_r@1": score(level),
            "text_to_image_r@10": score(level),
            "paraphrase_top1": accuracy,
            "paraphrase_top1_max": {**accuracy, "variant": "seven = sevens"} if classes else accuracy,
            "association_separability": score(level),
        },
        "collateral": {
            "retain_top1": score(0.9),
            "retain_association": score(0.7),
            "worst_class_drop": score(0.1, **{"class": "two"}) if classes else accuracy,
            "neighbours_top1": accuracy,
            "image_side": score(0.01),
            "text_side": score(-0.01),
            "other": score(0.3),
            "other:shapes": score(0.3),
            "intra_identity": score(0.4),
            "inter_identity": score(0.4),
            "visual_identity": score(0.8),
            "general": score(0.9),
        },
        "depth": {
            "membership": score(0.5),
            "membership_tpr@1%": score(None, reason="needs at least 1000 forget test pairs; there are 36"),
            "unusual": score(level),
        },
    }
    if depth:
        groups["depth"] |= {
            "probe": score(level, block="block 2"),
            **{f"relearn@{step}": score(min(1.0, level + step / 100)) for step in STEPS},
            "relearn_area": score(level),
            "prompt_attack": score(level),
            "quantised_top1@8": accuracy,
            **{
                f"relearn_area:{kind}": {
                    "value": level, "low": None, "high": None, "curve": {str(step): level for step in STEPS},
                }
                for kind in ("4 shots", "1 shot", "neighbour", "unrelated")
            },
        }  # fmt: skip
    return groups


def sample_audit(oracles: int = 3, depth: bool = True, classes: bool = True, **changes: Any) -> dict[str, Any]:
    """The content of audit.json. changes: of its keys."""
    names = ["before", "after", *(f"oracle {number}" for number in range(1, oracles + 1))]
    scores = {name: scores_of(MODELS[name], depth, classes) for name in names}
    verdicts = {
        "forgetting": "The model names 10.0 % of the forget images.",
        "collateral": "Of the retain images 90.0 % are still named right.",
        "depth": "The concept answers again after 50 steps on 16 pictures.",
    }
    gap = None
    if oracles:
        scores["oracle"] = scores_of(sum(MODELS[name] for name in names[2:]) / oracles, depth, classes)
        after, target = ({k: v["value"] for g in scores[n].values() for k, v in g.items()} for n in ("after", "oracle"))
        found = {name: abs(after[name] - target[name]) for name in after if after[name] is not None}
        floors = dict.fromkeys(found, 0.05) if oracles > 1 else {}
        gap = {**found, "mean": 0.04, "floor": 0.02 if oracles > 1 else None, "floors": floors, "tug_of_war": 0.91}
        verdicts["gap"] = "The model is 0.040 away from models that never saw the concept."
    histogram = {"low": -0.1, "width": 0.005, "counts": [1, 0, 3, 5, 2], "mean": -0.09}
    sets = dict.fromkeys(("forget", "retain", "other"), histogram)
    rows = {
        name: {
            "set": "forget" if name == "seven" else "retain",
            "pairs": 36,
            "before": 0.97,
            "after": 0.0 if name == "seven" else 0.96,
            **({"oracle": 0.02} if oracles else {}),
        }
        for name in ("one", "two", "seven")
    }
    return {
        "format": 1,
        "scores": scores,
        "gap": gap,
        "background": 0.0,
        "over_forgotten": True,
        "over_forgotten_below": -0.35 if oracles else -0.1,
        "verdicts": verdicts,
        "notes": ["The data has no test split."],
        "data": {
            "forget": "demo train",
            "test": "demo test",
            "forget_test_pairs": 36,
            "retain_test_pairs": 1324,
            "concepts": ["seven"],
            "skipped": {"image cannot be decoded": {"count": 1000, "example": "image0.jpg"}},
        },
        "evidence": {
            "similarities": dict.fromkeys(names, sets),
            "per_class": rows if classes else {},
        },
        **changes,
    }
