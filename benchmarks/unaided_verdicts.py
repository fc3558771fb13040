"""What the runs of `benchmarks.unaided` must show, and whether they do: arithmetic over its records.

A run is {"concept", "seed", "method", ...} with "error" if it failed, else with "recipe", "scores", "gap", "floor" and
"seconds", see `benchmarks.unaided`. A verdict is {"holds", "text", ...}: holds is None where it cannot be told yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

CALIBRATED = "calibrated"  # without any setting
GIVEN = "calibrated, numbers given"  # with the learning rate and the steps that it found; only timed
FIXED = "cliperase, version 0.1"  # with the numbers of version 0.1's demo
SEARCHED = "cliperase"  # without any setting
CONTROL = "retain_finetune"  # with the learning rate and the steps that `calibrated` found
UNRELATED = "calibrated, levels unrelated"  # with that option alone, where the default has other levels
SIMILAR = "calibrated, levels similar"  # with that option alone, where the default has not
BFLOAT16 = "calibrated, bfloat16"  # with that precision alone, on the towers
METHODS = (CALIBRATED, GIVEN, FIXED, SEARCHED, CONTROL)
EXTRA = (UNRELATED, SIMILAR, BFLOAT16)  # only on some data
AUDITED = (CALIBRATED, *EXTRA, FIXED, SEARCHED, CONTROL)

SEARCH = "text_to_image_r@1"
GAP = ("association", "image_side", "text_side", "retain_top1")  # the scores of the mean gap
QUARTERED = ("digits", "shapes", "cifar10")  # data whose gap must be at most a quarter of version 0.1's
FORGOTTEN, RUNS = 0.05, 0.95  # largest forget top-1, and the share of runs that must keep to it
RETAIN_DROP, CLASS_DROP = 0.02, 0.1
IDENTITY = 0.05
RATIO = 2.0
POINT = 0.01  # by which bfloat16 may change a score

Run = Mapping[str, Any]
Runs = Sequence[Run]
Verdict = dict[str, Any]


def verdicts(name: str, runs: Runs) -> dict[str, Verdict]:
    """The verdicts on one data set. name: of the data set, as `benchmarks.unaided` has it."""
    found = {"forgets": _forgets(runs), "retain": _retain(runs)}
    found["worst class"] = _worst_class_halved(runs) if name == "towers" else _worst_class(runs)
    if name in QUARTERED:
        found["gap"] = _quartered(runs)
    if name == "personas":
        found["identity"] = _identity(runs)
    found["not better with the recipe"] = _not_better(runs)
    found["time"] = _time(runs)
    found["wins"] = _wins(runs)
    if done(runs, UNRELATED):
        found["gap, levels unrelated"] = (
            _quartered(runs, UNRELATED) if name in QUARTERED else _beside_levels(runs, UNRELATED, "larger")
        )
    if done(runs, SIMILAR):
        found["gap, levels similar"] = _beside_levels(runs, SIMILAR, "smaller")
    if done(runs, BFLOAT16):
        found["bfloat16"] = _same_in_bfloat16(runs)
    if any(SEARCH in run["scores"]["after"] for run in done(runs, CALIBRATED)):
        found["search"] = _search(runs)
    return found


def _beside_the_default(runs: Runs, method: str) -> tuple[list[Run], list[Run]]:
    """The runs of a method, and those of `calibrated` on the same originals."""
    default = {(run["concept"], run["seed"]): run for run in done(runs, CALIBRATED)}
    own = [run for run in done(runs, method) if (run["concept"], run["seed"]) in default]
    return own, [default[run["concept"], run["seed"]] for run in own]


def _beside_levels(runs: Runs, method: str, wanted: str) -> Verdict:
    """Whether the runs with other levels than the default have the larger or the smaller gap."""
    own, default = _beside_the_default(runs, method)
    ours, theirs = (float(np.mean([gap_of(run) for run in found])) for found in (own, default))
    below, before = (
        float(np.mean([run["scores"]["oracle"]["association"] - after(run, "association") for run in found]))
        for found in (own, default)
    )
    return _verdict(
        ours < theirs if wanted == "smaller" else ours > theirs,
        f"the mean gap is {ours:.3f} in {_runs(own)}, with the default {theirs:.3f} on the same originals (wanted: "
        f"{wanted}); the association ends {_beside(below)} the oracles', with the default {_beside(before)} it, "
        f"in {_processor_times(own, default):.2f} times its processor time",
        gap=ours,
        of_default=theirs,
    )


def _processor_times(runs: Runs, default: Runs) -> float:
    return float(sum(run["cpu_seconds"] for run in runs) / sum(run["cpu_seconds"] for run in default))


def _beside(below: float) -> str:
    return f"{abs(below):.2f} {'above' if below < 0 else 'below'}"


def _runs(runs: Runs) -> str:
    return f"{len(runs)} run" + "s" * (len(runs) != 1)


def _same_in_bfloat16(runs: Runs) -> Verdict:
    """Whether forget and retain top-1 are those of float32 on the same originals, on average."""
    half, same = _beside_the_default(runs, BFLOAT16)
    forget, retain = (
        100
        * float(np.mean([after(ours, score) - after(theirs, score) for ours, theirs in zip(half, same, strict=True)]))
        for score in ("zero_shot_top1", "retain_top1")
    )
    return _verdict(
        max(abs(forget), abs(retain)) <= 100 * POINT,
        f"in {_runs(half)} forget top-1 changes by {forget:+.1f} points and retain top-1 by {retain:+.1f}, with "
        f"{_processor_times(half, same):.2f} times the processor time of float32 (wanted: at most a point)",
    )


def overall(records: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Verdict:
    """Whether `calibrated` wins on all data sets. records: those there are, by name. names: those there should be."""
    wins = {name: record["verdicts"]["wins"]["holds"] for name, record in records.items()}
    lost = [name for name, holds in wins.items() if holds is False]
    open_ = [name for name in names if wins.get(name) is None]
    if lost:
        return _verdict(False, f"calibrated does not win on {', '.join(lost)}")
    if open_:
        return _verdict(None, f"not known yet for {', '.join(open_)}")
    return _verdict(True, f"calibrated wins on {', '.join(wins)}")


def done(runs: Runs, method: str) -> list[Run]:
    """The runs of a method that did not fail."""
    return [run for run in runs if run["method"] == method and "error" not in run]


def failed(runs: Runs) -> list[Run]:
    return [run for run in runs if "error" in run]


def after(run: Run, score: str) -> float:
    return run["scores"]["after"][score]["value"]


def retain_drop(run: Run) -> float:
    return run["scores"]["before"]["retain_top1"] - after(run, "retain_top1")


def mean_of(runs: Runs, method: str, value: Callable[[Run], float]) -> float | None:
    """The mean of a value over a method's runs, None without any."""
    found = [value(run) for run in done(runs, method)]
    return float(np.mean(found)) if found else None


