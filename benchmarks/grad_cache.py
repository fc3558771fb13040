"""Peak memory of one step of `unlearn()` with large batches, at once and in chunks (grad_cache_chunk).

python -m benchmarks.grad_cache                       writes benchmarks/results/grad-cache.json; CPU, some minutes
python -m benchmarks.grad_cache --one BATCH CHUNK     one case, in this process; prints JSON

The model is the demo's, the images are its digits over and over, and no two captions are alike, so that both towers
encode as many rows as the batch has pairs. Memory is the most the whole process has held, Python, torch, data and
evaluation included.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from .machine import RESULTS, describe, resident, run_module

CASES = ((65536, 256), (8192, 0), (8192, 256), (1024, 0))  # pairs in the batch, chunk (0: at once)
_HELD_OUT = 64  # pairs of each kind beyond the batch, for validation and test


def measure(batch: int, chunk: int) -> dict[str, Any]:
    """One step of `unlearn()`; peak resident bytes of the process."""
    from cliperase_fast import unlearn
    from cliperase_fast.data import open_source
    from cliperase_fast.demo import train_small_clip
    from cliperase_fast.demo_models import DEMO_MODELS
    from cliperase_fast.models import load_model

    digits = open_source("demo").train
    model = train_small_clip(digits, replace(DEMO_MODELS["demo"], epochs=1))  # its weights do not matter here
    transform = load_model(model).transform
    assert transform is not None
    images = [transform(digits.image(index)) for index in range(len(digits))]

    def pairs(kind: str, count: int) -> list[tuple[Any, str]]:
        return [(images[i % len(images)], f"{kind} {i} {digits[i % len(images)][1]}"[:40]) for i in range(count)]

    half = batch // 2
    result = unlearn(
        model,
        pairs("forget", half + _HELD_OUT),
        pairs("retain", half + _HELD_OUT),
        test=(pairs("forget test", _HELD_OUT), pairs("retain test", _HELD_OUT)),
        method="cliperase",
        val_fraction=_HELD_OUT / (half + _HELD_OUT),
        batch_size=batch,
        grad_cache_chunk=chunk,
        epochs=1,
        learning_rate=1e-6,
        report=False,
        progress=False,
    )
    steps = [line for line in result.history if "total" in line]
    assert len(steps) == 1 and round(steps[0]["pairs_per_second"] * result.record["seconds"]["train"]) == batch
    return {
        "batch": batch,
        "chunk": chunk,
        "peak_bytes": resident("VmHWM"),
        **{name: steps[0][name] for name in ("total", "grad_norm")},
    }


def measured_apart(batch: int, chunk: int) -> dict[str, Any]:
    """`measure` in a process of its own, whose peak holds nothing else."""
    return json.loads(run_module("grad_cache", "--one", str(batch), str(chunk)).splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int, metavar=("BATCH", "CHUNK"))
    one = parser.parse_args().one
    if one:
        print(json.dumps(measure(*one)))
        return 0
    record: dict[str, Any] = {"command": "python -m benchmarks.grad_cache", **describe(), "runs": []}
    for case in CASES:
        record["runs"].append(measured_apart(*case))
        print(record["runs"][-1], flush=True)
        (RESULTS / "grad-cache.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
