"""What unlearning leaves behind: each method's model audited against models that never knew, on data without downloads.

    python -m benchmarks.audit digits        three digits, five oracles for each
    python -m benchmarks.audit shapes        "red circle", three oracles
    python -m benchmarks.audit personas      three sets of facts, three oracles for each, and a model without any facts
    python -m benchmarks.audit cifar10 --shards '/data/train-{00000..00003}.tar' --test-shards /data/test-00000.tar

The first run of each trains the original and the oracles, which are kept in the cache of `cliperase-fast demo`: seconds
for a digits model, minutes for the others, on two idle cores. Each writes benchmarks/results/audit-NAME.json;
`python -m benchmarks.write_docs` puts the figures into the docs. Digits are also compared with reference values.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cliperase_fast.auditing import audit
from cliperase_fast.data.personas import FORGET_SETS
from cliperase_fast.demo import cached_clean_model, cached_oracles, cached_small_clip, require_known, run_demo
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.progress import bars_by_default

from .audit_report import CLEAN
from .machine import RESULTS, describe
from .records import add_shards, classes, demo_settings, record_text, shards_of, spread

# The settings of each unlearned model, over those of version 0.1's demo. `calibrated` has no others.
METHODS: dict[str, dict[str, Any]] = {
    "cliperase": {},
    "calibrated": {"method": "calibrated"},
    "cliperase, hinge": {"forget_loss": "hinge"},
    "gradient_ascent": {"method": "gradient_ascent"},
}


@dataclass(frozen=True)
class Study:
    """The audits of one command.

    concepts: the selector of each thing to forget. attacked: the concepts that are audited with depth=True, which takes
    minutes a model. oracles: how many for each concept. test: where to measure, if not on the source's own test split.
    other: data sets of concepts that were never trained. methods: of `METHODS`. clean: whether a model that was trained
    on none of the facts is audited too.
    """

    source: str
    concepts: Mapping[str, str]
    attacked: Sequence[str]
    oracles: int = 3
    test: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)
    methods: Sequence[str] = tuple(METHODS)
    clean: bool = False


STUDIES = {
    "digits": Study(
        "demo", classes("seven", "three", "eight"), ["seven"], 5, other={"shapes": "shapes?train=1&test=10"}
    ),
    "shapes": Study("shapes", classes("red circle"), ["red circle"], other={"digits": "demo"}),
    "personas": Study("personas", FORGET_SETS, [], methods=("cliperase", "calibrated", "gradient_ascent"), clean=True),
}


def cifar10(shards: str, test_shards: str) -> Study:
    return Study(
        f"wds:{shards}",
        classes("airplane"),
        ["airplane"],
        test=f"wds:{test_shards}",
        other={"digits": "demo"},
        methods=("cliperase", "calibrated", "gradient_ascent"),
    )


@dataclass(frozen=True)
class Reference:
    """A known value of one audit of the digits. model: whose score it is."""

    what: str
    method: str
    model: str
    group: str
    score: str
    value: float
    tolerance: float


# Forgetting "seven", measured once with an implementation of its own; the oracle's are those of a single one.
REFERENCE_CONCEPT = "seven"
REFERENCES = [
    Reference("association, original", "cliperase", "before", "forgetting", "association", 0.84, 0.05),
    Reference("association, CLIPErase", "cliperase", "after", "forgetting", "association", -0.90, 0.05),
    Reference("association, oracle", "cliperase", "oracle", "forgetting", "association", -0.04, 0.05),
    Reference("relearned after 5 steps, oracle", "cliperase", "oracle", "depth", "relearn@5", 0.64, 0.15),
    Reference("relearned after 10 steps, oracle", "cliperase", "oracle", "depth", "relearn@10", 0.78, 0.15),
    Reference("relearned after 10 steps, CLIPErase", "cliperase", "after", "depth", "relearn@10", 0.0, 0.15),
    Reference("relearned after 20 steps, CLIPErase", "cliperase", "after", "depth", "relearn@20", 0.72, 0.15),
]


def run_study(study: Study, folder: Path, methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Forget each concept by each method and audit the result. folder: where the unlearned models go; runs that are
    there already are audited as they are.

    Raises UnlearningError where the original knows too little of its data to tell anything.
    """
    bars = bars_by_default()
    recipe = demo_model_for(study.source)
    before = cached_small_clip(study.source, recipe, progress=bars)
    require_known(before, study.source, recipe)
    runs = []
    for concept, selector in study.concepts.items():
        oracles = cached_oracles(study.source, selector, study.oracles, progress=bars)
        forget = f"{study.source}#{selector}"
        after: dict[str, tuple[Path, Mapping[str, Any]]] = {}
        for method, settings in methods.items():
            run = folder / re.sub(r"\W+", "-", f"{concept}-{method}")
            given = settings if method == "calibrated" else {**demo_settings(study.source), **settings}
            run_demo(forget, run, test=study.test, resume=run.is_dir(), progress=bars, report=False, **given)
            after[method] = (run / "model", settings)
        if study.clean:
            after[CLEAN] = (cached_clean_model(study.source, progress=bars), {})
        for method, (model, settings) in after.items():
            print(f"--- {concept}, {method}", flush=True)
            began = time.perf_counter()
            found = audit(
                f"local-dir:{before}",
                f"local-dir:{model}",
                forget,
                "rest",
                oracle=[f"local-dir:{path}" for path in oracles],
                test=study.test,
                other=study.other,
                depth=concept in study.attacked,
                progress=bars,
            )
            print(found.summary(), flush=True)
            seconds = round(time.perf_counter() - began, 1)
            runs.append(
                {"concept": concept, "method": method, "settings": dict(settings), "seconds": seconds, **kept(found)}
            )
    return runs


