"""Tests of the tournament of kernel variants: its bookkeeping, and a rehearsal of it in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from cliperase_fast.benchmarks import tournament, tournament_native
from cliperase_fast.benchmarks.tournament import Entry, Tournament
from cliperase_fast.ops import streaming
from cliperase_fast.ops.triton.configs import Config

ROOT = Path(__file__).parents[2]
LATER = time.monotonic() + 3600


def begin(tmp_path, *entries: Entry) -> Tournament:
    made = Tournament("cpu", (64,), 96, [tmp_path / "results.jsonl", tmp_path / "copy.jsonl"])
    made.entries = lambda: iter(entries)
    return made


def written(tmp_path) -> list[dict]:
    lines = (tmp_path / "results.jsonl").read_text()
    assert lines == (tmp_path / "copy.jsonl").read_text()
    return [row for row in map(json.loads, lines.splitlines()) if row["status"] != "begun"]


def test_results_are_written_as_they_come_and_a_second_run_goes_on(tmp_path):
    calls = []

    def entry(key: str) -> Entry:
        def run() -> dict:
            calls.append((key, [row["key"] for row in written(tmp_path)] if calls else []))
            return {"ms": 1.0}

        return Entry(key, run)

    assert not begin(tmp_path, entry("a")).run(time.monotonic() - 1)
    assert begin(tmp_path, entry("a"), entry("b")).run(LATER)
    assert begin(tmp_path, entry("a"), entry("b"), entry("c")).run(LATER)
    assert calls == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]


def test_a_failure_is_a_result_and_leaves_out_what_needs_it(tmp_path):
    def wrong() -> dict:
        raise ArithmeticError("off by 2")

    entries = (
        Entry("correct", wrong),
        Entry("timed", lambda: {"ms": 1.0}, "correct"),
        Entry("other", lambda: {"ms": 2.0}),
    )
    assert begin(tmp_path, *entries).run(LATER)
    assert [(row["key"], row["status"]) for row in written(tmp_path)] == [
        ("correct", "failed"), ("timed", "left out"), ("other", "passed"),
    ]  # fmt: skip
    assert written(tmp_path)[0]["reason"] == "ArithmeticError: off by 2"


def test_an_entry_that_has_ended_the_process_twice_is_not_tried_again(tmp_path):
    def fatal() -> dict:
        raise SystemExit

    for _ in range(2):
        with pytest.raises(SystemExit):
            begin(tmp_path, Entry("fatal", fatal), Entry("next", dict)).run(LATER)
    assert begin(tmp_path, Entry("fatal", fatal), Entry("next", dict)).run(LATER)
    assert [row["status"] for row in written(tmp_path)] == ["failed", "passed"]


def test_the_fastest_that_passed_is_the_best(tmp_path):
    made = begin(tmp_path)
    slow, fast = made.configs["forward"]
    for key, config, status, ms in (("forward", slow, "passed", 2.0), ("forward", fast, "passed", 1.0)):
        made.write({"key": f"{key} {tournament.name(config)}", "status": status, "ms": ms, "config": asdict(config)})
    broken = made.configs["backward"][1]
    made.write({"key": f"backward {tournament.name(broken)}", "status": "failed", "ms": 0.1, "config": asdict(broken)})
    best = made.best()
    assert best.forward == fast and best.backward == made.shipped.backward and isinstance(best.forward, Config)


def test_counters_are_those_of_the_first_launch_of_each_kernel(monkeypatch, tmp_path):
    tool = tmp_path / "ncu"
    rows = (("forward_kernel", "Duration", 7), ("backward_kernel", "Duration", 5), ("forward_kernel", "Duration", 9))
    lines = ["==PROF== Connected", '"Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += [f'"{kernel}","{metric}","ms","{value}"' for kernel, metric, value in rows]
    tool.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setattr(tournament.shutil, "which", lambda name: str(tool))
    found = tournament.counters(begin(tmp_path).shipped, 64, 96)["kernels"]
    assert found == {"forward_kernel": {"Duration [ms]": "7"}, "backward_kernel": {"Duration [ms]": "5"}}
    tool.write_text("#!/bin/sh\necho no permission\n")
    with pytest.raises(RuntimeError, match="no permission"):
        tournament.counters(begin(tmp_path).shipped, 64, 96)


def run_native(tmp_path, monkeypatch, **variants) -> dict[str, dict]:
    monkeypatch.setattr(tournament_native, "why_missing", lambda device: None)
    monkeypatch.setattr(tournament_native, "VARIANTS", variants)
    made = begin(tmp_path)
    made.entries = lambda: tournament_native.native_entries(made)
    assert made.run(LATER)
    return {row["key"]: row for row in written(tmp_path)}


class Graphed(tournament_native.GraphedKernels):
    """With the kernels of "torch", which run here."""

    def losses(self, *arguments):
        return streaming.kernels.losses(*arguments)

    def backward(self, *arguments):
        return streaming.kernels.backward(*arguments)


def shipped(name: str) -> streaming.TorchKernels:
    kernels = streaming.TorchKernels()
    kernels.name = name
    return kernels


def test_whole_sweeps_of_native_are_checked_and_timed_and_their_graphs_released(tmp_path, monkeypatch):
    cleared = []
    monkeypatch.setattr(Graphed, "clear", lambda self: cleared.append(self.name))
    found = run_native(tmp_path, monkeypatch, shipped=shipped, graphs=lambda name: Graphed(name=name))
    assert [(key, row["status"]) for key, row in found.items()] == [
        ("correct native shipped", "passed"), ("correct native graphs", "passed"),
        ("native sweep 64 shipped", "passed"), ("native sweep 64 graphs", "passed"),
        ("native sweep 64 shipped, kept", "passed"),
    ]  # fmt: skip
    assert found["correct native graphs"]["error"] < 1e-2 and len(set(cleared)) == 2
    for key, keep in (("native sweep 64 graphs", "nothing"), ("native sweep 64 shipped, kept", "similarities")):
        assert found[key]["ms"] > 0 and found[key]["forward_ms"] > 0 and found[key]["keep"] == keep


def test_native_is_left_out_with_the_reason_where_its_kernels_cannot_run(tmp_path, monkeypatch):
    made = begin(tmp_path)
    made.entries = lambda: tournament_native.native_entries(made)
    assert made.run(LATER)
    (row,) = written(tmp_path)
    assert row == {"key": "native", "status": "left out", "reason": "the CUDA kernels of native need a GPU"}
    monkeypatch.setattr(tournament_native.extension, "why_missing", lambda: "it is not built")
    assert tournament_native.why_missing("cuda") == "it is not built"


@pytest.mark.long
def test_the_whole_tournament_can_be_rehearsed_in_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "cliperase_fast.benchmarks.tournament", "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "tournament-cpu.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows if row["key"] != "native"} == {"begun", "passed"}
    assert [row["reason"] for row in rows if row["key"] == "native"] == ["the CUDA kernels of native need a GPU"]
    assert rows[-1]["key"] == "best" and rows[-1]["configs"]["forward"]["block_m"] == 32