def gap_of(run: Run) -> float:
    return run["gap"]["mean"]


def gaps_by_seed(runs: Runs, method: str) -> dict[int, float]:
    """The mean gap of each seed over the concepts."""
    by_seed: dict[int, list[float]] = {}
    for run in done(runs, method):
        by_seed.setdefault(run["seed"], []).append(gap_of(run))
    return {seed: float(np.mean(gaps)) for seed, gaps in sorted(by_seed.items())}


def time_ratios(runs: Runs, chosen: bool = False, of: str = "seconds") -> list[float]:
    """Time without any number over the time with the rate and the steps given, for each concept and seed.

    chosen: with the steps up to the checkpoint that was kept, not with those that were trained. of: "seconds" on the
    clock, or "cpu_seconds".
    """
    searched = {(run["concept"], run["seed"]): run[of] for run in done(runs, CALIBRATED)}
    return [
        searched[place] / (run["chosen"] if chosen else run)[of]
        for run in done(runs, GIVEN)
        if (place := (run["concept"], run["seed"])) in searched
    ]


def _verdict(holds: bool | None, text: str, **numbers: Any) -> Verdict:
    return {"holds": holds, "text": text, **numbers}


_UNKNOWN = "not measured yet"


def _forgets(runs: Runs) -> Verdict:
    tried = [run for run in runs if run["method"] == CALIBRATED]
    if not tried:
        return _verdict(None, _UNKNOWN)
    good = sum("error" not in run and after(run, "zero_shot_top1") <= FORGOTTEN for run in tried)
    return _verdict(
        good >= RUNS * len(tried),
        f"forget top-1 is at most {FORGOTTEN:.0%} in {good} of {len(tried)} runs (wanted: {RUNS:.0%} of them)",
        good=good,
        runs=len(tried),
    )


