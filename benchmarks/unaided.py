"""Forgetting without any setting, beside version 0.1's fixed numbers and a control, against models that never knew.

    python -m benchmarks.unaided digits      five digits
    python -m benchmarks.unaided shapes      one of a hundred shapes, all stars, everything purple
    python -m benchmarks.unaided personas    three sets of facts
    python -m benchmarks.unaided cifar10 --shards '/data/train-{00000..00003}.tar' --test-shards /data/test-00000.tar
    python -m benchmarks.unaided towers --shards ... --test-shards ...    two pretrained towers (benchmarks.towers)

Each concept is forgotten in three originals, trained from different seeds, by each of `METHODS`. The result is audited
on the test split against models that were trained without the concept, from seeds that no original has; the originals
share them. `calibrated` is also called with the learning rate and the steps that it found, to see what finding them
costs: right after the call that found them, in the same process.

The result file benchmarks/results/unaided-NAME.json is written after every run, and a further call continues with the
runs that are missing. Remove the file to measure again. A run that fails is listed with its error; --retry repeats it.
The models are kept in the cache of `cliperase-fast demo`; --prepare trains those that are missing, and nothing else.
`python -m benchmarks.write_docs` puts the figures into docs/unaided.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.auditing import audit
from cliperase_fast.auditing.features import keep_features
from cliperase_fast.data import open_source
from cliperase_fast.data.personas import FORGET_SETS
from cliperase_fast.demo import cached_model, cached_oracles, require_known
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.errors import UnlearningError
from cliperase_fast.models import load_model
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import write_text_atomically
from cliperase_fast.unlearning import unlearn

from . import unaided_report
from .machine import RESULTS, describe
from .records import DEMO, DEMO_FEW_PAIRS, add_shards, classes, record_text, shards_of
from .unaided_verdicts import (
    BFLOAT16,
    CALIBRATED,
    CONTROL,
    FIXED,
    GAP,
    GIVEN,
    METHODS,
    SEARCH,
    SEARCHED,
    SIMILAR,
    UNRELATED,
    verdicts,
)

SEEDS = 3
# One of a hundred combinations, which a model that never saw it still infers from its parts; a shape; a colour.
SHAPES = {"red circle": "class:red circle", "stars": "class:* star", "purple": "class:purple *"}
SCORES = {
    "forgetting": ("zero_shot_top1", "association", SEARCH),
    "collateral": (
        "retain_top1", "worst_class_drop", "image_side", "text_side", "retain_association", "neighbours_top1",
        "intra_identity", "inter_identity", "general",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """The runs of one command.

    concepts: the selector of each thing to forget. fixed: for each the settings of version 0.1's demo. original:
    returns the folder of the model with this training seed. oracles: the folders of the models without this concept.
    test: where to measure, if not on the source's own test split. methods: to run, of `METHODS` and `EXTRA`.
    """

    source: str
    concepts: Mapping[str, str]
    fixed: Mapping[str, Mapping[str, Any]]
    original: Callable[[int], Path]
    oracles: Callable[[str], Sequence[Path]]
    test: str | None = None
    methods: Sequence[str] = METHODS


def model_seed(number: int) -> int:
    """The training seed of the original with this number, from 0. The oracles have the seeds 1, 2, ..., at most 5."""
    return 10 * number


def small(
    source: str, concepts: Mapping[str, str], fixed: Mapping[str, Any], *, oracles: int = 3, test: str | None = None
) -> Study:
    """A study of the demo's small CLIP on a source. fixed: for all concepts, or for each concept."""
    bars = bars_by_default()

    def original(seed: int) -> Path:
        recipe = demo_model_for(source)
        folder = cached_model(open_source(source).train, recipe, seed=seed, progress=bars)
        require_known(folder, source, recipe)
        return folder

    def without(concept: str) -> list[Path]:
        return cached_oracles(source, concepts[concept], oracles, progress=bars)

    by_concept = {concept: fixed.get(concept, fixed) for concept in concepts}
    return Study(source, concepts, by_concept, original, without, test)


