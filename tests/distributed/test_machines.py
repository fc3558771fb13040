"""`unlearn()` across two hosts with a slow wire that loses packets, one cut off or killed: `make long-check`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from hosts import ADDRESSES, WIRE, Hosts
from test_unlearn_launchers import HERE, ends_like_one_process

REASON = hosts.why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(REASON), reason=REASON)]
TIMEOUT = 15.0  # seconds, the setting rank_timeout


def start(wire: Hosts, output: Path, **changes) -> list[subprocess.Popen]:
    """One run with a rank on each host, under torchrun."""
    script = output.parent / "script.py"
    settings = {"checkpoint_every": 1, "resume": True, "rank_timeout": TIMEOUT, **changes}
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r}); from runs import run_fatally; "
        f"run_fatally({str(output)!r}, None, **{settings!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": WIRE}
    return [
        wire.start(
            host,
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
             str(host), "--local_addr", ADDRESSES[host], "--rdzv_backend", "c10d", "--rdzv_endpoint",
             f"{ADDRESSES[0]}:29555", "--rdzv_conf", "is_host=" + str(host == 0), str(script)],
            env=environment,
            stderr=(output.parent / f"errors-{host}").open("w"),
        )
        for host in range(2)
    ]  # fmt: skip


def ends_well(processes: list[subprocess.Popen], output: Path) -> None:
    for host, process in enumerate(processes):
        assert process.wait(500) == 0, (output.parent / f"errors-{host}").read_text()
    ends_like_one_process(output)


def has_steps(processes: list[subprocess.Popen], output: Path, count: int) -> None:
    """Wait until the run has done so many steps."""
    log = output / "metrics.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= count):
        assert all(process.poll() is None for process in processes), (output.parent / "errors-0").read_text()
        time.sleep(0.02)


def error_of(host: int, output: Path, seconds: float) -> str:
    """Wait for the host's UnlearningError, at most so long."""
    began = time.monotonic()
    while "UnlearningError: " not in (told := (output.parent / f"errors-{host}").read_text()):
        assert time.monotonic() - began < seconds, told
        time.sleep(0.1)
    return told.partition("UnlearningError: ")[2].partition("\n")[0]


@pytest.mark.parametrize("deepspeed", ["", "zero1", "zero2", "zero3"])
def test_two_hosts_with_a_slow_and_lossy_wire_follow_one_process(tmp_path, deepspeed):
    with Hosts(delay=0.003, loss=0.005) as wire:
        ends_well(start(wire, tmp_path / "run", deepspeed=deepspeed), tmp_path / "run")


@pytest.mark.parametrize("deepspeed", ["", "zero3"])
@pytest.mark.parametrize("lost", ["cut off", "killed"])
def test_a_host_that_is_lost_is_an_error_in_time_and_the_run_resumes(tmp_path, lost, deepspeed):
    output = tmp_path / "run"
    with Hosts(delay=0.003) as wire:
        processes = start(wire, output, deepspeed=deepspeed)
        has_steps(processes, output, 4)
        if lost == "cut off":
            wire.is_cut = True
        else:
            wire.kill(processes[1])
        told = error_of(0, output, TIMEOUT + 30)
        assert "rank 0 of 2 lost contact with another" in told and "start again with resume" in told
        assert not (output / "result.json").exists()
    with Hosts(delay=0.003) as wire:
        ends_well(start(wire, output, deepspeed=deepspeed), output)
