"""Tests of `cliperase-fast bench memory` and `scaling`: separate processes, named skips, fitted growth."""

from __future__ import annotations

import json

import pytest

from cliperase_fast.benchmarks import memory, points_report, scaling
from cliperase_fast.benchmarks.batches import Case
from cliperase_fast.benchmarks.compare import comparison
from cliperase_fast.benchmarks.loss_memory import timed_steps
from cliperase_fast.benchmarks.points import Points
from cliperase_fast.benchmarks.providers import Provider, every_provider
from cliperase_fast.benchmarks.timing import Times, timed

CASE = Case("cliperase", "peaked", "float32", 512, 16)


def test_scaling_measures_memory_and_time_in_separate_processes_and_names_skips(tmp_path, capsys):
    path = tmp_path / "mine.json"
    words = ["--sizes", "1536", "--widths", "16", "--seconds", "0.01", "--json", str(path), "--device", "cpu"]
    words += ["--repeats", "1"]
    assert scaling.main([*words, "--providers", "ours-native-keep-nothing,open_clip-style,siglip-kernel"]) == 0
    record = json.loads(path.read_text())
    assert record["keep_mib"] > 0 and record["machine"]["native"] and record["machine"]["torch_cpu"]
    rows = {row["provider"]: row for row in record["runs"]}
    small, large = (rows[name]["extra_bytes"] / 2**20 for name in ("ours-native-keep-nothing", "open_clip-style"))
    assert large > 4 * 9 > 2 * small  # several matrices of 9 MiB, and a strip of one with what is packed for it
    assert all(rows[name]["both_ms"]["median"] > 0 for name in ("ours-native-keep-nothing", "open_clip-style"))
    shown, told = capsys.readouterr()
    assert f"keep budget {record['keep_mib']:,} MiB (CLIPERASE_KEEP_MIB)" in shown
    assert f"scaling: the record goes to {path}" in told and "scaling: done in" in told
    assert "peak extra memory, MiB" in shown and "a step (forward and backward), ms" in shown
    assert "siglip-kernel: does not compute cliperase, only siglip" in shown
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {
        "time-cliperase-peaked-float32-16.png", "memory-cliperase-peaked-float32-16.png",
    }  # fmt: skip


def test_a_wrong_provider_gets_no_figure_and_a_step_beyond_the_cap_is_not_tried():
    wrong = Provider("wrong", lambda case: lambda *fields: 2 * every_provider()["ours-eager"].make(case)(*fields))
    points = Points({"wrong": wrong, "slow": wrong}, "cpu", 1, 0.0, cap=10.0)
    points._step["slow", Case("cliperase", "peaked", "float32", 0, 16)] = 128, 1.0
    points.run(CASE, ["wrong", "slow"])
    first, second = points.rows
    assert first["status"] == "failed" and "off by" in first["reason"] and "extra_bytes" not in first
    assert second["reason"] == "a step would take about 16 s, judged by N = 128"


def test_growth_is_the_exponent_over_the_larger_sizes():
    points = [(n, 5e-7 * n**2 + (9.0 if n < 300 else 0.0)) for n in (64, 128, 256, 512, 1024, 2048)]
    slope, start = points_report.growth(points)
    assert slope == pytest.approx(2.0) and start == 512
    assert points_report.growth(points[:2]) is None


def test_memory_has_no_times(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "cliperase_fast.benchmarks.points.measured_apart",
        lambda *a: {"extra_bytes": 1 << 20, **timed([Times(1.0, 0.0)])},
    )
    path = tmp_path / "m.json"
    words = ["--sizes", "64,128", "--widths", "16", "--providers", "ours-eager", "--json", str(path), "--no-plots"]
    assert memory.main([*words, "--device", "cpu"]) == 0
    assert all(row["extra_bytes"] == 1 << 20 and "both_ms" not in row for row in json.loads(path.read_text())["runs"])


def scripted(*seconds: float):
    """A step that takes these seconds, one after the other, then the last of them for ever."""
    left = list(seconds)
    return lambda: Times(left.pop(0) if len(left) > 1 else left[0], 0.0)


def test_the_step_after_the_memory_measurement_is_an_untimed_warm_up():
    samples = timed_steps(scripted(0.9, 0.25), seconds=0.1)
    assert {sample.forward for sample in samples} == {0.25} and len(samples) >= 3


def test_a_step_that_takes_long_is_timed_once():
    assert [sample.forward for sample in timed_steps(scripted(7.0), seconds=0.1)] == [7.0]


def measured_in_turn(monkeypatch, *medians: float) -> Points:
    left = list(medians)

    def measured(*_):
        return {"extra_bytes": 1 << 20, **timed([Times(left.pop(0) / 1e3, 0.0)] * 3)}

    monkeypatch.setattr("cliperase_fast.benchmarks.points.measured_apart", measured)
    points = Points(every_provider(), "cpu", 1, 0.1, cap=10.0, repeats=len(medians))
    points.run(CASE, ["ours-eager"])
    return points


def test_a_point_is_the_median_of_its_processes_and_shows_their_spread(monkeypatch, capsys):
    (row,) = measured_in_turn(monkeypatch, 100.0, 160.0, 110.0).rows
    assert row["both_ms"]["median"] == pytest.approx(110.0) and row["both_ms"]["samples"] == 9
    assert row["both_ms"]["runs"] == pytest.approx([100.0, 160.0, 110.0])
    assert "110.0 ms a step (100.0 to 160.0 in 3 runs)" in capsys.readouterr().err


def test_changes_within_the_noise_of_repeated_runs_are_not_called_slower(monkeypatch):
    def words(before, after):
        records = [{"benchmark": "scaling", "runs": measured_in_turn(monkeypatch, *of).rows} for of in (before, after)]
        return {line[2]: line[-1] for line in comparison(*records)[1]}["both_ms"]

    assert words((100, 160, 110), (150, 130, 140)) == "same"
    assert words((100, 101, 102), (110, 111, 112)) == "slower"
    assert words((100, 101, 102), (102, 103, 104)) == "same"


def test_a_time_with_one_sample_gets_no_verdict(monkeypatch):
    monkeypatch.setattr(
        "cliperase_fast.benchmarks.points.measured_apart",
        lambda *_: {"extra_bytes": 1 << 20, **timed([Times(next(seconds), 0.0)])},
    )
    seconds = iter((1.0, 9.0))
    records = []
    for _ in range(2):
        points = Points(every_provider(), "cpu", 1, 0.1, cap=10.0)
        points.run(CASE, ["ours-eager"])
        records.append({"benchmark": "scaling", "runs": points.rows})
    lines = {line[2]: line for line in comparison(*records)[1]}
    assert lines["both_ms"][-2:] == ("not known", "measured once")
