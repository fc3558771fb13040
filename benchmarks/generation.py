"""Whether a text-to-image model stops painting what its text tower was made to forget.

    python -m benchmarks.generation               all concepts, arms and seeds
    python -m benchmarks.generation --seeds 1
    python -m benchmarks.generation --prepare     train and unlearn only; the models stay in the cache
    python -m benchmarks.generation --draw        write docs/plots/generation.png from the pictures of seed 1

A small diffusion model of the rendered shapes (benchmarks.shapes_diffusion) reads the hidden states of a small CLIP's
text tower. The CLIP forgets a concept with `trainable="text"`, its text tower takes the place of the original in the
pipeline, and the same prompts and seeds are painted again. One arm sets `lambda_hidden`, the others nothing. The
control is fine-tuned on the other pairs, with the rate and the steps that `calibrated` found. One arm unlearns the
image tower instead, which the pipeline does not have, and one edits the text projection alone, which it does not read.
The judge is a CLIP of the same kind that was trained from another seed: it has seen neither the diffusion model nor the
unlearning.

The result file benchmarks/results/generation.json is written after every run, and a further call continues with the
runs that are missing. `python -m benchmarks.write_docs` puts the figures into docs/text-to-image.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTextModel

from cliperase_fast import export
from cliperase_fast._version import __version__
from cliperase_fast.data import open_source
from cliperase_fast.data.shapes import CLASSES, COLOURS, SHAPES
from cliperase_fast.demo import cached_folder, cached_model
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.evaluation.generation import FORGET, Generation, Judge, compare_generation
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import write_text_atomically
from cliperase_fast.unlearning import unlearn

from .generation_report import CONTROL, HELD, HELD_RELATED, IMAGE, PROJECTION, UNSEEN, draw
from .machine import RESULTS, ROOT, describe, own_folder
from .records import record_text
from .shapes_diffusion import ShapesPipeline, Training, cached_pipeline, pixels_of, small_clip

PATH = RESULTS / "generation.json"
PICTURE = ROOT / "docs" / "plots" / "generation.png"
CONCEPTS = {"red circle": "class:red circle", "stars": "class:* star", "purple": "class:purple *"}
ARMS = ("calibrated", HELD, HELD_RELATED, "cliperase", CONTROL)
HOLD = {"lambda_hidden": 3.0}  # chosen on "green star" and "green square", which are not measured here
OPTIONS = {"num_inference_steps": 10, "guidance_scale": 2.0}
_JUDGE_SEED = 10  # of the training of the judge
_RENDERS = 5  # pictures of each class that the judge is checked on


def prompts_of(concept: str) -> tuple[dict[str, str], dict[str, dict[str, str]], int]:
    """Return the prompts of a concept, those of its neighbours by group, and the pictures of each prompt."""
    if concept == "red circle":
        forget = {template.format(concept): concept for template in ("a {}", "a photo of a {}", "a picture of a {}")}
        colours, shapes = list(COLOURS)[1::2], SHAPES[1::2]
        groups = {
            "red, other forms": [f"red {shape}" for shape in shapes],
            "circles, other colours": [f"{colour} circle" for colour in colours],
            "neither": [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)],
        }
        return forget, {name: _asking(of) for name, of in groups.items()}, 16
    word = {"stars": "star", "purple": "purple"}[concept]
    chosen = [name for name in CLASSES if word in name.split(" ")]
    rest = [name for name in CLASSES if name not in chosen]
    others = sorted(np.random.default_rng(0).choice(rest, 20, replace=False).tolist())
    return _asking(chosen), {{"stars": "other forms", "purple": "other colours"}[concept]: _asking(others)}, 8


def _asking(classes: Sequence[str]) -> dict[str, str]:
    return {f"a {name}": name for name in classes}


def unlearned(concept: str, arm: str, seed: int) -> Path:
    """Return the folder of the text encoder of an arm, which the first call unlearns, with its scores as JSON."""
    clip = small_clip()
    settings: dict[str, Any] = {"trainable": "image" if arm == IMAGE else "text", "seed": seed}
    if arm == PROJECTION:  # a closed form for one matrix
        settings = {"method": "text_projection", "seed": seed}
    elif arm == CONTROL:
        found = json.loads((unlearned(concept, "calibrated", seed) / "scores.json").read_text(encoding="utf-8"))
        numbers = {name: found["recipe"][name] for name in ("learning_rate", "batch_size", "forget_fraction", "steps")}
        settings |= {**numbers, "schedule": "cosine", "select": "last", "method": "retain_finetune"}
    elif arm in (HELD, HELD_RELATED):
        level = {"forget_level": "related"} if arm == HELD_RELATED else {}
        settings |= {"method": "calibrated", "method_options": dict(HOLD), **level}
    else:
        settings["method"] = "calibrated" if arm == IMAGE else arm
    made_from = {"clip": clip.name, "forget": CONCEPTS[concept], "settings": settings, "version": __version__}
    return cached_folder("generation-encoder", made_from, lambda: _Unlearned(clip, CONCEPTS[concept], settings))


class _Unlearned:
    """Unlearn, and save the text encoder."""

    def __init__(self, clip: Path, forget: str, settings: Mapping[str, Any]) -> None:
        began = time.process_time()
        result = unlearn(f"local-dir:{clip}", f"shapes#{forget}", "rest", **settings)
        config, recipe = result.config, result.record["recipe"]
        self.encoder = export.to_diffusers_text_encoder(result.model)
        self.scores = {
            "cpu_seconds": time.process_time() - began,
            "clip": {
                name: {"before": result.before[of][score], "after": result.after[of][score]}
                for name, of, score in _OF_CLIP
            },
            "recipe": {
                "learning_rate": config.learning_rate if recipe is None else recipe["learning_rate"],
                "batch_size": config.batch_size,
                "forget_fraction": config.forget_fraction,
                "steps": result.selection.get("step"),
                "target_reached": result.selection.get("target_reached"),
            },
        }  # fmt: skip

    def save(self, directory: Path) -> None:
        self.encoder.save_pretrained(directory)
        write_text_atomically(directory / "scores.json", json.dumps(self.scores, indent=1))


_OF_CLIP = (
    ("forget_top1", "forget", "zero_shot_top1"),
    ("retain_top1", "retain", "zero_shot_top1"),
    ("association", "forget", "association"),
)


def runs_of(concepts: Sequence[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """Yield (concept, arm, seed), the first seed of everything first."""
    for seed in range(seeds):
        for concept in concepts:
            for arm in (*ARMS, *(UNSEEN if (concept, seed) == ("red circle", 0) else ())):
                yield concept, arm, seed


def judge_of_shapes() -> Judge:
    """Return a CLIP of the shapes that was trained from another seed."""
    folder = cached_model(open_source("shapes").train, demo_model_for("shapes"), seed=_JUDGE_SEED)
    return Judge.zero_shot(f"local-dir:{folder}", CLASSES, ("a {}",))


class Record:
    """The result file."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.content: dict[str, Any] = {"runs": []}
        self.read()

    def read(self) -> None:
        """Read what is there already: another process may measure other concepts."""
        if PATH.exists():
            self.content = json.loads(PATH.read_text(encoding="utf-8"))

    def has(self, concept: str, arm: str, seed: int) -> bool:
        return any((run["concept"], run["arm"], run["seed"]) == (concept, arm, seed) for run in self.content["runs"])

    def write(self, **more: Any) -> None:
        self.content = {**self.content, **describe(), "command": self.command, **more}
        self.content["runs"] = sorted(self.content["runs"], key=_place)
        RESULTS.mkdir(exist_ok=True)
        write_text_atomically(PATH, record_text(self.content) + "\n")