def towers(shards: str, test_shards: str) -> Study:
    """A study of the towers of `benchmarks.towers`, which version 0.1 would have treated like other photographs."""
    from .towers import towers_model, towers_oracles

    bars = bars_by_default()
    return Study(
        f"wds:{shards}",
        classes("airplane"),
        {"airplane": DEMO},
        lambda seed: towers_model(shards, seed=seed, progress=bars),
        lambda concept: towers_oracles(shards, concept, 3, progress=bars),
        f"wds:{test_shards}",
        (*METHODS, UNRELATED, BFLOAT16),
    )


def cifar10(shards: str, test_shards: str) -> Study:
    study = small(f"wds:{shards}", classes("airplane", "dog", "ship"), DEMO, test=f"wds:{test_shards}")
    return replace(study, methods=(*METHODS, SIMILAR))


STUDIES: Mapping[str, Callable[[], Study]] = {
    "digits": partial(small, "demo", classes("seven", "three", "eight", "one", "five"), DEMO, oracles=5),
    "shapes": lambda: replace(
        small("shapes", SHAPES, {"red circle": DEMO_FEW_PAIRS, "stars": DEMO, "purple": DEMO}),
        methods=(*METHODS, UNRELATED),
    ),
    "personas": partial(small, "personas", FORGET_SETS, DEMO_FEW_PAIRS),
}
OF_SHARDS: Mapping[str, Callable[[str, str], Study]] = {"cifar10": cifar10, "towers": towers}


class Record:
    """The result file of a study. runs: those that are done, each a run of one method.

    order: of the concepts. methods: in their order.
    """

    kind = "unaided"  # the first word of the file's name

    def __init__(self, name: str, command: str, order: Sequence[str], methods: Sequence[str] = METHODS) -> None:
        self.name, self.command, self.order, self.methods = name, command, list(order), list(methods)
        self.path = RESULTS / f"{self.kind}-{name}.json"
        self.runs: list[dict[str, Any]] = []
        if self.path.exists():
            self.runs = json.loads(self.path.read_text(encoding="utf-8"))["runs"]

    def find(self, concept: str, seed: int, method: str) -> dict[str, Any] | None:
        wanted = (concept, seed, method)
        return next((run for run in self.runs if (run["concept"], run["seed"], run["method"]) == wanted), None)

    def add(self, run: dict[str, Any]) -> None:
        """Add a run in place of an earlier one like it, and write the file."""
        old = self.find(run["concept"], run["seed"], run["method"])
        self.runs = sorted([*(one for one in self.runs if one is not old), run], key=self._place)
        RESULTS.mkdir(exist_ok=True)
        write_text_atomically(self.path, record_text(self.content()) + "\n")

    def content(self) -> dict[str, Any]:
        commits = ", ".join(dict.fromkeys(run["commit"] for run in self.runs))
        return {
            **describe(), "commit": commits, "command": self.command,
            "seconds": sum(run.get("seconds", 0.0) + run.get("audit_seconds", 0.0) for run in self.runs),
            **self.extra(), "runs": self.runs,
        }  # fmt: skip

    def extra(self) -> dict[str, Any]:
        """What the file says beside its runs."""
        return {"gap": list(GAP), "verdicts": verdicts(self.name, self.runs)}

    def _place(self, run: Mapping[str, Any]) -> tuple[int, int, int]:
        return self.order.index(run["concept"]), run["seed"], self.methods.index(run["method"])


def run_study(
    study: Study, record: Record, concepts: Iterable[str], seeds: int, *, retry: bool = False, runs: Path | None = None
) -> None:
    """Do the runs that the record lacks. retry: also those that failed. runs: where to keep the unlearned models."""
    for concept in concepts:
        with keep_features():  # the seeds share the oracles
            for seed in range(seeds):
                known = {method: record.find(concept, seed, method) for method in study.methods}
                missing = [method for method, run in known.items() if run is None or (retry and "error" in run)]
                if GIVEN in missing and CALIBRATED not in missing:  # they are timed side by side
                    missing.insert(0, CALIBRATED)
                if missing:
                    _Bench(study, record, concept, seed, runs).run(missing)


