"""How well version 0.1's demo forgets, on data that needs no download: what went, and what stayed.

    python -m benchmarks.quality digits      several digits, and each loss left out in turn; two minutes on two cores
    python -m benchmarks.quality rates       digits under several learning rates; a minute
    python -m benchmarks.quality shapes      "red circle": the association goes, red things and circles stay; 4 minutes
    python -m benchmarks.quality cifar10 --shards '/data/train-{00000..00003}.tar' --test-shards /data/test-00000.tar

The first run of each trains a small CLIP before, which takes seconds for digits and minutes for the others. Each writes
benchmarks/results/quality-NAME.json; `python -m benchmarks.write_docs` puts the figures into the docs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.demo import run_demo

from .machine import RESULTS, describe
from .records import add_shards, demo_settings, shards_of

ABLATION = {
    "all three": {},
    "forgetting alone": {"lambda_retain": 0.0, "lambda_consistency": 0.0},
    "without retention": {"lambda_retain": 0.0},
    "without consistency": {"lambda_consistency": 0.0},
}


def digits() -> list[dict[str, Any]]:
    runs = [
        measure(f"digit {digit}", f"demo#class:{digit}", {}) for digit in ("seven", "zero", "three", "five", "eight")
    ]
    # The last checkpoint of a longer run, whatever it lost: choosing the best would hide what a missing loss does.
    runs += [
        measure(
            f"ablation: {name}", "demo#class:seven", {**weights, "epochs": 40, "evaluate_every": 10, "select": "last"}
        )
        for name, weights in ABLATION.items()
    ]
    return runs


def rates() -> list[dict[str, Any]]:
    """The last checkpoint of each, whatever it lost: the choice among checkpoints would hide what the rate does."""
    return [
        measure(
            f"{rate:g}, {epochs} epochs",
            "demo#class:seven",
            {"learning_rate": rate, "epochs": epochs, "evaluate_every": epochs, "select": "last"},
        )
        for rate, epochs in ((1e-6, 10), (1e-5, 10), (1e-5, 100), (1e-4, 10), (1e-3, 10))
    ]


def shapes() -> list[dict[str, Any]]:
    return [measure(name, f"shapes#class:{name}", {}) for name in ("red circle", "blue star", "green square")] + [
        measure(
            "red circle, forgetting alone",
            "shapes#class:red circle",
            {"lambda_retain": 0.0, "lambda_consistency": 0.0, "select": "last"},
        )
    ]


def cifar10(shards: str, test_shards: str) -> list[dict[str, Any]]:
    test = f"wds:{test_shards}"
    return [measure("airplane", f"wds:{shards}#class:airplane", {}, test=test)]


def measure(name: str, forget: str, settings: Mapping[str, Any], test: str | None = None) -> dict[str, Any]:
    """One run of the demo; its scores, and how classes fared by what they share with the forgotten ones."""
    print(f"--- {name}", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        given = {**demo_settings(forget), **settings}
        result = run_demo(forget, Path(folder) / "run", test=test, report=False, **given)
    print(result.summary(), flush=True)
    return {
        "name": name,
        "settings": dict(settings),
        "before": result.before,
        "after": result.after,
        "groups": kinship(result.record["per_class"]),
        "selection": result.selection,
        "seconds": round(time.perf_counter() - began, 1),
        "pairs_per_second": round(result.record["pairs_per_second"], 1),
    }


def kinship(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean accuracy before and after of the classes by the words they share with a forgotten one.

    For "red circle": other classes with "red", other classes with "circle", and those with neither.
    """
    forgotten = [name for name, row in per_class.items() if row["set"] == "forget"]
    words = sorted({word for name in forgotten for word in name.split()})
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in per_class.items():
        if row["set"] == "forget":
            groups.setdefault("forgotten", []).append(row)
            continue
        shared = [word for word in words if word in name.split()]
        for word in shared or ["others"]:
            groups.setdefault(word, []).append(row)
    return {
        group: {
            "classes": len(rows),
            "before": float(np.mean([row["before"] for row in rows])),
            "after": float(np.mean([row["after"] for row in rows])),
        }
        for group, rows in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("digits", "rates", "shapes", "cifar10"))
    add_shards(parser, "cifar10")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.name == "cifar10":
        runs = cifar10(*shards_of(parser, arguments))
    else:
        runs = {"digits": digits, "rates": rates, "shapes": shapes}[arguments.name]()
    record = {**describe(), "command": f"python -m benchmarks.quality {arguments.name}", "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"quality-{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"quality {arguments.name}: done in {time.perf_counter() - began:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