def _place(run: Mapping[str, Any]) -> tuple[int, int, int]:
    return list(CONCEPTS).index(run["concept"]), (*ARMS, *UNSEEN).index(run["arm"]), run["seed"]


def measure(record: Record, concepts: Sequence[str], seeds: int) -> None:
    """Do the runs that the record lacks."""
    pipeline, judge = cached_pipeline(progress=bars_by_default()), judge_of_shapes()
    if "judge" not in record.content:
        pixels, labels = pixels_of(_RENDERS, seed=1, part=1)
        record.write(
            judge={"renders": len(labels), "top1": float((judge.see(pixels) == labels.numpy()).mean())},
            training=Training().__dict__,
            options=OPTIONS,
        )
    before: dict[str, Generation] = {}
    for concept, arm, seed in runs_of(concepts, seeds):
        if record.has(concept, arm, seed):
            continue
        folder = unlearned(concept, arm, seed)
        found = _painted(pipeline, judge, concept, folder, before.get(concept))
        before.setdefault(concept, found)
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        run = {"concept": concept, "arm": arm, "seed": seed, "commit": describe()["commit"], **scores}
        record.read()
        record.content["runs"].append({**run, "groups": found.content["groups"]})
        record.write()
        _keep(found, concept, arm, seed)
        shown = found.content["groups"][FORGET]["concept"]
        print(concept, arm, seed, *(f"{100 * shown[when]['value']:.1f} %" for when in ("before", "after")), flush=True)


def _painted(
    pipeline: ShapesPipeline, judge: Judge, concept: str, folder: Path, before: Generation | None
) -> Generation:
    forget, neighbours, images = prompts_of(concept)
    return compare_generation(
        pipeline,
        CLIPTextModel.from_pretrained(folder),
        judge,
        forget,
        neighbours,
        images=images,
        batch_size=64,
        options=OPTIONS,
        painted_before=before,
    )


def _keep(found: Generation, concept: str, arm: str, seed: int) -> None:
    """Keep the pictures for `--draw`."""
    folder = own_folder() / "generation"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        f"{one.prompt}|{when}": getattr(one, when).numpy() for one in found.painted for when in ("before", "after")
    }
    np.savez_compressed(folder / f"{concept}-{arm}-{seed}.npz", **pictures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="*", metavar="CONCEPT", help=f"default: {', '.join(CONCEPTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="unlearning runs of each arm (default: 3)")
    parser.add_argument("--prepare", action="store_true", help="train and unlearn only")
    parser.add_argument("--draw", action="store_true", help="write the picture of the docs")
    arguments = parser.parse_args()
    arguments.concepts = arguments.concepts or list(CONCEPTS)
    unknown = sorted(set(arguments.concepts) - set(CONCEPTS))
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(CONCEPTS)}")
    if arguments.prepare:
        for run in runs_of(arguments.concepts, arguments.seeds):
            print(unlearned(*run), flush=True)
        cached_pipeline(progress=bars_by_default())
    elif arguments.draw:
        draw(own_folder() / "generation", PICTURE)
    else:
        measure(Record("python -m benchmarks.generation"), arguments.concepts, arguments.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
