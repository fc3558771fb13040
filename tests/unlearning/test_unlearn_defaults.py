"""`unlearn()` and `evaluate()` give the same bits whatever torch's defaults are."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs
from torch import Tensor
from torch_defaults import torch_default

import cliperase_fast as cf

Pairs = list[tuple[Any, str]]


def pictures() -> Pairs:
    """Noisy colours as PIL images, which go through the model's transform."""
    random = np.random.default_rng(0)
    rgb = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
    return [
        (Image.fromarray(random.integers(0, 30, (9, 8, 3), dtype=np.uint8) + np.uint8(colour)), f"a {name} square")
        for name, colour in rgb.items()
        for _ in range(8)
    ]


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensors": (make_pairs, {}),
    "LoRA": (pictures, {"trainable": "lora", "accumulate": 2}),
    "chunks, a live teacher, weight decay": (
        pictures, {"grad_cache_chunk": 2, "teacher_cache": "off", "optimizer": "adamw", "weight_decay": 0.1},
    ),
}  # fmt: skip


@cache
def prepared(case: str) -> tuple[Any, Pairs]:
    """A model and pairs, made without any other default."""
    return make_tiny_clip(), OPTIONS[case][0]()


def run(case: str, folder: Path) -> tuple[dict[str, Tensor], list[list[float]], dict[str, Any]]:
    model, pairs = prepared(case)
    result = cf.unlearn(model, *split_pairs(pairs, "red"), output_dir=folder, **QUICK, **OPTIONS[case][1])
    wanted = ("total", "retain", "forget", "consistency", "grad_norm")
    losses = [[line[key] for key in wanted] for line in result.history if "total" in line]
    assert losses
    return result.model.state_dict(), losses, result.after


@pytest.mark.parametrize("case", OPTIONS)
def test_weights_losses_and_scores_do_not_depend_on_the_defaults_of_torch(tmp_path, case):
    weights, losses, scores = run(case, tmp_path / "plain")
    for default in ("float64", "bfloat16", "meta"):
        with torch_default(default):
            found, found_losses, found_scores = run(case, tmp_path / default)
        assert found_losses == losses and found_scores == scores, default
        for name, tensor in weights.items():
            ours = found[name]
            assert (ours.dtype, ours.device) == (tensor.dtype, tensor.device) and torch.equal(ours, tensor), name


def test_a_run_resumes_under_other_defaults_to_the_same_bits(tmp_path):
    model, pairs = prepared("tensors")
    options = {**QUICK, "checkpoint_every": 2, "output_dir": tmp_path}
    whole = cf.unlearn(model, *split_pairs(pairs, "red"), **options)
    *_, last = sorted((tmp_path / "checkpoints").glob("step-*"))
    shutil.rmtree(last)  # as if the run had ended before it
    with torch_default("float64"):
        resumed = cf.unlearn(model, *split_pairs(pairs, "red"), resume=True, **options)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("images", [make_pairs, pictures])
def test_scores_of_an_evaluation_do_not_depend_on_the_defaults_of_torch(images, default):
    model, pairs = make_tiny_clip(), images()
    expected = cf.evaluate(model, pairs, forget="caption:red", progress=False)
    with torch_default(default):
        assert cf.evaluate(model, pairs, forget="caption:red", progress=False) == expected


def test_images_of_worker_processes_do_not_depend_on_the_defaults_of_torch():
    model, pairs = make_tiny_clip(), pictures()
    expected = cf.evaluate(model, pairs, progress=False)
    with torch_default("meta"):
        assert cf.evaluate(model, pairs, num_workers=1, progress=False) == expected
