"""The figures that docs/text-to-image.md shows, from a made-up record."""

from __future__ import annotations

import json

import pytest

from cliperase_fast.benchmarks.generation import prompts_of
from cliperase_fast.benchmarks.generation_report import IMAGE, NOT_MEASURED, figures
from cliperase_fast.benchmarks.records import table
from cliperase_fast.data.shapes import CLASSES


def group(before, after, pictures, identical=0):
    shares = {"before": {"value": before}, "after": {"value": after, "low": after - 0.1, "high": after + 0.1}}
    return {"asked": shares, "concept": shares, "pictures": pictures, "identical": identical, "pixel_change": 0.1}


def run(arm, seed, painted, identical=0):
    return {
        "concept": "red circle", "arm": arm, "seed": seed, "recipe": {"learning_rate": 3.16e-4},
        "clip": {"forget_top1": {"before": 1.0, "after": 0.0}},
        "groups": {
            "forget": group(0.9, painted, 8, identical), "near": group(0.8, 0.4, 10, identical),
            "far": group(0.9, 0.9, 30, identical),
        },
    }  # fmt: skip


def written(tmp_path, runs):
    path = tmp_path / "generation.json"
    path.write_text(json.dumps({"judge": {"top1": 0.98, "renders": 500}, "runs": runs}))
    return figures(path, table, lambda record: "measured here")


def test_a_seed_has_its_interval_and_several_their_range(tmp_path):
    assert "| cliperase | 1 | 3e-04 | 100.0 % → 0.0 % | 8 | 90.0 % → 30.0 % [20.0, 40.0] | 87.5 % → 77.5 %" in written(
        tmp_path, [run("cliperase", 0, 0.3)]
    )
    text = written(tmp_path, [run("cliperase", seed, painted) for seed, painted in enumerate((0.1, 0.3, 0.5))])
    assert "| cliperase | 3 | 3e-04 |" in text
    assert "90.0 % → 30.0 % [10.0, 50.0] | 87.5 % → 77.5 % [77.5, 77.5] | 25.5 |" in text
    assert "| red circle | near | 10 | cliperase | 80.0 % | 40.0 % [40.0, 40.0] |" in text


def test_the_image_tower_is_told_by_the_pictures_that_did_not_change(tmp_path):
    text = written(tmp_path, [run("calibrated", 0, 0.3), run(IMAGE, 0, 0.9, identical=8)])
    assert "24 of 48 pictures keep every pixel" in text and f"| {IMAGE} |" not in text.split("keep every pixel")[0]


def test_a_record_without_runs_says_so(tmp_path):
    assert written(tmp_path, []) == figures(tmp_path / "none.json", table, str) == NOT_MEASURED


@pytest.mark.parametrize("concept", ["red circle", "stars", "purple"])
def test_prompts_ask_for_the_concept_and_neighbours_do_not(concept):
    forget, neighbours, images = prompts_of(concept)
    word = concept.rstrip("s")
    assert set(forget.values()) == {name for name in CLASSES if name == concept or word in name.split(" ")}
    asked = [name for of in neighbours.values() for name in of.values()]
    assert not set(asked) & set(forget.values()) and len(asked) == len(set(asked)) and images >= 8
