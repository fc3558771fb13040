"""The settings of every method, found on validation data alone and with the same budget for each.

    python -m benchmarks.search               all methods: the runs that the result file lacks, then the recipes
    python -m benchmarks.search slug ssd      these methods
    python -m benchmarks.search --first       the first concept alone
    python -m benchmarks.search --write       only write the recipes, from the runs there are

Three settings of each method forget the digit "nine"; the two best of them also forget all hearts of the shapes. Both
originals are those of seed 0 (`benchmarks.unaided`); neither concept is in another benchmark's tables. The learning
rate and the number of steps are left to the automatic recipe where a method has them, so what is searched are a
method's own options, or the make-up of its batches where it has none.

A run is judged by the validation split of its own training pairs: whether the rest is kept and the target reached, by
the rule of select="divergence", then by how much is left above the target, then by the divergence from the original.
Test pairs and oracles are not looked at.

Runs are in benchmarks/results/search.json, written after each; the recipes in cliperase_fast/recipes/.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from cliperase_fast.config import RECIPES
from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_model
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.storage import write_text_atomically
from cliperase_fast.unlearning import unlearn
from cliperase_fast.unlearning.methods import methods
from cliperase_fast.unlearning.selection import CLOSE, FORGET_SCORE, MARGIN

from .machine import RESULTS, describe
from .records import record_text

PATH = RESULTS / "search.json"
COMMON = {"select": "divergence"}  # in every setting, also of methods that would choose by another rule
FIRST, SECOND = ("demo", "class:nine"), ("shapes", "class:* heart")
KEPT = 2  # settings that go on to the second concept

Setting = Mapping[str, Any]


def _options(*values: Mapping[str, Any]) -> list[Setting]:
    return [{"method_options": dict(of)} if of else {} for of in values]


_BATCHES: list[Setting] = [{}, {"forget_fraction": 0.125}, {"forget_fraction": 0.5}]
_FINE_TUNES = _options({}, {"learning_rate": 1e-4}, {"learning_rate": 1e-4, "steps": 30})
# The first setting of each is its defaults.
SETTINGS: Mapping[str, Sequence[Setting]] = {
    "calibrated": _options({}, {"lambda_held": 1000.0}, {"lambda_held": 10000.0}),
    "cliperase": [{}, {"forget_loss": "hinge"}, {"lambda_consistency": 10.0}],
    "ssd": _options({}, {"alpha": 30.0}, {"alpha": 100.0}),
    "slug": [{}, {"forget_fraction": 0.5}, {"method_options": {"evaluations": 20}}],
    "task_vector": _FINE_TUNES,
    "negmerge": _FINE_TUNES,
    "text_projection": _options({}, {"ridge": 1e-4}, {"ridge": 1.0}),
    "multidelete": _options({}, {"lambda_decoupling": 3.0}, {"lambda_decoupling": 10.0}),
    "gradient_ascent": _BATCHES,
    "gradient_difference": _BATCHES,
    "kl_minimization": _BATCHES,
    "relabel": _BATCHES,
    "salun": _options({}, {"fraction": 0.25}, {"fraction": 0.8}),
    "balanced": _BATCHES,
    "masked_distillation": _BATCHES,
    "retain_finetune": _BATCHES,
}


class Search:
    """The result file. runs: those that are done, each of one setting on one concept."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self._read()
        self.originals: dict[str, str] = {}

    def _read(self) -> None:
        if PATH.exists():
            self.runs = json.loads(PATH.read_text(encoding="utf-8"))["runs"]

    def find(self, method: str, setting: Setting, data: tuple[str, str]) -> dict[str, Any] | None:
        wanted = (method, dict(setting), *data)
        return next((r for r in self.runs if (r["method"], r["setting"], r["source"], r["concept"]) == wanted), None)

    def _found(self, method: str, setting: Setting, concepts: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return [run for data in concepts if (run := self.find(method, setting, data)) is not None]

    def run(self, method: str, setting: Setting, data: tuple[str, str]) -> dict[str, Any]:
        """Return the run of a setting, which is done if it is not there yet."""
        found = self.find(method, setting, data)
        if found is None:
            found = {
                "method": method, "setting": dict(setting), "source": data[0], "concept": data[1],
                "commit": describe()["commit"], **self._measure(method, setting, data),
            }  # fmt: skip
            self.runs.append(found)
            print(run_line(found), flush=True)
            self.write()
        return found

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        commits = ", ".join(dict.fromkeys(run["commit"] for run in self.runs))
        content = {
            **describe(), "commit": commits, "command": "python -m benchmarks.search", "common": COMMON,
            "tried": self.tried, "seconds": sum(run["seconds"] for run in self.runs), "chosen": self.chosen(),
            "runs": self.runs,
        }  # fmt: skip
        write_text_atomically(PATH, record_text(content) + "\n")
        self._read()  # so that what is chosen does not depend on digits that the file does not have

    @property
    def tried(self) -> int:
        """How many settings of every method have a run on the first concept."""
        most = max(map(len, SETTINGS.values()))
        complete = [all(self.find(m, of[number], FIRST) for m, of in SETTINGS.items()) for number in range(most)]
        return [*complete, False].index(False)

    def best(self, method: str) -> list[Setting]:
        """Return the settings that go on to the second concept, the best first."""
        settings = SETTINGS[method][: self.tried]
        return sorted(settings, key=lambda of: rank(self._found(method, of, (FIRST,))))[:KEPT]

    def chosen(self) -> dict[str, Setting]:
        """Return the best setting of each method: by both concepts if all methods have the runs, else by the first."""
        if not self.tried:
            return {}
        concepts: tuple[tuple[str, str], ...] = (FIRST, SECOND)
        if not all(self.find(method, of, SECOND) for method in SETTINGS for of in self.best(method)):
            concepts = (FIRST,)
        return {
            method: min(self.best(method), key=lambda of: rank(self._found(method, of, concepts)))
            for method in SETTINGS
        }

    def _measure(self, method: str, setting: Setting, data: tuple[str, str]) -> dict[str, Any]:
        source, forget = data
        if source not in self.originals:
            self.originals[source] = (
                f"local-dir:{cached_model(open_source(source).train, demo_model_for(source), seed=0)}"
            )
        settings = {"method": method, **COMMON, **setting}
        clock, processor = time.perf_counter(), time.process_time()
        try:
            result = unlearn(self.originals[source], f"{source}#{forget}", "rest", config=settings)
            found = judged(result.record["selection"])
        except Exception as error:  # a failure is a result
            found = {"error": f"{type(error).__name__}: {error}"}
        return {**found, "seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}


def judged(selection: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is ranked by, of validation pairs alone. left: what is above the target, 0 at it."""
    validation, reached = selection["validation"], selection["target_reached"]
    above = max(0.0, selection["association"] - selection["background"] - MARGIN)  # the logit scales here are low
    return {
        "kept": selection["within_floor"],
        "reached": reached,
        "left": 0.0 if reached else above + max(0.0, validation["forget"] - FORGET_SCORE),
        "divergence": selection["divergence"]["mean"],
        **validation,
        "association": selection["association"],
    }


def rank(runs: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return what is smaller for better runs of one setting. Failed runs come last."""
    if any("error" in run for run in runs):
        return (float("inf"),)
    lost = sum(not run["kept"] for run in runs)
    left = 0 if lost else int(np.mean([run["left"] for run in runs]) / CLOSE)
    return (lost, left, float(np.mean([run["divergence"] for run in runs])))


def run_line(run: Mapping[str, Any]) -> str:
    name = f"{run['method']} {json.dumps(run['setting'])}, {run['source']}#{run['concept']}"
    if "error" in run:
        return f"{name}: FAILED: {run['error']}"
    return (
        f"{name}: {'kept' if run['kept'] else 'NOT KEPT'}, {'reached' if run['reached'] else 'not reached'}, "
        f"left {run['left']:.3f}, divergence {run['divergence']:.3f}, forget {run['forget_before']:.0%} to "
        f"{run['forget']:.0%}, retain {run['retain_before']:.1%} to {run['retain']:.1%}, "
        f"{run['seconds']:.1f} s ({run['cpu_seconds']:.1f} s of the processor)"
    )


def write_recipes(chosen: Mapping[str, Setting], tried: int) -> None:
    """Write a file for each method. tried: how many settings of each were."""
    RECIPES.mkdir(exist_ok=True)
    for method, setting in chosen.items():
        body = yaml.safe_dump({"method": method, **COMMON, **setting}, sort_keys=False)
        head = f"# Written by `python -m benchmarks.search`: the best of {tried} settings on validation data.\n"
        write_text_atomically(RECIPES / f"{method}.yaml", head + body)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="all if none is named")
    parser.add_argument("--first", action="store_true", help="only the first concept")
    parser.add_argument("--write", action="store_true", help="only write the recipes")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.methods if name not in SETTINGS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SETTINGS)}")
    assert set(SETTINGS) == set(methods()), "every method is searched"
    search = Search()
    if not arguments.write:
        names = arguments.methods or list(SETTINGS)
        for number in range(max(map(len, SETTINGS.values()))):  # so that an unfinished search is the same for all
            for method in names:
                search.run(method, SETTINGS[method][number], FIRST)
        for method in names if search.tried and not arguments.first else []:
            for setting in search.best(method):
                search.run(method, setting, SECOND)
    search.write()
    chosen = search.chosen()
    write_recipes(chosen, search.tried)
    for method, setting in chosen.items():
        print(f"{method}: {json.dumps(setting)}")


if __name__ == "__main__":
    main()
