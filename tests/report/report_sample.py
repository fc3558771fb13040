"""A small made-up run for the report's tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from cliperase_fast.report import ReportData

EVIL = "<script>alert(1)</script>"


def scores(pairs: int, accuracy: float | None, recall: float, similarity: float | None) -> dict[str, Any]:
    recalls = {f"{way}_r@{k}": recall for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    sizes = {"pairs": pairs, "gallery_captions": 40, "gallery_images": 360}
    return {**sizes, "zero_shot_top1": accuracy, **recalls, "association": similarity}


def sample_result(
    forget: tuple[float, float] = (0.98, 0.0), retain: tuple[float, float] = (0.97, 0.965)
) -> dict[str, Any]:
    names = ["one", "two", "three", "seven"]
    return {
        "before": {"forget": scores(36, forget[0], 0.5, 0.8), "retain": scores(324, retain[0], 0.6, 0.7)},
        "after": {"forget": scores(36, forget[1], 0.1, -0.2), "retain": scores(324, retain[1], 0.6, 0.69)},
        "per_class": {
            name: {
                "set": "forget" if name == "seven" else "retain",
                "pairs": 36,
                "before": 0.97,
                "after": 0.0 if name == "seven" else 0.96,
            }
            for name in names
        },
        "selection": {
            "epoch": 3,
            "step": 6,
            "reason": "Epoch 3 forgets the most of all.",
            "validation": {"forget": 0.0, "retain": 0.96, "retain_before": 0.97},
        },
        "model": "local-dir:somewhere",
        "data": {
            "forget": "demo#class:seven",
            "retain": "rest",
            "test": "demo test",
            "fingerprint": "c0ffee",
            "forget_pairs": 120,
            "retain_pairs": 1100,
            "skipped": {},
        },
        "config": {"lambda_forget": 3.0, "learning_rate": 1e-4, "retain_floor": 0.02},
        "seconds": {"total": 41.2, "train": 7200.0, "evaluate": 4.1},
        "pairs_per_second": 581.3,
        "versions": {"torch": "2.15.0"},
        "seed": 17,
    }


def sample_run(result: dict[str, Any] | None = None, **changes: Any) -> ReportData:
    rng = np.random.default_rng(0)
    metrics: list[dict[str, Any]] = []
    for step in range(1, 9):
        terms = {
            "total": 2.0 / step,
            "retain": 0.5,
            "forget": 1.0 / step,
            "consistency": 0.1,
            "learning_rate": 1e-4,
        }
        metrics.append({"step": step, "epoch": step // 2, **terms})
        if step % 2 == 0:
            metrics.append({"step": step, "epoch": step // 2, "validation": {"forget": 1 / step, "retain": 0.96}})
    fields: dict[str, Any] = {
        "title": "Forgetting demo#class:seven",
        "result": sample_result() if result is None else result,
        "metrics": metrics,
        "similarities": {
            when: {"forget": rng.normal(mean, 0.1, 36), "retain": rng.normal(0.7, 0.1, 90)}
            for when, mean in (("before", 0.8), ("after", -0.2))
        },
        "embeddings": {when: rng.normal(size=(40, 12)).astype(np.float32) for when in ("before", "after")},
        "embedding_sets": ["forget" if i % 4 == 0 else "retain" for i in range(40)],
        "embedding_labels": [["seven", "one", "two", "three"][i % 4] for i in range(40)],
    }
    return ReportData(**{**fields, **changes})
