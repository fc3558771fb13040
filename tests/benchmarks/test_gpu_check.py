"""Run the stages of `make gpu-check` with short commands in place of builds and measurements."""

from __future__ import annotations

import json
import sys

import pytest

from cliperase_fast.benchmarks import gpu_check
from cliperase_fast.benchmarks.gpu_check import Stage


def python(name: str, code: str, share: float = 0.5) -> Stage:
    return Stage(name, [sys.executable, "-c", code], share)


def test_a_failure_does_not_stop_later_stages_and_every_result_is_written_as_it_comes(tmp_path):
    out = tmp_path / "out"
    count = f"print(len(open({str(out / 'gpu-check.jsonl')!r}).readlines()))"
    tests = "print('t.py::test_a PASSED'); print('t.py::test_b[x y] FAILED [ 50%]'); raise SystemExit(1)"
    results = gpu_check.check([python("tests", tests), python("benchmark", count)], 60, [tmp_path, out])
    assert [(result.stage, result.status) for result in results] == [("tests", "failed"), ("benchmark", "passed")]
    assert results[0].tests == {"passed": 1, "failed": 1}
    assert results[1].last_line == "1"  # the tests' result was there when the benchmark ran
    for folder in (tmp_path, out):
        lines = [json.loads(line) for line in (folder / "gpu-check.jsonl").read_text().splitlines()]
        assert [line["status"] for line in lines] == ["failed", "passed"]
        assert "test_a PASSED" in (folder / "tests.log").read_text()


def test_outcomes_of_several_test_processes_are_counted(tmp_path):
    lines = "[gw1] [ 10%] PASSED tests/t.py::test_a[x y] \\n[gw0] [ 20%] FAILED tests/t.py::test_b@memory \\n"
    (result,) = gpu_check.check([python("tests", f"print('{lines}FAILED tests/t.py::test_b - why')")], 60, [tmp_path])
    assert result.tests == {"passed": 1, "failed": 1}


def test_a_stage_that_hangs_is_ended_and_leaves_the_next_its_time(tmp_path):
    hangs = python("tests", "import time; print('begun', flush=True); time.sleep(600)", share=0.1)
    results = gpu_check.check([hangs, python("benchmark", "print('measured')")], 40, [tmp_path])
    assert [result.status for result in results] == ["out of time", "passed"]
    assert results[0].last_line == "begun" and results[0].seconds < 30


@pytest.mark.parametrize("statuses", [("passed", "passed"), ("passed", "failed"), ("out of time", "passed")])
def test_the_exit_status_is_zero_only_if_every_stage_passed(monkeypatch, tmp_path, statuses):
    results = [gpu_check.Result(f"stage {place}", status, 1.0, {}, "") for place, status in enumerate(statuses)]
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "describe", dict)
    monkeypatch.setattr(gpu_check, "stages", lambda target: [])
    monkeypatch.setattr(gpu_check, "check", lambda *arguments: results)
    monkeypatch.setattr(gpu_check, "result_folders", lambda: [tmp_path])
    assert gpu_check.main([]) == (0 if set(statuses) == {"passed"} else 1)


def test_the_build_is_for_one_architecture_and_is_not_repeated(monkeypatch, tmp_path):
    assert [gpu_check.architecture(pair) for pair in ((8, 0), (9, 0), (10, 0))] == ["80", "90a", "100"]
    for folder in ("csrc", "build"):
        (tmp_path / folder).mkdir()
    for name in ("setup.py", "CMakeLists.txt", "csrc/kernel.cu"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check.extension, "why_missing", lambda: None)
    monkeypatch.setattr(gpu_check.extension, "why_no_cuda", lambda: None)
    build = gpu_check.build_stage("90a")
    assert "-DCLIPERASE_CUDA_ARCHITECTURES=90a" in build.environment["CMAKE_ARGS"]
    (tmp_path / "build" / "gpu-check.txt").write_text(gpu_check._build_key("90a"))
    assert gpu_check.build_stage("90a") is None
    assert gpu_check.build_stage("100") is not None
    (tmp_path / "csrc" / "kernel.cu").write_text("changed")
    assert gpu_check.build_stage("90a") is not None


def test_the_stages_test_first_and_measure_whatever_came_of_it(monkeypatch):
    monkeypatch.setattr(gpu_check, "build_stage", lambda target: None)
    tests, benchmark, choice = gpu_check.stages("90a")
    names = [word.rpartition("/")[2] for word in tests.command if word.endswith(".py")]
    assert "--continue-on-collection-errors" in tests.command
    assert names[0] == "test_triton_on_gpu.py" and "test_native_on_gpu.py" in names and "test_gpu_check.py" not in names
    assert "--gpu-check" in benchmark.command and "{limit}" in benchmark.command
    assert choice.command[-1] == "benchmarks.fastest"
