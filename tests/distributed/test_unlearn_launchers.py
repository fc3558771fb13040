"""`unlearn()` on 2 and 4 ranks at every ZeRO stage, and under launchers that see ranks killed: `make long-check`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from runs import run_here, run_kind, run_on_digits
from test_unlearn_on_ranks import alone, assert_same_run

pytestmark = pytest.mark.long
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("deepspeed", ["", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_every_stage_follows_one_process(request, ranks, deepspeed, chunk):
    changes = {"grad_cache_chunk": chunk, "accumulate": 2, "grad_clip": 1.0, "teacher_cache": "off"}
    for found in request.getfixturevalue(ranks).run(run_here, {**changes, "deepspeed": deepspeed}):
        assert_same_run(found, alone(**changes))


def assert_same_curve(found, one):
    assert np.allclose(found["losses"], one["losses"], atol=1e-4)
    assert np.allclose(found["norms"], one["norms"], rtol=1e-3)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("kind", ["custom_text", "resnet", "timm", "transformers", "generic"])
def test_models_of_every_kind_are_sharded_by_stage_3(two, kind, chunk):
    changes = {"grad_cache_chunk": chunk, "teacher_cache": "off"}
    for found in two.run(run_kind, kind, {**changes, "deepspeed": "zero3"}):
        assert_same_curve(found, run_kind(0, kind, changes))


@pytest.mark.parametrize("trainable", ["text", "last:1", "lora"])
@pytest.mark.parametrize("deepspeed", ["", "zero2", "zero3"])
def test_what_is_frozen_stays_so(two, deepspeed, trainable):
    for found in two.run(run_here, {"trainable": trainable, "deepspeed": deepspeed}):
        assert_same_run(found, alone(trainable=trainable))


@cache
def digits_alone(model_cache):
    return run_on_digits(0, model_cache, "")


@pytest.mark.parametrize("deepspeed", ["", "zero1", "zero2", "zero3"])
def test_the_demos_digit_is_forgotten_alike(two, model_cache, deepspeed):
    one = digits_alone(model_cache)
    for found in two.run(run_on_digits, model_cache, deepspeed):
        assert np.allclose(found["losses"], one["losses"], rtol=0, atol=1e-4)
        for part in ("forget", "retain"):
            assert found["scores"][part] == pytest.approx(one["scores"][part], abs=1e-4)
            assert found["scores"][part]["zero_shot_top1"] == one["scores"][part]["zero_shot_top1"]


def start(launcher, output, reads, **changes):
    """A run under a launcher, whose rank 1 is killed at first after so many images."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(HERE)!r}); from runs import run_fatally; "
        "first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0' and os.environ['RANK'] == '1'; "
        f"run_fatally({str(output)!r}, {reads} if first else None, resume=True, checkpoint_every=1, **{changes!r})"
    )
    script = output.parent / "script.py"
    script.write_text(code)
    words = [str(BIN / launcher[0]), *launcher[1:], str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def ends_like_one_process(output):
    record = json.loads((output / "result.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [
        [line[name] for name in ("total", "retain", "forget", "consistency")] for line in lines if "total" in line
    ]
    assert np.allclose(losses, alone()["losses"], rtol=0, atol=1e-4)
    for part in ("forget", "retain"):
        assert record["after"][part]["zero_shot_top1"] == alone()["scores"][part]["zero_shot_top1"]


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
def test_torchrun_restarts_a_run_whose_rank_was_killed(tmp_path, deepspeed):
    launcher = ("torchrun", "--nproc_per_node", "2", "--max-restarts", "1")
    process = start(launcher, tmp_path / "run", 40, deepspeed=deepspeed)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "exitcode: -9" in told or "SIGKILL" in told or "Signal 9" in told, told
    ends_like_one_process(tmp_path / "run")


def test_the_deepspeed_launcher_runs_it_and_another_number_of_ranks_goes_on(tmp_path):
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", "29611", "--no_local_rank")
    process = start(launcher, tmp_path / "run", 40, deepspeed="zero2")
    _, told = process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "run" / "result.json").exists()
    launcher = ("torchrun", "--nproc_per_node", "3")
    process = start(launcher, tmp_path / "run", None)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    ends_like_one_process(tmp_path / "run")


def test_a_rank_that_merely_stops_answering_is_lost_after_the_timeout(tmp_path):
    process = start(("torchrun", "--nproc_per_node", "2"), tmp_path / "run", None, rank_timeout=8.0, epochs=2000)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGSTOP)
    began = time.monotonic()
    while "UnlearningError: " not in (line := process.stderr.readline()):
        assert line and time.monotonic() - began < 60
    assert "no longer hears from another" in line and "rank_timeout=8 seconds" in line
    os.kill(int(children[1]), signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode != 0