def kept(found: Any) -> dict[str, Any]:
    """What a record keeps of an audit; of each single oracle the values alone."""
    data = found.to_dict()
    scores = {}
    for model, groups in data["scores"].items():
        single = model.startswith("oracle ")
        scores[model] = {
            group: {name: {"value": of["value"]} if single else of for name, of in entries.items()}
            for group, entries in groups.items()
        }
    return {
        "scores": scores,
        **{key: data[key] for key in ("gap", "background", "over_forgotten", "verdicts", "notes", "data")},
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The scores of each model over all concepts: {model: {score: {"mean", "std", "low", "high", "count"}}}.

    Models: "before", each method's name, and "oracle". low, high: the least and the largest value; for oracles over all
    single ones. std: over the concepts (of oracles over all single ones), None for one value.
    """
    found: dict[str, dict[str, list[float]]] = {}
    first = runs[0]["method"] if runs else None
    for run in runs:
        for model, groups in run["scores"].items():
            if model == "oracle" or (model != "after" and run["method"] != first):
                continue  # the original and the oracles are the same for every method
            name = run["method"] if model == "after" else "oracle" if model.startswith("oracle ") else model
            for entries in groups.values():
                for score, of in entries.items():
                    if of["value"] is not None:
                        found.setdefault(name, {}).setdefault(score, []).append(of["value"])
    return {name: {score: spread(values) for score, values in scores.items()} for name, scores in found.items()}


def compared(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each reference value beside the measured one. For oracles also the values of each, as one was measured there."""
    by_method = {run["method"]: run for run in runs if run["concept"] == REFERENCE_CONCEPT}
    found = []
    for reference in REFERENCES:
        if (run := by_method.get(reference.method)) is None:
            continue
        measured = run["scores"][reference.model][reference.group][reference.score]["value"]
        row = {
            "what": reference.what,
            "reference": reference.value,
            "tolerance": reference.tolerance,
            "measured": measured,
            "within": abs(measured - reference.value) <= reference.tolerance,
        }
        if reference.model == "oracle":
            singles = [of for model, of in run["scores"].items() if model.startswith("oracle ")]
            row["each"] = [of[reference.group][reference.score]["value"] for of in singles]
        found.append(row)
    return found


def comparison_text(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        each = f" (each: {', '.join(f'{value:.2f}' for value in row['each'])})" if "each" in row else ""
        said = "within" if row["within"] else "NOT within"
        lines.append(
            f"{row['what']}: reference {row['reference']:.2f}, measured {row['measured']:.2f}{each}, "
            f"{said} {row['tolerance']:.2f}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*STUDIES, "cifar10"))
    add_shards(parser, "cifar10")
    parser.add_argument("--only", metavar="NAME", help="forget only this concept, not each in turn")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="keep the unlearned models there, and use those there")
    words = list(sys.argv[1:] if words is None else words)
    arguments = parser.parse_args(words)
    if arguments.name == "cifar10":
        study = cifar10(*shards_of(parser, arguments))
    else:
        study = STUDIES[arguments.name]
    command = f"python -m benchmarks.audit {arguments.name}"
    if arguments.only is not None:
        if arguments.only not in study.concepts:
            parser.error(f"--only {arguments.only!r} is not one of {', '.join(study.concepts)}")
        study = replace(study, concepts={arguments.only: study.concepts[arguments.only]})
        command += f" --only {arguments.only!r}"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = run_study(study, arguments.runs or Path(folder), {name: METHODS[name] for name in study.methods})
    seconds = round(time.perf_counter() - began, 1)
    references = compared(runs) if arguments.name == "digits" else []
    record = {
        **describe(), "command": command, "seconds": seconds, "oracles": study.oracles, "summary": summary(runs),
        "references": references, "runs": runs,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"audit-{arguments.name}.json"
    path.write_text(record_text(record) + "\n", encoding="utf-8")
    if references:
        print(comparison_text(references))
    print(f"audit {arguments.name}: done in {seconds:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