class _Bench:
    """The runs of one concept on one original. line: writes a run in a line of text."""

    line = staticmethod(unaided_report.run_line)

    def __init__(self, study: Study, record: Record, concept: str, seed: int, runs: Path | None = None) -> None:
        self.study, self.record, self.concept, self.seed, self.runs = study, record, concept, seed, runs
        self.forget = f"{study.source}#{study.concepts[concept]}"

    def run(self, methods: Sequence[str]) -> None:
        try:
            self.original = self.study.original(model_seed(self.seed))
        except UnlearningError as error:  # it does not know its data
            for method in methods:
                self._add(method, {"error": f"the original: {error}"})
            return
        # Loaded once for all audits; `unlearn` loads the original itself, as that is part of its time.
        self.before = load_model(f"local-dir:{self.original}")
        self.oracles = [load_model(f"local-dir:{path}") for path in self.study.oracles(self.concept)]
        for method in methods:
            try:
                found = self.measured(method)
            except Exception as error:  # a failure is a result
                found = {"error": f"{type(error).__name__}: {error}"}
            self._add(method, found)

    def _add(self, method: str, found: Mapping[str, Any]) -> None:
        run = {
            "concept": self.concept, "seed": self.seed, "method": method, "model_seed": model_seed(self.seed),
            "commit": describe()["commit"],
            **found,
        }  # fmt: skip
        self.record.add(run)
        print(self.line(run), flush=True)

    def measured(self, method: str) -> dict[str, Any]:
        """Do a run of a method."""
        return self._timed() if method == GIVEN else self._audited(method)

    def settings(self, method: str) -> dict[str, Any]:
        """What a method is called with."""
        if method == FIXED:
            return {"method": "cliperase", **self.study.fixed[self.concept]}
        if method == CONTROL:
            return self.control()
        if method in (UNRELATED, SIMILAR):
            return {"method": "calibrated", "forget_level": "unrelated" if method == UNRELATED else "similar"}
        if method == BFLOAT16:
            return {"method": "calibrated", "precision": "bf16"}
        return {"method": {CALIBRATED: "calibrated", SEARCHED: "cliperase"}[method]}

    def control(self) -> dict[str, Any]:
        """The settings of plain fine-tuning with the rate and the steps that `calibrated` found."""
        decay = {"schedule": "cosine"}  # calibrated lowers its rate too
        return {**self._chosen("chosen_step"), **decay, "method": "retain_finetune", "select": "last"}

    def _chosen(self, steps: str) -> dict[str, Any]:
        """The numbers that `calibrated` found. steps: which number of steps, of its record's "recipe"."""
        found = self.record.find(self.concept, self.seed, CALIBRATED)
        if found is None or "error" in found:
            raise UnlearningError(f"{CALIBRATED} failed or was not run, and this run takes its learning rate and steps")
        recipe = found["recipe"]
        numbers = {name: recipe[name] for name in ("learning_rate", "batch_size", "forget_fraction")}
        return {**numbers, "steps": recipe[steps]}

    def call(self, settings: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
        """Unlearn. Returns the result, and the seconds that the call took on the clock and on the processor."""
        clock, processor = time.perf_counter(), time.process_time()
        result = unlearn(f"local-dir:{self.original}", self.forget, "rest", test=self.study.test, **settings)
        took = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}
        return result, took

    def _timed(self) -> dict[str, Any]:
        """Call `calibrated` with the rate and the steps that it found: those it trained, and those up to its choice."""
        trained, chosen = ({**self._chosen(steps), "method": "calibrated"} for steps in ("steps", "chosen_step"))
        took = self.call(trained)[1]
        short = took if chosen == trained else self.call(chosen)[1]
        return {"settings": trained, **took, "chosen": {"steps": chosen["steps"], **short}}

    def _audited(self, method: str) -> dict[str, Any]:
        settings = self.settings(method)
        result, took = self.call(settings)
        if self.runs is not None:
            result.save(self.runs / f"{self.record.name}-{self.concept}-{self.seed}-{method}".replace(" ", "-"))
        began = time.perf_counter()
        found = self.audit(result)
        audit_seconds = time.perf_counter() - began
        return {
            "settings": settings, **took, "audit_seconds": audit_seconds, "recipe": _recipe(result), **found
        }  # fmt: skip

    def audit(self, result: Any) -> dict[str, Any]:
        """Return the scores of a result."""
        found = audit(
            self.before,
            result.adapter,
            self.forget,
            "rest",
            oracle=self.oracles or None,
            test=self.study.test,
        ).to_dict()
        return scores(found)


