"""A run that is killed and resumed ends with the weights of one that was not, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from processes import kill_once
from safetensors.torch import load_file
from tiny import make_pairs, make_tiny_clip, split_pairs

from cliperase_fast import InputError, unlearn

SETTINGS = {
    "epochs": 6,
    "batch_size": 6,
    "learning_rate": 1e-3,
    "checkpoint_every": 4,
    "report": False,
    "progress": False,
}


def run(output, resume=False, **changes):
    forget, retain = split_pairs(make_pairs(), "red")
    # Patch dropout draws random numbers in every step, so a random state that is not restored would show.
    return unlearn(
        make_tiny_clip(patch_dropout=0.5), forget, retain, output_dir=output, resume=resume, **{**SETTINGS, **changes}
    )


def weights(output):
    return load_file(Path(output) / "model" / "open_clip_model.safetensors")


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    run(output)
    return output


@pytest.mark.parametrize("lines", [1, 13])
def test_a_run_killed_by_sigkill_resumes_to_the_same_weights(tmp_path, uninterrupted, lines):
    output = tmp_path / "run"
    log = output / "metrics.jsonl"
    kill_once(lambda: log.is_file() and log.read_bytes().count(b"\n") >= lines, run, output)
    assert not (output / "result.json").exists(), "the run ended before it could be killed"

    run(output, resume=True)
    assert_same_weights(weights(output), weights(uninterrupted))
    steps = [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines() if "total" in line
    ]
    assert steps == list(range(1, len(steps) + 1)), "every step stands in the metrics once"


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    before = json.loads((uninterrupted / "result.json").read_text())
    run(uninterrupted, resume=True)
    after = json.loads((uninterrupted / "result.json").read_text())
    assert after["after"] == before["after"]
    assert after["selection"] == before["selection"]


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_resumed(tmp_path, uninterrupted):
    output = tmp_path / "run"
    run(output)
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    (newest / "student.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=newest.name):
        run(output, resume=True)
    assert_same_weights(weights(output), weights(uninterrupted))


def test_resume_starts_over_if_nothing_was_written(tmp_path, uninterrupted):
    run(tmp_path / "new", resume=True)
    assert_same_weights(weights(tmp_path / "new"), weights(uninterrupted))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"learning_rate": 5e-4}, "learning_rate 0.001 -> 0.0005"), ({"seed": 1}, "the settings differ .seed 0 -> 1")],
)
def test_a_checkpoint_of_other_settings_is_refused(uninterrupted, change, says):
    with pytest.raises(InputError, match=says):
        run(uninterrupted, resume=True, **change)


def test_a_checkpoint_of_another_model_is_refused(uninterrupted):
    forget, retain = split_pairs(make_pairs(), "red")
    with pytest.raises(InputError, match="another model"):
        unlearn(make_tiny_clip(seed=1), forget, retain, output_dir=uninterrupted, resume=True, **SETTINGS)


def test_a_checkpoint_of_other_data_is_refused(uninterrupted):
    forget, retain = split_pairs(make_pairs(), "blue")
    model = make_tiny_clip(patch_dropout=0.5)
    with pytest.raises(InputError, match="other data"):
        unlearn(model, forget, retain, output_dir=uninterrupted, resume=True, **SETTINGS)
