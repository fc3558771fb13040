"""The record of the ledger's benchmark, and its text in the docs."""

import json

from cliperase_fast.benchmarks import ledger, ledger_report


def audit(now, pairs=20, at_target=True):
    return {
        "association": {"base": 0.9, "now": 0.01}, "forget_top1": {"base": 1.0, "now": now},
        "retain_top1": {"base": 0.97, "now": 0.96}, "background": -0.03, "forget_pairs": pairs, "at_target": at_target,
    }  # fmt: skip


def shapes(**undone):
    delta = {"forms": {"add": 3}, "bytes": 2**20, "whole_bytes": 2**22, "tolerance": 1e-4}
    undo = {
        name: {"undone": name, "how": "merge", "concept": audit(now, pairs), "others": {"stars": audit(0.0)}}
        for name, (now, pairs) in undone.items()
    }
    return {
        "requests": {"red": {"delta": delta, "audits": {"red": audit(0.0)}}}, "undo": undo,
        "after": {"at_target": ["red"], "retain_change": -0.01, "within_floor": True},
        "pooled": {"merge": ledger._pooled(undo.values(), "merge")},
    }  # fmt: skip


def test_undone_concepts_are_pooled_by_their_images():
    found = shapes(red=(0.5, 20), stars=(1.0, 180))["pooled"]["merge"]
    assert found == {"images": 200, "base": 1.0, "now": 0.95, "within": False}
    assert shapes(red=(0.99, 20))["pooled"]["merge"]["within"]


def test_a_record_is_continued(tmp_path):
    ledger.Record(tmp_path).set("kills", {"kills": 3})
    record = ledger.Record(tmp_path)
    record.set("shapes", {"requests": {}})
    parts = json.loads((tmp_path / "ledger.json").read_text())["parts"]
    assert parts.keys() == {"kills", "shapes"} and parts["shapes"]["command"] == "python -m benchmarks.ledger shapes"


def test_the_text_tells_what_was_measured():
    kills = {"kills": 50, "same_head": 49, "too_late": 2}
    ranks = {
        "ranks": 2,
        "same_weights": [],
        "two_ranks": {"seven": audit(0.0)},
        "one_process": {"seven": audit(0.1)},
    }
    parts = ledger_report.section({"shapes": shapes(red=(0.99, 20)), "kills": kills, "ranks": ranks})
    texts = " ".join(part for part in parts if isinstance(part, str))
    assert "1 of 1 are at the target" in texts and "-1.0 points at worst, within the floor" in texts
    assert "pooled over 20 test images: 100.0 % in the base, 99.0 % after undoing, a change of -1.0" in texts
    assert "49 of 50" in texts and "a row, after the last one" in texts and "as in one process: none" in texts
    assert all(len(row) == len(part[0]) for part in parts if isinstance(part, tuple) for row in part[1])
    assert ledger_report.section({}) == [ledger_report.NOT_MEASURED]