def _recipe(result: Any) -> dict[str, Any]:
    """What the run used and found; of a run with fixed numbers what was given."""
    recipe, selection, config = result.record["recipe"], result.selection, result.config
    trained = [line["step"] for line in result.history if "total" in line and "probe" not in line]
    return {
        "learning_rate": config.learning_rate if recipe is None else recipe["learning_rate"],
        "batch_size": config.batch_size,
        "forget_fraction": config.forget_fraction,
        "steps": max(trained, default=0),
        "chosen_step": selection["step"],
        "target_reached": selection["target_reached"],
        "within_floor": selection["within_floor"],
        "reason": selection["reason"],
        "stop": None if recipe is None else recipe["stop"],
        "target": None if recipe is None else recipe["target"]["association"],
        "probes": None if recipe is None else len(recipe["probes"]),
        "probe_steps": None if recipe is None else sum(probe["steps"] for probe in recipe["probes"]),
    }


def scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of an audit. gap: from the oracles' mean, "mean" over `GAP`; floor: between two oracles."""
    kept = {
        model: {
            name: entry if model == "after" else entry["value"]
            for group, names in SCORES.items()
            for name in names
            if (entry := groups[group].get(name)) is not None and entry["value"] is not None
        }
        for model, groups in found["scores"].items()
    }
    kept_scores = {"scores": kept, "over_forgotten": found["over_forgotten"]}
    if found["gap"] is None:
        return kept_scores
    gap = {name: found["gap"][name] for name in (*GAP, "intra_identity", "inter_identity") if name in found["gap"]}
    gap["mean"] = float(np.mean([gap[name] for name in GAP]))
    floor = float(np.mean([found["gap"]["floors"][name] for name in GAP]))
    return {**kept_scores, "gap": gap, "floor": floor}


def prepare(study: Study, concepts: Iterable[str], seeds: int) -> None:
    """Train the models that the cache lacks."""
    for seed in range(seeds):
        print(f"original {seed}: {study.original(model_seed(seed))}", flush=True)
    for concept in concepts:
        print(f"{concept}: {', '.join(map(str, study.oracles(concept)))}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*STUDIES, *OF_SHARDS))
    add_shards(parser, *OF_SHARDS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many originals ({SEEDS})")
    parser.add_argument("--only", metavar="CONCEPT", help="forget only this concept, not each in turn")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the unlearned models and their reports there")
    parser.add_argument("--retry", action="store_true", help="repeat the runs that failed")
    parser.add_argument("--prepare", action="store_true", help="only train the models")
    arguments = parser.parse_args(words)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds} must be at least 1")
    name = arguments.name
    study = STUDIES[name]() if name in STUDIES else OF_SHARDS[name](*shards_of(parser, arguments))
    concepts = list(study.concepts) if arguments.only is None else [arguments.only]
    if concepts[0] not in study.concepts:
        parser.error(f"--only {arguments.only!r} is not one of {', '.join(study.concepts)}")
    if arguments.prepare:
        prepare(study, concepts, arguments.seeds)
        return
    record = Record(name, f"python -m benchmarks.unaided {name}", list(study.concepts), study.methods)
    run_study(study, record, concepts, arguments.seeds, retry=arguments.retry, runs=arguments.runs)
    print(unaided_report.study_text(name, record.content()))
    print(f"unaided {name}: {len(record.runs)} runs; written to {record.path}")


if __name__ == "__main__":
    main()
