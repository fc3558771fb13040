"""Compare the speed and memory of `unlearn()` with those of a straightforward loop.

    cliperase-fast bench train --quick                      the demo model alone, under a minute on two cores
    cliperase-fast bench train                              a small ViT and ViT-B-32 too; some minutes on two cores
    cliperase-fast bench train --settings vit-b-32 --rounds 2 --json mine.json
    cliperase-fast bench train --from mine.json             measure nothing; show a record
    cliperase-fast bench train --compare before.json after.json

Both loops train the same model on the same batches in the same order, with the losses RM + 3 FM + 3 CM and Adam. The
straightforward loop is written as a re-implementation of the paper would be (benchmarks/train_loops.py): two models in
memory; forget, retain and teacher encoded separately; every caption padded and encoded for each pair; materialised
logits. Each run has a separate process, and the two kinds take turns.

pairs/s: pairs of a batch divided by the seconds of a training step, including the wait for the batch; median and
quartiles over the steps of all runs, without the first step of each. Whole run: the seconds from the model's name to
the final scores, including evaluation and, for unlearn(), the teacher's cache and all files. Memory: the peak of the
process (VmHWM), and the part beyond Python, torch and the data. Phases: mean milliseconds of a step. The final scores
must be equal, and the losses of the steps must agree up to rounding: the last lines show the differences.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .compare import comparison
from .loss_report import text
from .machine import describe, own_folder, run_module
from .options import circumstances
from .records import Table
from .train_loops import PHASES, SETTINGS, WHO

LOSS_TOLERANCE = 1e-3  # between the two loops, of a step's total loss
SCORE_TOLERANCE = 0.02  # of an accuracy


def runs_of(record: dict[str, Any], name: str, who: str) -> list[dict[str, Any]]:
    return [run for run in record["runs"] if run["setting"] == name and run["who"] == who]


def rates(runs: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Pairs a second: lower quartile, median, upper quartile over all steps."""
    values = [run["pairs"] / seconds for run in runs for seconds in run["step_seconds"]]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def whole(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def peak(runs: Sequence[dict[str, Any]]) -> float:
    """The most bytes of a run, median over runs."""
    return statistics.median(run["peak_bytes"] for run in runs)


def extra(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.median(run["peak_bytes"] - run["held_bytes"] for run in runs)


def speed_table(record: dict[str, Any], name: str) -> Table:
    """A row for each loop and one for what the second gains."""
    both = [runs_of(record, name, who) for who in WHO]
    rows = []
    for who, runs in zip(WHO, both, strict=True):
        low, middle, high = rates(runs)
        cells = f"{middle:.1f} ({low:.1f} to {high:.1f})", f"{whole(runs):.1f} s"
        rows.append((who, *cells, f"{peak(runs) / 2**20:.0f} MiB", f"{extra(runs) / 2**20:.0f} MiB"))
    slow, fast = both
    rows.append(
        (
            "unlearn / straightforward",
            f"{rates(fast)[1] / rates(slow)[1]:.2f} x",
            f"{whole(fast) / whole(slow):.0%}",
            f"{peak(fast) / peak(slow):.0%}",
            f"{extra(fast) / extra(slow):.0%}",
        )
    )
    return ("loop", "pairs/s (quartiles)", "whole run", "most memory", "of it model and training"), rows


def phase_table(record: dict[str, Any], name: str) -> Table:
    """Mean milliseconds of a step by phase."""
    runs = [runs_of(record, name, who) for who in WHO]
    means = [{phase: statistics.fmean(run["phases"][phase] for run in of) for phase in PHASES} for of in runs]
    rows = [(phase, *(f"{1e3 * mean[phase]:.1f} ms" for mean in means)) for phase in PHASES]
    return ("", *WHO), [*rows, ("a step", *(f"{1e3 * sum(mean.values()):.1f} ms" for mean in means))]


def agreement(record: dict[str, Any], name: str) -> tuple[float, float]:
    """Largest difference of a step's loss and of an accuracy after, between the loops."""
    slow, fast = (runs_of(record, name, who)[0] for who in WHO)
    losses = max(abs(a - b) for a, b in zip(slow["losses"], fast["losses"], strict=True))
    scores = max(abs(slow["scores"]["after"][part] - fast["scores"]["after"][part]) for part in ("forget", "retain"))
    return losses, scores


def agreement_text(record: dict[str, Any], name: str) -> str:
    losses, _ = agreement(record, name)
    after = "; ".join(
        f"{who}: forget {100 * run['scores']['after']['forget']:.1f} %, retain "
        f"{100 * run['scores']['after']['retain']:.1f} %"
        for who, run in ((who, runs_of(record, name, who)[0]) for who in WHO)
    )
    return f"Scores after ({after}). Largest difference of a step's loss: {losses:.1e}."


def full_text(record: dict[str, Any]) -> str:
    parts = []
    for name in record["settings"]:
        parts += [record["titles"][name], text(speed_table(record, name)), text(phase_table(record, name))]
        parts.append(agreement_text(record, name))
    return "\n\n".join(parts)


def faults(record: dict[str, Any]) -> list[str]:
    """Where the two loops did not end alike, so that their speeds must not be compared."""
    found = []
    for name in record["settings"]:
        losses, scores = agreement(record, name)
        if not losses <= LOSS_TOLERANCE:
            found.append(f"{name}: the losses differ by {losses:.1e}, more than {LOSS_TOLERANCE:g}")
        if not scores <= SCORE_TOLERANCE:
            found.append(f"{name}: the scores differ by {scores:.1%}, more than {SCORE_TOLERANCE:.0%}")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="cliperase-fast bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--settings", type=lambda words: words.split(","), default=list(SETTINGS),
                   help=f"some of {','.join(SETTINGS)} (all)")  # fmt: skip
    p.add_argument("--rounds", type=int, help="runs of each loop")
    p.add_argument("--quick", action="store_true", help="the demo model, less trained, and a short run of each loop")
    p.add_argument("--json", type=Path, metavar="PATH", help="where the record goes (runs/bench/train-cpu.json)")
    p.add_argument("--from", type=Path, dest="source", metavar="JSON", help="measure nothing; show a record")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what changed from A to B")
    return p


def measure(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    names = ["demo"] if arguments.quick and arguments.settings == list(SETTINGS) else arguments.settings
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise SystemExit(f"--settings: {unknown[0]!r} is not one of {', '.join(SETTINGS)}")
    record: dict[str, Any] = {"benchmark": "train", "command": command, **describe(), "settings": names}
    record |= {"titles": {name: SETTINGS[name].title for name in names}, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            SETTINGS[name].model(Path(folder), arguments.quick)  # made once, before anything is timed
            for number in range(arguments.rounds or (1 if arguments.quick else SETTINGS[name].rounds)):
                for who in WHO if number % 2 == 0 else WHO[::-1]:
                    words = (name, who, folder, "quick" if arguments.quick else "full")
                    run = json.loads(run_module("train_loops", *words).splitlines()[-1])
                    record["runs"].append({"setting": name, **run})
                    _, middle, _ = rates([run])
                    print(f"{name}, {who}: {middle:.1f} pairs/s, {run['seconds']:.1f} s", file=sys.stderr, flush=True)
    return record


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    arguments = parser().parse_args(words)
    if arguments.compare:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.compare)
        print(text(comparison(before, after)))
        return 0
    if arguments.source is not None:
        record = json.loads(arguments.source.read_text(encoding="utf-8"))
    else:
        if sys.platform != "linux":
            raise SystemExit("memory is read from /proc, so this needs Linux")
        path = arguments.json or own_folder() / "train-cpu.json"
        began = time.perf_counter()
        print(f"train: the record goes to {path}; a line for each run", file=sys.stderr, flush=True)
        record = measure(arguments, shlex.join(["cliperase-fast", "bench", "train", *words]))
        os.makedirs(path.parent, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"train: done in {time.perf_counter() - began:.0f} s; written to {path}", file=sys.stderr)
    print(f"{full_text(record)}\n\n{circumstances(record)}")
    for fault in faults(record):
        print(f"NOT COMPARABLE: {fault}")
    return int(bool(faults(record)))


if __name__ == "__main__":
    sys.exit(main())
