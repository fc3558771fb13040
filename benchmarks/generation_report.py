"""The figures of benchmarks/results/generation.json for docs/text-to-image.md, and its picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTROL, IMAGE, PROJECTION = "retain_finetune", "calibrated, image tower", "text_projection"
HELD = "calibrated, hidden states held"
HELD_RELATED = f"{HELD}, levels related"
UNSEEN = {IMAGE: "the image tower unlearned", PROJECTION: "the text projection edited"}  # by a pipeline
FORGET = "forget"
NOT_MEASURED = "Not measured yet: `python -m benchmarks.generation`."
_SEED = 1  # of the unlearning whose pictures are shown
_SHOWN = 4  # pictures of a prompt in the docs' picture
_ROWS = ("a red circle", "a red square", "a blue circle", "a green star")

Runs = Sequence[Mapping[str, Any]]


def figures(file: Path, table: Callable[..., str], provenance: Callable[[dict[str, Any]], str]) -> str:
    """Return the text for the page.

    file: the record. table, provenance: write a table, and where something was measured.
    """
    if not file.exists():
        return NOT_MEASURED
    record = json.loads(file.read_text(encoding="utf-8"))
    runs = record["runs"]
    if not runs:
        return NOT_MEASURED
    judge = record["judge"]
    unseen = [run for run in runs if run["arm"] in UNSEEN]
    seen = [run for run in runs if run["arm"] not in UNSEEN]
    parts = [
        f"The judge names {_percent(judge['top1'])} of {judge['renders']} rendered pictures rightly. Shares of "
        "pictures that show the concept, and for neighbours what the prompt asks for; in brackets 95 % intervals over "
        "the pictures, or, where an arm has several unlearning seeds, the lowest and the highest of them:",
        table(_HEAD, list(_rows(seen))),
        *(_unchanged(run) for run in unseen),
        "The neighbours, group by group:",
        table(("forgotten", "neighbours", "pictures", "arm", "before", "after"), list(_neighbours(seen))),
        provenance(record),
    ]
    return "\n\n".join(parts)


_HEAD = (
    "forgotten", "arm", "seeds", "rate", "CLIP forget top-1", "pictures", "concept painted", "neighbours painted",
    "change, of 255",
)  # fmt: skip


def _rows(runs: Runs) -> Iterator[Sequence[str]]:
    for (concept, arm), of in _by(runs):
        clip = [run["clip"]["forget_top1"] for run in of]
        groups = [run["groups"][FORGET] for run in of]
        others = [_pooled(run) for run in of]
        yield (
            concept, arm, str(len(of)), ", ".join(dict.fromkeys(f"{run['recipe']['learning_rate']:.0e}" for run in of)),
            f"{_percent(_mean(of['before'] for of in clip))} → {_percent(_mean(of['after'] for of in clip))}",
            str(groups[0]["pictures"]),
            f"{_percent(groups[0]['concept']['before']['value'])} → "
            f"{_spread([of['concept']['after'] for of in groups])}",
            f"{_percent(others[0][0])} → {_spread([{'value': after} for _, after in others])}",
            f"{255 * _mean(of['pixel_change'] for of in groups):.1f}",
        )  # fmt: skip


def _neighbours(runs: Runs) -> Iterator[Sequence[str]]:
    for (concept, arm), of in _by(runs):
        for name in of[0]["groups"]:
            if name != FORGET:
                groups = [run["groups"][name] for run in of]
                before = _percent(groups[0]["asked"]["before"]["value"])
                after = _spread([group["asked"]["after"] for group in groups])
                yield concept, name, str(groups[0]["pictures"]), arm, before, after


def _unchanged(run: Mapping[str, Any]) -> str:
    """Say what unlearning does to the pictures where the pipeline does not have what is unlearned."""
    same = sum(group["identical"] for group in run["groups"].values())
    count = sum(group["pictures"] for group in run["groups"].values())
    top1 = run["clip"]["forget_top1"]
    return (
        f"**With {UNSEEN[run['arm']]}** ({run['concept']}; the CLIP's forget top-1 goes from "
        f"{_percent(top1['before'])} to {_percent(top1['after'])}), {same} of {count} pictures keep every pixel."
    )


def _by(runs: Runs) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault((run["concept"], run["arm"]), []).append(run)
    return list(found.items())


def _pooled(run: Mapping[str, Any]) -> tuple[float, float]:
    """Return the shares before and after of the pictures of all neighbours that show what was asked."""
    groups = [group for name, group in run["groups"].items() if name != FORGET]
    weights = [group["pictures"] for group in groups]
    before, after = (
        float(np.average([group["asked"][when]["value"] for group in groups], weights=weights))
        for when in ("before", "after")
    )
    return before, after


def _spread(shares: Sequence[Mapping[str, float]]) -> str:
    """Write the mean of the seeds with its range, or a single share with its interval."""
    values = [share["value"] for share in shares]
    low, high = (min(values), max(values)) if len(values) > 1 else (shares[0].get("low"), shares[0].get("high"))
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return _percent(_mean(values)) + bounds


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def draw(folder: Path, path: Path) -> None:
    """Write the docs' picture: prompts of "red circle" with the same seeds, before and after.

    folder: the pictures, those of `_SEED` of all arms among them.
    """
    from matplotlib import pyplot as plt

    arms = ("calibrated", HELD, "cliperase", CONTROL)
    found = {arm: np.load(folder / f"red circle-{arm}-{_SEED}.npz") for arm in arms}
    columns = {"original": (found[arms[0]], "before"), **{arm: (found[arm], "after") for arm in arms}}
    figure, grid = plt.subplots(len(_ROWS), len(columns), figsize=(12, 2.6), layout="constrained")
    for row, prompt in enumerate(_ROWS):
        for column, (name, (pictures, when)) in enumerate(columns.items()):
            axes = grid[row, column]
            strip = np.concatenate(list(pictures[f"{prompt}|{when}"][:_SHOWN].transpose(0, 2, 3, 1)), axis=1)
            axes.imshow(strip, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(name, fontsize=9)
            if column == 0:
                axes.set_ylabel(prompt, rotation=0, ha="right", va="center", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
