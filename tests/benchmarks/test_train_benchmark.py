"""Tests that the two loops of benchmarks.train are equivalent, and that reports follow from the record."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import open_clip
import pytest
import torch

from cliperase_fast.benchmarks import train
from cliperase_fast.benchmarks.machine import describe
from cliperase_fast.benchmarks.train_loops import PHASES, SETTINGS, WHO, run
from cliperase_fast.models import load_model


def tiny_model(folder, quick):
    if not (folder / "model").is_dir():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            text_cfg={"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        )
        load_model(model).save(folder / "model")
    return f"local-dir:{folder / 'model'}"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder, vit = tmp_path_factory.mktemp("train"), SETTINGS["vit-b-32"]
    setting = replace(
        vit, model=tiny_model, config={**vit.config, "batch_size": 12, "learning_rate": 1e-3, "epochs": 3}, quick={}
    )
    runs = [{"setting": "vit-b-32", **run(setting, who, folder, quick=True)} for who in WHO]
    return {**describe(), "settings": ["vit-b-32"], "titles": {"vit-b-32": vit.title}, "runs": runs}


def test_both_loops_see_the_same_batches_and_end_with_the_same_scores(record):
    slow, fast = record["runs"]
    assert len(slow["losses"]) == len(fast["losses"]) >= 9
    assert slow["losses"] == pytest.approx(fast["losses"], abs=1e-4)
    assert abs(slow["losses"][0] - slow["losses"][-1]) > 0.05
    assert slow["scores"] == fast["scores"]
    assert train.faults(record) == []


def test_both_loops_train_the_same_parts(tmp_path):
    setting = replace(
        SETTINGS["vit-b-32-last"], model=tiny_model, quick={"batch_size": 12, "learning_rate": 1e-3, "epochs": 2}
    )
    slow, fast = (run(setting, who, tmp_path, quick=True) for who in WHO)
    assert slow["losses"] == pytest.approx(fast["losses"], abs=1e-4)
    assert abs(slow["losses"][0] - slow["losses"][-1]) > 0.01


def test_the_phases_make_up_the_step(record):
    for of in record["runs"]:
        assert len(of["step_seconds"]) == len(of["losses"]) - 1
        mean = sum(of["step_seconds"]) / len(of["step_seconds"])
        assert sum(of["phases"].values()) == pytest.approx(mean, rel=1e-3)
        assert all(of["phases"][phase] > 0 for phase in PHASES)
        assert of["phases"]["other"] < 0.5 * mean
        assert of["peak_bytes"] > of["held_bytes"] > 0


def test_a_record_is_shown_and_loops_that_differ_are_named(record, tmp_path, capsys):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(record))
    assert train.main(["--from", str(path)]) == 0
    shown = capsys.readouterr().out
    slow, fast = (train.rates(train.runs_of(record, "vit-b-32", who))[1] for who in WHO)
    assert f"{fast / slow:.2f} x" in shown
    assert "image encoder, backward" in shown
    other = copy.deepcopy(record)
    other["runs"][1]["losses"][3] += 0.1
    path.write_text(json.dumps(other))
    assert train.main(["--from", str(path)]) == 1
    assert "NOT COMPARABLE: vit-b-32: the losses differ by 1.0e-01" in capsys.readouterr().out


def test_an_unknown_setting_is_named():
    with pytest.raises(SystemExit, match=r"'vit' is not one of demo, small-vit, vit-b-32"):
        train.main(["--settings", "vit"])
