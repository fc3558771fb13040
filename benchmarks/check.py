"""Check the speed of the losses, on a few cases, against the committed ratios (`make bench-check`).

    python -m benchmarks.check              about half a minute on two cores; exit status 1 when something fell
    python -m benchmarks.check --write      measure and make these the committed ratios

A ratio is the time of open_clip's losses divided by ours, measured in turns. The check fails if the best of several
tries is more than 15 % below the committed ratio, so that a busy moment of the machine does not cause a failure. Ratios
also depend on the processor: the report says if it is another one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .batches import Case
from .loss_report import milliseconds, text
from .machine import RESULTS, describe
from .providers import every_provider
from .runner import Runner, Settings

COMMITTED = RESULTS / "bench-check.json"
FALL = 0.15  # part of the committed ratio
BASELINE = "open_clip"
CASES = (
    (Case("cliperase", "peaked", "float32", 512, 128), "ours-auto"),
    (Case("cliperase", "peaked", "float32", 2048, 64), "ours-auto"),
    (Case("cliperase", "peaked", "float32", 2048, 256), "ours-auto"),
    (Case("cliperase", "random", "float32", 2048, 128), "ours-native-keep-nothing"),
    (Case("cliperase", "peaked", "float32", 1024, 128), "ours-torch"),
    (Case("clip", "peaked", "float32", 2048, 256), "ours-auto"),
    (Case("siglip", "peaked", "float32", 2048, 128), "ours-auto"),
    (Case("cliperase", "peaked", "bfloat16", 512, 64), "ours-auto"),
)


def title(case: Case, name: str) -> str:
    return f"{name}: {case}"


def ratio_of(case: Case, name: str, settings: Settings) -> tuple[float | None, str]:
    """(time of the baseline over the provider's, "") or (None, why there is none)."""
    runner = Runner(settings, every_provider())
    runner.run(case, (name, BASELINE))
    rows = {row["provider"]: row for row in runner.rows}
    own, baseline = milliseconds(rows[name]), milliseconds(rows[BASELINE])
    if own is None or baseline is None:
        row = rows[name if own is None else BASELINE]
        return None, f"{row['provider']}: {row['status']}, {row['reason']}"
    return baseline / own, ""


def checked(committed: dict[str, float], settings: Settings, tries: int) -> list[tuple[str, float, float | None, str]]:
    """(title, committed ratio, best ratio, what is wrong with it) of each case; whoever falls short is tried again."""
    lines: list[tuple[str, float, float | None, str]] = []
    for case, name in CASES:
        key = title(case, name)
        if key not in committed:
            lines.append((key, float("nan"), None, "not committed: python -m benchmarks.check --write"))
            continue
        least, reason = committed[key] * (1 - FALL), ""
        best: float | None = None
        for number in range(tries):
            if number:
                time.sleep(min(2.0**number, 8.0))  # whatever else the machine does may be over
            ratio, reason = ratio_of(case, name, settings)
            if ratio is None:
                break
            best = max(best or 0.0, ratio)
            if best >= least:
                break
        if reason == "" and best is not None and best < least:
            reason = f"FELL by {1 - best / committed[key]:.0%}, in the best of {tries} tries; {FALL:.0%} is allowed"
        lines.append((key, committed[key], best, reason))
    return lines


def main(words: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true", help="measure, and write benchmarks/results/bench-check.json")
    p.add_argument(
        "--against", type=Path, default=COMMITTED, metavar="JSON", help="ratios to hold against, or to write"
    )
    p.add_argument("--seconds", type=float, default=1.0, help="for each provider of a case (1)")
    p.add_argument(
        "--tries", type=int, default=4, help="before a ratio counts as fallen; --write: to take the median of"
    )
    arguments = p.parse_args(words)
    settings = Settings("cpu", arguments.seconds, None, 30.0, None, False, torch.get_num_threads(), quiet=True)
    if arguments.write:
        return _write(arguments.against, settings, arguments.tries)
    print(
        "bench-check: half a minute on two cores, more where something has to be tried again",
        file=sys.stderr,
        flush=True,
    )
    record = json.loads(arguments.against.read_text(encoding="utf-8"))
    lines = checked({run["name"]: run["ratio"] for run in record["runs"]}, settings, arguments.tries)
    shown = [
        (key, f"{then:.2f}x", "" if now is None else f"{now:.2f}x", reason or "ok") for key, then, now, reason in lines
    ]
    print(text((("times as fast as open_clip", "committed", "now", ""), shown)))
    committed, here = (
        f"{machine['processor']}, {machine['cores']} cores" for machine in (record["machine"], describe()["machine"])
    )
    if committed != here:
        print(f"\nThe committed ratios are of {committed}; this is {here}, whose ratios may differ by themselves.")
    fallen = [key for key, _, _, reason in lines if reason]
    if fallen:
        print(
            f"\nbench-check: {len(fallen)} of {len(lines)} slower than at commit {record['commit']}:",
            *fallen,
            sep="\n  ",
        )
    return int(bool(fallen))


def _write(path: Path, settings: Settings, tries: int) -> int:
    runs: list[dict[str, Any]] = []
    for case, name in CASES:
        found = [ratio_of(case, name, settings) for _ in range(tries)]
        ratios = [ratio for ratio, _ in found if ratio is not None]
        if len(ratios) < tries:
            print(f"nothing written: {next(reason for _, reason in found if reason)}", file=sys.stderr)
            return 1
        runs.append({"name": title(case, name), "ratio": statistics.median(ratios), "ratios": ratios})
        print(f"{runs[-1]['name']}: {runs[-1]['ratio']:.2f}x", file=sys.stderr)
    record = {"benchmark": "check", "command": "python -m benchmarks.check --write", **describe(), "runs": runs}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
