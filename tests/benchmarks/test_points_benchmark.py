"""`cliperase-fast bench memory` and `scaling`: measured apart, what is skipped is named, and growth is fitted."""

from __future__ import annotations

import json

import pytest

from benchmarks import memory, points_report, scaling
from benchmarks.batches import Case
from benchmarks.points import Points
from benchmarks.providers import Provider, every_provider

CASE = Case("cliperase", "peaked", "float32", 512, 16)


def test_scaling_weighs_and_times_a_provider_apart_and_says_what_it_skipped(tmp_path, capsys):
    path = tmp_path / "mine.json"
    words = ["--sizes", "1536", "--widths", "16", "--seconds", "0.01", "--json", str(path), "--device", "cpu"]
    assert scaling.main([*words, "--providers", "ours-native-keep-nothing,open_clip-style,siglip-kernel"]) == 0
    rows = {row["provider"]: row for row in json.loads(path.read_text())["runs"]}
    small, large = (rows[name]["extra_bytes"] / 2**20 for name in ("ours-native-keep-nothing", "open_clip-style"))
    assert large > 4 * 9 > 2 * small  # several matrices of 9 MiB, and a strip of one with what is packed for it
    assert all(rows[name]["both_ms"]["median"] > 0 for name in ("ours-native-keep-nothing", "open_clip-style"))
    shown = capsys.readouterr().out
    assert "peak extra memory, MiB" in shown and "a step (forward and backward), ms" in shown
    assert "siglip-kernel: does not compute cliperase, only siglip" in shown
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {
        "time-cliperase-peaked-float32-16.png", "memory-cliperase-peaked-float32-16.png",
    }  # fmt: skip


def test_who_is_wrong_gets_no_figure_and_a_step_beyond_the_cap_is_not_tried():
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
        "benchmarks.points.measured_apart", lambda *a: {"extra_bytes": 1 << 20, "both_ms": {"median": 1}}
    )
    path = tmp_path / "m.json"
    words = ["--sizes", "64,128", "--widths", "16", "--providers", "ours-eager", "--json", str(path), "--no-plots"]
    assert memory.main([*words, "--device", "cpu"]) == 0
    assert all(row["extra_bytes"] == 1 << 20 and "both_ms" not in row for row in json.loads(path.read_text())["runs"])