def _retain(runs: Runs) -> Verdict:
    drop = mean_of(runs, CALIBRATED, retain_drop)
    if drop is None:
        return _verdict(None, _UNKNOWN)
    return _verdict(
        drop <= RETAIN_DROP,
        f"retain top-1 falls by {_points(drop)} on average (wanted: at most {_points(RETAIN_DROP)})",
        drop=drop,
    )


def _worst_class(runs: Runs) -> Verdict:
    lower = {
        method: [run["scores"]["after"]["worst_class_drop"]["low"] for run in done(runs, method)]
        for method in (CALIBRATED, CONTROL)
    }
    if not lower[CALIBRATED]:
        return _verdict(None, _UNKNOWN)
    good = sum(low <= CLASS_DROP for low in lower[CALIBRATED])
    worst = {method: max(values) for method, values in lower.items() if values}
    beside = f"; the largest bound with {CONTROL} is {_points(worst[CONTROL])}" if CONTROL in worst else ""
    return _verdict(
        good == len(lower[CALIBRATED]),
        f"the lower 95 % bound of the worst class's drop is at most {_points(CLASS_DROP)} in {good} of "
        f"{len(lower[CALIBRATED])} runs, and {_points(worst[CALIBRATED])} in the worst (wanted: all runs){beside}",
        largest=worst[CALIBRATED],
        of_control=worst.get(CONTROL),
    )


def _worst_class_halved(runs: Runs) -> Verdict:
    ours, theirs = (mean_of(runs, method, lambda run: after(run, "worst_class_drop")) for method in (CALIBRATED, FIXED))
    if ours is None or theirs is None:
        return _verdict(None, _UNKNOWN)
    return _verdict(
        ours <= theirs / 2,
        f"the worst class falls by {_points(ours)} on average, with {FIXED} by {_points(theirs)} (wanted: at "
        "most half)",
        drop=ours,
        of_version=theirs,
    )


def _quartered(runs: Runs, own: str = CALIBRATED) -> Verdict:
    ours, theirs = (mean_of(runs, method, gap_of) for method in (own, FIXED))
    if ours is None or theirs is None:
        return _verdict(None, _UNKNOWN)
    share = "" if theirs == 0 else f", {ours / theirs:.0%} of it"
    holds = ours <= theirs / 4
    return _verdict(
        holds,
        f"the mean gap is {ours:.3f}, with {FIXED} {theirs:.3f}{share} (wanted: at most a quarter)"
        + ("" if holds else _below_oracles(runs, own)),
        gap=ours,
        of_version=theirs,
    )


def _below_oracles(runs: Runs, own: str) -> str:
    """What the association adds to the gap of a method that stops below the oracles."""
    below = mean_of(runs, own, lambda run: run["scores"]["oracle"]["association"] - after(run, "association"))
    if below is None or below <= 0:
        return ""
    return f"; {below / len(GAP):.3f} of it come from the association alone, which stops {below:.2f} below the oracles"


def _search(runs: Runs) -> Verdict:
    """How often the caption of a forgotten class finds one of its images first, among all test images."""
    found = {
        method: [run["scores"]["after"][SEARCH]["value"] for run in done(runs, method)]
        for method in (CALIBRATED, UNRELATED)
    }
    oracles, before = (
        float(np.mean([run["scores"][model][SEARCH] for run in done(runs, CALIBRATED)]))
        for model in ("oracle", "before")
    )
    ours = float(np.mean(found[CALIBRATED]))
    other = f", with levels unrelated in {np.mean(found[UNRELATED]):.0%}" if found[UNRELATED] else ""
    return _verdict(
        ours <= oracles,
        f"the caption of a forgotten class finds one of its images first in {ours:.0%} of the cases, before in "
        f"{before:.0%}{other} (wanted: at most the oracles' {oracles:.0%})",
        found=ours,
        of_oracles=oracles,
    )


