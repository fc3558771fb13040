"""The leaderboard: every method on the same models and pairs, audited against models that never knew.

    python -m benchmarks.leaderboard digits      every method, "seven", five oracles
    python -m benchmarks.leaderboard shapes      every method, everything purple, three oracles
    python -m benchmarks.leaderboard ablation    cliperase and calibrated on digits without each of their terms
    python -m benchmarks.leaderboard ratio       1 to 30 of the hundred shapes, cliperase and calibrated, no oracles
    python -m benchmarks.leaderboard depth       every method on digits, one seed: attacks on the model, and on oracles
    python -m benchmarks.leaderboard personas    six methods, the phone numbers of ten people, three oracles
    python -m benchmarks.leaderboard cifar10 --shards '/data/train-{0..3}.tar' --test-shards /data/test-0.tar
    python -m benchmarks.leaderboard towers --shards ... --test-shards ...    two pretrained towers (benchmarks.towers)
    python -m benchmarks.leaderboard --quick     three minutes: three methods on digits; writes nothing

Everything purple stands for the shapes, as a model that never saw it does not name it; one that never saw "red circle"
infers it from its parts, and what cannot be forgotten tells nothing about methods.

A method has the settings of its recipe (cliperase_fast/recipes/, found by `python -m benchmarks.search`). The control,
`retain_finetune`, has the learning rate and the steps that calibrated found on the same original. Originals, oracles
and scores are those of `benchmarks.unaided`, of which this is the same protocol with all methods.

The result file benchmarks/results/leaderboard-NAME.json is written after every run, and a further call continues with
the runs that are missing, seed by seed. --estimate tells how long they would take, from the runs measured so far.
`python -m benchmarks.write_docs` puts the figures into docs/leaderboard.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cliperase_fast.auditing import audit
from cliperase_fast.auditing.features import keep_features
from cliperase_fast.comparing import PeakMemory, changed_bytes, weights_of
from cliperase_fast.config import recipe_settings
from cliperase_fast.data import open_source
from cliperase_fast.data.shapes import CLASSES
from cliperase_fast.demo import cached_oracles
from cliperase_fast.unlearning.methods import methods

from . import leaderboard_report as report
from . import unaided
from .machine import RESULTS
from .records import add_shards, shards_of
from .unaided import OF_SHARDS, SEEDS, STUDIES, Record, Study
from .unaided_verdicts import CALIBRATED, CONTROL

Settings = Mapping[str, Any]
SIX = (CALIBRATED, "cliperase", "slug", "multidelete", "gradient_difference", CONTROL)
COUNTS = (1, 2, 3, 5, 10, 20, 30)  # of a hundred classes
DEPTH = ("relearn_area", "relearn@10", "probe", "prompt_attack", "membership", "quantised_top1@4")
_ABLATED = {
    "cliperase": {"RM": "lambda_retain", "FM": "lambda_forget", "CM": "lambda_consistency"},
    CALIBRATED: {
        "RM": "lambda_retain", "FM": "lambda_forget", "CM": "lambda_consistency", "anchor": "lambda_anchor",
        "held": "lambda_held", "level": "lambda_level",
    },
}  # fmt: skip
_OPTIONS = ("lambda_anchor", "lambda_held", "lambda_level")  # of calibrated


@dataclass(frozen=True)
class Board:
    """The runs of one command. rows: a name for each, with its settings. seeds: of originals. depth: attack instead of
    auditing against oracles.
    """

    study: Study
    concepts: Sequence[str]
    rows: Mapping[str, Settings]
    seeds: int = SEEDS
    depth: bool = False
    trains: bool = True  # whether an oracle is trained anew, to tell how long it takes


def rows(names: Sequence[str]) -> dict[str, Settings]:
    """The settings of methods by name. The control gets its own when it runs. `calibrated` comes first."""
    ordered = sorted(names, key=lambda name: name != CALIBRATED)
    return {name: recipe_settings(name) for name in ordered}


def ablated() -> dict[str, Settings]:
    """The recipes of cliperase and calibrated, whole and without each of their terms."""
    found: dict[str, Settings] = {}
    for method, terms in _ABLATED.items():
        recipe = recipe_settings(method)
        found[method] = recipe
        for term, weight in terms.items():
            off = (
                {"method_options": {**recipe.get("method_options", {}), weight: 0.0}}
                if weight in _OPTIONS
                else {weight: 0.0}
            )
            found[f"{method} without {term}"] = {**recipe, **off}
    return found


def of(name: str, concept: str, names: Sequence[str] | None = None, **more: Any) -> Callable[..., Board]:
    """A board of one concept of a study of `benchmarks.unaided`. names: of methods, all if None."""

    def make(*shards: str) -> Board:
        study = (STUDIES[name] if name in STUDIES else OF_SHARDS[name])(*shards)
        return Board(study, [concept], rows(list(methods()) if names is None else names), **more)

    return make


def ratio() -> Board:
    """Growing parts of the classes of the shapes, each of which holds the smaller ones."""
    order = [CLASSES[index] for index in np.random.default_rng(0).permutation(len(CLASSES))]
    concepts = {f"{count}": "class:" + ",".join(order[:count]) for count in COUNTS}
    study = replace(unaided.small("shapes", concepts, {}), oracles=lambda _: [])
    return Board(study, list(concepts), rows((CALIBRATED, "cliperase")), seeds=1, trains=False)


BOARDS: Mapping[str, Callable[..., Board]] = {
    "digits": of("digits", "seven"),
    "shapes": of("shapes", "purple"),
    "ablation": lambda: Board(STUDIES["digits"](), ["seven"], ablated(), trains=False),
    "ratio": ratio,
    "depth": of("digits", "seven", seeds=1, depth=True, trains=False),
    "personas": of("personas", "phones", SIX),
    "cifar10": of("cifar10", "airplane", SIX, trains=False),
    "towers": of("towers", "airplane", SIX, seeds=1, trains=False),
}


class Leaderboard(Record):
    """The result file of a board. oracle: how long training one takes, if that was measured."""

    kind = "leaderboard"

    def __init__(self, name: str, board: Board) -> None:
        command = f"python -m benchmarks.leaderboard {name}"
        order = [*(ORACLES if board.depth else ()), *board.rows]
        super().__init__(name, command, board.concepts, order)
        self.seeds = board.seeds
        self.oracle: dict[str, float] | None = None
        if self.path.exists():
            self.oracle = json.loads(self.path.read_text(encoding="utf-8")).get("oracle")

    def extra(self) -> dict[str, Any]:
        missing = {
            f"{concept}, seed {seed}": rows
            for concept in self.order
            for seed in range(self.seeds)
            if (rows := [row for row in self.methods if self.find(concept, seed, row) is None])
        }
        return {"oracle": self.oracle, "missing": missing}


ORACLES = tuple(f"oracle {number}" for number in range(1, 6))  # of the digits, which are attacked too


class Bench(unaided._Bench):
    """The runs of one concept on one original."""

    line = staticmethod(report.run_line)

    def __init__(self, board: Board, record: Leaderboard, concept: str, seed: int) -> None:
        super().__init__(board.study, record, concept, seed, None)
        self.board = board

    def settings(self, method: str) -> dict[str, Any]:
        return self.control() if method == CONTROL else dict(self.board.rows[method])

    def call(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        weights, memory = weights_of(self.before.module), PeakMemory()
        result, took = super().call(settings)
        peak = memory.mib()
        return result, {**took, "peak_mib": peak, "changed_mib": changed_bytes(weights, result.model) / 2**20}

    def measured(self, method: str) -> dict[str, Any]:
        if method in ORACLES:
            began = time.perf_counter()
            found = self._attacked(self.oracles[ORACLES.index(method)])
            return {"seconds": 0.0, "cpu_seconds": 0.0, "audit_seconds": time.perf_counter() - began, **found}
        return super().measured(method)

    def audit(self, result: Any) -> dict[str, Any]:
        if self.board.depth:
            return self._attacked(result.adapter)
        found = audit(
            self.before, result.adapter, self.forget, "rest", oracle=self.oracles or None, test=self.study.test
        ).to_dict()
        return {**unaided.scores(found), "background": found["background"], **_pairs(found)}

    def _attacked(self, model: Any) -> dict[str, Any]:
        """Attack a model and the original."""
        found = audit(self.before, model, self.forget, "rest", test=self.study.test, depth=True).to_dict()
        depths = {who: found["scores"][who]["depth"] for who in ("before", "after")}
        kept = {who: {name: its[name] for name in DEPTH if name in its} for who, its in depths.items()}
        return {"depth": kept, **_pairs(found)}


def _pairs(found: Mapping[str, Any]) -> dict[str, Any]:
    """How many pairs an audit rests on."""
    return {"pairs": {part: found["data"][f"{part}_test_pairs"] for part in ("forget", "retain")}}


def run_board(board: Board, record: Leaderboard, *, only: Sequence[str] = (), retry: bool = False) -> None:
    """Do the runs that the record lacks, seed by seed. only: these rows. retry: also those that failed."""
    if board.trains and record.oracle is None:
        record.oracle = oracle_cost(board)
    for seed in range(board.seeds):
        for concept in board.concepts:
            missing = missing_runs(board, record, concept, seed, only, retry)
            if missing:
                with keep_features():
                    Bench(board, record, concept, seed).run(missing)


def missing_runs(
    board: Board, record: Leaderboard, concept: str, seed: int, only: Sequence[str] = (), retry: bool = False
) -> list[str]:
    """The rows of a seed that the record lacks, in their order."""
    known = {row: record.find(concept, seed, row) for row in record.methods if not only or row in only}
    return [row for row, run in known.items() if run is None or (retry and "error" in run)]


def oracle_cost(board: Board) -> dict[str, float]:
    """Train an oracle anew. Returns the seconds on the clock and on the processor."""
    with tempfile.TemporaryDirectory() as folder:
        open_source(board.study.source)
        clock, processor = time.perf_counter(), time.process_time()
        cached_oracles(board.study.source, board.study.concepts[board.concepts[0]], 1, cache_dir=folder)
        return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}


def estimate(board: Board, record: Leaderboard, only: Sequence[str] = ()) -> str:
    """How long the missing runs would take on a free core, by the runs of the same rows, else by all runs there are."""
    costs: dict[str, list[float]] = {}
    for run in (run for run in record.runs if "error" not in run):
        busy = run["cpu_seconds"] / run["seconds"] if run["seconds"] else 1.0  # the audit's clock ran on a shared core
        costs.setdefault(run["method"], []).append(run["cpu_seconds"] + busy * run["audit_seconds"])
    everything = [cost for found in costs.values() for cost in found]
    missing = [
        row for seed in range(board.seeds) for concept in board.concepts
        for row in missing_runs(board, record, concept, seed, only)
    ]  # fmt: skip
    if not everything:
        return f"{record.name}: {len(missing)} runs are missing, none is measured"
    seconds = sum(float(np.mean(costs.get(row, everything))) for row in missing)
    return f"{record.name}: {len(missing)} runs are missing, about {seconds / 60:.0f} minutes of one core"


def quick() -> str:
    """Three methods on one original of the digits, in memory. Returns the table."""
    study = unaided.small("demo", {"seven": "class:seven"}, {}, oracles=2)
    board = Board(study, ["seven"], rows((CALIBRATED, "slug", "text_projection")), seeds=1, trains=False)
    with tempfile.TemporaryDirectory() as folder:
        record = Leaderboard("quick", board)
        record.path = Path(folder) / "quick.json"
        record.runs = []
        run_board(board, record)
        return report.text("quick", record.content())


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=tuple(BOARDS))
    add_shards(parser, *OF_SHARDS)
    parser.add_argument("--only", metavar="ROWS", default="", help="only these methods, with commas")
    parser.add_argument("--seeds", type=int, help="how many originals")
    parser.add_argument("--retry", action="store_true", help="repeat the runs that failed")
    parser.add_argument("--estimate", action="store_true", help="only tell how long the missing runs would take")
    parser.add_argument("--quick", action="store_true", help="three minutes, without a result file")
    arguments = parser.parse_args(words)
    if arguments.quick:
        print(quick())
        return
    if arguments.name is None:
        parser.error("say which board, or --quick")
    name = arguments.name
    board = BOARDS[name](*(shards_of(parser, arguments) if name in OF_SHARDS else ()))
    if arguments.seeds is not None:
        if arguments.seeds < 1:
            parser.error(f"--seeds {arguments.seeds} must be at least 1")
        board = replace(board, seeds=arguments.seeds)
    only = [row.strip() for row in arguments.only.split(",") if row.strip()]
    record = Leaderboard(name, board)
    unknown = [row for row in only if row not in record.methods]
    if unknown:
        parser.error(f"--only {unknown[0]!r} is not one of {', '.join(record.methods)}")
    print(estimate(board, record, only), flush=True)
    if arguments.estimate:
        return
    run_board(board, record, only=only, retry=arguments.retry)
    print(report.text(name, record.content()))
    print(f"leaderboard {name}: {len(record.runs)} runs; written to {RESULTS / record.path.name}")


if __name__ == "__main__":
    main()
