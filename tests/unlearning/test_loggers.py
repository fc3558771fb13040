"""What TensorBoard and Weights & Biases get of a run, and what a run does when they are missing or fail."""

import json
import re
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import QUICK, interrupted_after, make_pairs, make_tiny_clip, split_pairs

from cliperase_fast import InputError, UnlearnConfig, UnlearningError, config, extras, unlearn
from cliperase_fast.unlearning import loggers

PAIRS = split_pairs(make_pairs(), "red")
CLIP = make_tiny_clip()
SETTINGS = {**QUICK, "checkpoint_every": 2, "device": "cpu"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


def run(output, **changes):
    return unlearn(CLIP, *PAIRS, output_dir=output, **{**SETTINGS, **changes})


def expected(output):
    """(step, name) -> value, of every number in metrics.jsonl."""
    found = {}
    for text in (output / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        step = line.pop("step")
        groups = {"validation": line["validation"]} if "validation" in line else {"train": line}
        found.update({(step, f"{group}/{key}"): value for group, rest in groups.items() for key, value in rest.items()})
    return found


def tensorboard_events(output):
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, tag, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def wandb_runs(output):
    """(id, exit code, [history row]) of each offline run, in the order of their starts."""
    return [read_wandb(path) for path in sorted((output / "wandb").glob("offline-run-*/*.wandb"))]


def read_wandb(path):
    """The format is LevelDB's log: records in blocks of 32 KiB, cut at their borders, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, []
    name, code, rows = None, None, []
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind not in (1, 4):  # neither a whole record nor the last part of one
            continue
        record = Record.FromString(b"".join(parts))
        parts.clear()
        if record.HasField("run"):
            name = record.run.run_id
        if record.HasField("exit"):
            code = record.exit.exit_code
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in row.items()})
    return name, code, rows


def wandb_events(rows):
    return [(row["_step"], key, value) for row in rows for key, value in row.items() if not key.startswith("_")]


def assert_each_once(events, numbers):
    assert sorted((step, name) for step, name, _ in events) == sorted(numbers)
    for step, name, value in events:
        assert value == pytest.approx(numbers[step, name], rel=1e-6), (step, name)


def assert_same_weights(left, right):
    ours, theirs = (load_file(path / "model" / "open_clip_model.safetensors") for path in (left, right))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensorboard_holds_every_number_of_the_metrics_and_changes_no_weight(tmp_path):
    run(tmp_path / "run", logger="tensorboard")
    numbers = expected(tmp_path / "run")
    names = {name for _, name in numbers}
    assert {"train/total", "train/forget", "train/learning_rate", "validation/forget", "validation/retain"} <= names
    assert_each_once(tensorboard_events(tmp_path / "run"), numbers)
    run(tmp_path / "plain")
    assert_same_weights(tmp_path / "run", tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_wandb_offline_holds_every_number_of_the_metrics_and_the_settings(tmp_path):
    import wandb

    run(tmp_path / "run", logger="wandb")
    [(name, code, rows)] = wandb_runs(tmp_path / "run")
    assert name == (tmp_path / "run" / "wandb" / "run-id.txt").read_text().strip() and code == 0
    assert_each_once(wandb_events(rows), expected(tmp_path / "run"))
    assert wandb.run is None, "no run of the caller's is made or replaced"
    run(tmp_path / "plain")
    assert_same_weights(tmp_path / "run", tmp_path / "plain")


def test_a_resumed_run_goes_on_in_tensorboard_with_each_step_once(tmp_path):
    with interrupted_after(5):
        run(tmp_path, logger="tensorboard")
    assert (5, "train/total") in {event[:2] for event in tensorboard_events(tmp_path)}, "flushed before the kill"
    run(tmp_path, logger="tensorboard", resume=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert_each_once(tensorboard_events(tmp_path), expected(tmp_path))


def test_a_resumed_run_goes_on_in_wandb_under_the_same_id(tmp_path):
    with interrupted_after(5):
        run(tmp_path, logger="wandb")
    time.sleep(1)  # wandb names the folder of a start by the second
    run(tmp_path, logger="wandb", resume=True)
    (first, failed, before), (second, code, after) = wandb_runs(tmp_path)
    assert first == second and (failed, code) == (1, 0)
    assert [row["_step"] for row in before] == [1, 2, 3, 4, 5]
    numbers = expected(tmp_path)
    assert [row["_step"] for row in after] == list(range(5, max(step for step, _ in numbers) + 1))
    both = {event[:2]: event[2] for event in wandb_events(before) + wandb_events(after)}
    assert both.keys() == numbers.keys(), "what is sent twice has the same step, and the server keeps one"


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_chosen_at_resume_gets_the_earlier_steps_too(tmp_path, logger):
    with interrupted_after(5):
        run(tmp_path)
    run(tmp_path, logger=logger, resume=True)
    events = tensorboard_events(tmp_path) if logger == "tensorboard" else wandb_events(wandb_runs(tmp_path)[0][2])
    assert_each_once(events, expected(tmp_path))


@pytest.mark.parametrize("fails", ["__init__", "log", "close"])
def test_a_logger_that_fails_is_a_warning_and_costs_nothing_else(tmp_path, monkeypatch, fails):
    def broken(self, *_, **__):
        raise OSError("the server is gone\nand more")

    monkeypatch.setattr(loggers.TensorBoardLogger, fails, broken)
    with pytest.warns(UserWarning) as caught:
        result = run(tmp_path, logger="tensorboard")
    said = [str(warning.message) for warning in caught if "logger=" in str(warning.message)]
    assert len(said) == 1, said
    assert "'tensorboard' failed (the server is gone) and is off" in said[0]
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and list((tmp_path / "checkpoints").glob("step-*"))


def test_metrics_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers.JsonlLogger, "log", full)
    with pytest.raises(UnlearningError, match=r"No space left on device.*resume=True"):
        run(tmp_path)


@pytest.mark.parametrize("logger", loggers.LOGGERS)
def test_a_missing_package_is_an_error_before_anything_is_written(tmp_path, monkeypatch, logger):
    monkeypatch.setitem(sys.modules, logger, None)
    with pytest.raises(InputError, match=re.escape(f"logger={logger!r} needs {logger}")) as caught:
        run(tmp_path / "run", logger=logger)
    assert extras.install_hint(logger) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_logger_without_a_run_directory_is_an_error():
    with pytest.raises(InputError, match="logger='tensorboard' writes to the run directory: give output_dir"):
        run(None, logger="tensorboard")


def test_an_unknown_logger_is_an_error_that_offers_the_nearest():
    with pytest.raises(InputError, match=r"logger='tensorbord' is not one of .*; did you mean 'tensorboard'\?"):
        UnlearnConfig(logger="tensorbord")


def test_every_logger_is_a_choice_and_has_an_extra():
    assert list(config.LOGGERS) == ["none", *loggers.LOGGERS]
    assert all(extras.EXTRAS[name] for name in loggers.LOGGERS)
    assert all(Path(logger.folder).name == logger.folder for logger in loggers.LOGGERS.values())