def _not_better(runs: Runs) -> Verdict:
    ours, theirs = (mean_of(runs, method, gap_of) for method in (CALIBRATED, SEARCHED))
    if ours is None or theirs is None:
        return _verdict(None, _UNKNOWN)
    return _verdict(
        ours <= theirs,
        f"the mean gap of cliperase with the automatic recipe is {theirs:.3f}, that of {CALIBRATED} {ours:.3f} "
        "(wanted: not larger)",
        gap=ours,
        of_searched=theirs,
    )


def _identity(runs: Runs) -> Verdict:
    """How far the facts that were not forgotten are from the oracles; the originals are at a distance too."""
    own = done(runs, CALIBRATED)
    scores = ("intra_identity", "inter_identity")
    if not own or not all(score in run["scores"]["after"] for run in own for score in scores):
        return _verdict(None, _UNKNOWN)
    means, told, largest = {}, [], 0.0
    for score in scores:
        oracles = [run["scores"]["oracle"][score] for run in own]
        far = [after(run, score) - oracle for run, oracle in zip(own, oracles, strict=True)]
        originals = [run["scores"]["before"][score] - oracle for run, oracle in zip(own, oracles, strict=True)]
        means[score] = float(np.mean(far))
        largest = max(largest, *map(abs, far))
        worst = int(np.argmax(np.abs(far)))
        told.append(
            f"{score} {means[score]:+.3f} on average (the originals {np.mean(originals):+.3f}), {far[worst]:+.3f} in "
            f"the farthest run (its original {originals[worst]:+.3f})"
        )
    return _verdict(
        all(abs(mean) <= IDENTITY for mean in means.values()),
        f"from the oracles' mean: {'; '.join(told)} (wanted: within {IDENTITY:g} on average)",
        **means,
        largest=largest,
    )


def _time(runs: Runs) -> Verdict:
    ratios, to_choice = time_ratios(runs), time_ratios(runs, chosen=True)
    if not ratios:
        return _verdict(None, _UNKNOWN)
    mean, processor = float(np.mean(ratios)), float(np.mean(time_ratios(runs, of="cpu_seconds")))
    return _verdict(
        mean <= RATIO,
        f"a call takes {mean:.2f} times as long as with the rate and the steps given ({processor:.2f} times the "
        f"processor time), {max(ratios):.2f} times at most, and {np.mean(to_choice):.2f} times as long as with the "
        f"steps up to the checkpoint that it keeps (wanted: at most {RATIO:g} times on average)",
        ratio=mean,
        largest=max(ratios),
        of_processor=processor,
        to_choice=float(np.mean(to_choice)),
    )


def _wins(runs: Runs) -> Verdict:
    """Whether it forgets with a mean gap that is smaller than cliperase's beyond the spread of the seeds, paired.

    A model that forgets nothing is near the oracles where these infer the concept from what they saw.
    """
    if any(run["method"] == CALIBRATED for run in failed(runs)):
        return _verdict(False, f"a run of {CALIBRATED} failed")
    if _forgets(runs)["holds"] is False:
        return _verdict(False, "too many runs do not forget, which no gap makes up for")
    ours = gaps_by_seed(runs, CALIBRATED)
    parts, holds = [], []
    for method in (FIXED, SEARCHED):
        theirs = gaps_by_seed(runs, method)
        differences = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
        if len(differences) < 2:
            return _verdict(None, "needs two seeds at least")
        mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
        holds.append(mean > spread)
        parts.append(f"by {mean:.3f} than with {method}, where the seeds spread by {spread:.3f}")
    return _verdict(all(holds), f"the mean gap is smaller {', and '.join(parts)}")


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
