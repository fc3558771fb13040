"""Tests of `make bench-check`: a drop of a ratio fails, noise does not."""

from __future__ import annotations

import json

import pytest

from cliperase_fast.benchmarks import check


@pytest.fixture
def committed(tmp_path):
    runs = [{"name": check.title(*one), "ratio": 2.0} for one in check.CASES]
    record = {"machine": {"processor": "another", "cores": 1}, "commit": "abc", "runs": runs}
    path = tmp_path / "check.json"
    path.write_text(json.dumps(record))
    return path


def outcome(monkeypatch, path, ratios) -> int:
    """Every case has these ratios, one a try."""
    tried: dict[str, int] = {}

    def ratio_of(case, name, settings):
        tried[check.title(case, name)] = number = tried.get(check.title(case, name), -1) + 1
        return ratios[number]

    monkeypatch.setattr(check, "ratio_of", ratio_of)
    monkeypatch.setattr(check.time, "sleep", lambda seconds: None)
    return check.main(["--against", str(path), "--tries", str(len(ratios))])


def test_within_the_allowance_or_in_a_later_try_passes(monkeypatch, committed, capsys):
    assert outcome(monkeypatch, committed, [(1.71, "")]) == 0
    assert outcome(monkeypatch, committed, [(0.5, ""), (1.0, ""), (1.9, "")]) == 0
    assert "FELL" not in capsys.readouterr().out


def test_a_drop_in_every_try_fails_and_is_named(monkeypatch, committed, capsys):
    assert outcome(monkeypatch, committed, [(1.2, ""), (1.5, "")]) == 1
    shown = capsys.readouterr().out
    assert "FELL by 25%, in the best of 2 tries; 15% is allowed" in shown
    assert f"{check.title(*check.CASES[0])}" in shown and "at commit abc" in shown
    assert "The committed ratios are of another, 1 cores" in shown


def test_a_provider_that_is_wrong_fails_at_once(monkeypatch, committed, capsys):
    assert outcome(monkeypatch, committed, [(None, "ours-auto: failed, loss is off"), (3.0, "")]) == 1
    assert "loss is off" in capsys.readouterr().out


def test_the_committed_ratios_are_of_the_cases_that_are_checked():
    record = json.loads(check.COMMITTED.read_text())
    assert [run["name"] for run in record["runs"]] == [check.title(*one) for one in check.CASES]
