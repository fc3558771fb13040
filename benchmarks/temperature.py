"""One model with several logit scales: its cosines lie closer together, its logits stay the same up to a constant.

    python -m benchmarks.temperature

The small CLIP of the demo has a logit scale of about 20, and CLIP has 100 and cosines that differ little. Here the
features of the small CLIP get two further components, of the same length everywhere, which shrink all distances between
cosines; the logit scale grows as the distances shrink. Forgetting should not depend on such a change. All
hearts are forgotten in three originals, by `unlearn()` without any setting; the scores are those of the test split.

The result file is benchmarks/results/temperature.json; `python -m benchmarks.write_docs` puts the figures into
docs/unaided.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.data import open_source, select
from cliperase_fast.demo import cached_model
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.models import load_model
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import write_text_atomically
from cliperase_fast.unlearning import unlearn

from .machine import RESULTS, describe
from .records import Table, percent, record_text
from .unaided import SEEDS, model_seed

FILE = "temperature"
NOT_MEASURED = "Not measured yet: `python -m benchmarks.temperature`."
SOURCE, CONCEPT = "shapes", "class:* heart"
SCALES = (None, 100.0, 250.0)  # None: as the model was trained
UNRELATED = 0.17  # the cosine between the further components of images and of captions


class Closer(nn.Module):
    """A model with another logit scale. The logits are those of `towers` plus a constant."""

    of_images: Tensor
    of_captions: Tensor

    def __init__(self, towers: Any, logit_scale: float) -> None:
        super().__init__()
        self.towers, self.logit_scale = towers, towers.logit_scale
        share = float(self.logit_scale.detach().exp()) / logit_scale  # of a feature's squared length
        self.near, self.rest = math.sqrt(share), math.sqrt(1 - share)
        cosine = UNRELATED / (1 - share)
        self.register_buffer("of_images", torch.tensor([cosine, math.sqrt(1 - cosine**2)]))
        self.register_buffer("of_captions", torch.tensor([1.0, 0.0]))
        with torch.no_grad():
            self.logit_scale.fill_(math.log(logit_scale))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self._with(self.towers.encode_image(pixels), self.of_images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._with(self.towers.encode_text(tokens), self.of_captions)

    def _with(self, features: Tensor, further: Tensor) -> Tensor:
        own = nn.functional.normalize(features, dim=-1)
        return torch.cat([self.near * own, self.rest * further.to(own).expand(len(own), 2)], dim=1)


def run(seed: int, logit_scale: float | None) -> dict[str, Any]:
    """Forget the concept in one original. logit_scale: to give it, None for its own."""
    source = open_source(SOURCE)
    folder = cached_model(source.train, demo_model_for(SOURCE), seed=seed, progress=bars_by_default())
    adapter = load_model(f"local-dir:{folder}")
    own = float(adapter.logit_scale().detach())
    model = adapter.module if logit_scale is None else Closer(adapter.module, logit_scale)
    assert source.test is not None
    sets = []
    for pairs in (source.train, source.test):
        mask = select(pairs, CONCEPT)
        sets.append([pairs.subset(np.flatnonzero(rows)) for rows in (mask, ~mask)])
    began = time.process_time()
    result = unlearn(
        model, *sets[0], test=tuple(sets[1]), tokenizer=adapter.tokenize, transform=adapter.transform, seed=seed
    )  # fmt: skip
    target = result.record["recipe"]["target"]
    return {
        "seed": seed,
        "logit_scale": own if logit_scale is None else logit_scale,
        "given": logit_scale is not None,
        "pairs": len(sets[1][0]),
        "background": target["background"],
        "margin": target["association"] - target["background"],
        "target_reached": result.selection["target_reached"],
        "divergence": result.selection["divergence"]["mean"],
        "before": _scores(result.before),
        "after": _scores(result.after),
        "cpu_seconds": time.process_time() - began,
    }


def _scores(of: Mapping[str, Any]) -> dict[str, Any]:
    names = ("zero_shot_top1", "text_to_image_r@1", "association")
    return {**{name: of["forget"][name] for name in names}, "retain_top1": of["retain"]["zero_shot_top1"]}


def parts(record: Mapping[str, Any]) -> Sequence[Table | str]:
    """Return what the docs show of a record: a row for each logit scale, means over the originals."""
    runs = record["runs"]
    scales = sorted({run["logit_scale"] if run["given"] else 0.0 for run in runs})
    rows = [_row([run for run in runs if (run["logit_scale"] if run["given"] else 0.0) == scale]) for scale in scales]
    head = (
        "logit scale", "association before", "level", "margin", "association after", "forget top-1",
        "search finds it first", "retain top-1", "divergence", "at the target",
    )  # fmt: skip
    count = len({run["seed"] for run in runs})
    return [(head, rows), f"Means over {count} originals, {runs[0]['pairs']} test pairs to forget."]


def _row(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    def mean(*path: str) -> float:
        values = []
        for one in runs:
            value: Any = one
            for name in path:
                value = value[name]
            values.append(value)
        return float(np.mean(values))

    scale, changed = mean("logit_scale"), mean("after", "retain_top1") - mean("before", "retain_top1")
    return (
        f"{scale:.0f}" if runs[0]["given"] else f"{scale:.0f}, as trained",
        f"{mean('before', 'association'):.3f}",
        f"{mean('background'):.3f}",
        f"{mean('margin'):.3f}",
        f"{mean('after', 'association'):.3f}",
        percent(mean("after", "zero_shot_top1")),
        percent(mean("after", "text_to_image_r@1")),
        f"{percent(mean('after', 'retain_top1'))} ({100 * changed:+.1f})",
        f"{mean('divergence'):.3f}",
        f"{sum(bool(one['target_reached']) for one in runs)} of {len(runs)}",
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many originals ({SEEDS})")
    arguments = parser.parse_args(words)
    runs = []
    for number in range(arguments.seeds):
        for scale in SCALES:
            runs.append(run(model_seed(number), scale))
            print(runs[-1], flush=True)
    path = RESULTS / f"{FILE}.json"
    record = {**describe(), "command": "python -m benchmarks.temperature", "runs": runs}
    write_text_atomically(path, record_text(record) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
