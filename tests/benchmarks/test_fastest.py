"""Tests of the table of fastest GPU backends that "auto" reads."""

from __future__ import annotations

import json

import pytest

from cliperase_fast.benchmarks import fastest
from cliperase_fast.ops import measured


def run(provider: str, ms: float, **changed: object) -> dict:
    case = {"loss": "cliperase", "data": "peaked", "dtype": "bfloat16", "n": 8192, "width": 768, "status": "ok"}
    return {**case, "provider": provider, "both_ms": {"median": ms}, **changed}


def record(*runs: dict, capability: str | None = "9.0") -> dict:
    return {"machine": {"gpu": "a GPU", "capability": capability}, "runs": list(runs)}


@pytest.mark.parametrize(("kept", "name"), [(True, "triton"), (False, "native")])
def test_backends_are_ranked_by_what_auto_keeps(kept, name):
    triton = run("ours-triton-keep-nothing", 5, auto=not kept), run("ours-triton-keep-similarities", 3, auto=kept)
    native = run("ours-native-keep-nothing", 4, auto=not kept), run("ours-native-keep-similarities", 6, auto=kept)
    others = run("ours-torch", 9), run("ours-auto", 1), run("open_clip", 0.5), run("floor", 0.1)
    assert fastest.table_of([record(*native, *triton, *others)]) == {"9.0": {"bfloat16": {"768": {"8192": name}}}}


def test_sizes_are_separate_and_records_are_merged():
    first = record(run("ours-native-keep-nothing", 4), run("ours-torch", 3, n=2048), run("ours-torch", 3, width=64))
    second = record(run("ours-triton-keep-nothing", 5), run("ours-eager", 3, dtype="float32"))
    other = record(run("ours-triton-keep-nothing", 5), capability="10.0")
    assert fastest.table_of([first, second, other]) == {
        "10.0": {"bfloat16": {"768": {"8192": "triton"}}},
        "9.0": {
            "bfloat16": {"64": {"8192": "torch"}, "768": {"2048": "torch", "8192": "native"}},
            "float32": {"768": {"8192": "eager"}},
        },
    }


def test_failures_other_losses_other_data_and_cpus_are_ignored():
    fast = run("ours-triton-keep-nothing", 1)
    excluded = [{**fast, **changed} for changed in ({"status": "failed"}, {"loss": "clip"}, {"data": "random"})]
    assert fastest.table_of([record(*excluded, run("ours-torch", 2)), record(fast, capability=None)]) == {
        "9.0": {"bfloat16": {"768": {"8192": "torch"}}}
    }


def test_the_table_is_written_as_it_is_read_and_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fastest, "RESULTS", tmp_path)
    monkeypatch.setattr(measured, "PATH", tmp_path / "measured.json")
    (tmp_path / "loss-a-gpu.json").write_text(json.dumps(record(run("ours-torch", 2), run("ours-native", 3))))
    assert fastest.main([]) == 0
    assert "9.0                 bfloat16  768  8192  torch" in capsys.readouterr().out
    assert measured.read(measured.PATH) == {"9.0": {"bfloat16": {768: {8192: "torch"}}}}
    assert fastest.main(["--check"]) == 0
    (tmp_path / "loss-a-gpu.json").write_text(json.dumps(record(run("ours-native", 1))))
    assert fastest.main(["--check"]) == 1


def test_the_committed_table_follows_from_the_committed_results():
    assert fastest.main(["--check"]) == 0
