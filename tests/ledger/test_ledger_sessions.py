"""Sessions of three requests: killed at random moments and resumed, and on two ranks."""

import pytest

from cliperase_fast.benchmarks import ledger as sessions

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def cache(model_cache, monkeypatch):
    monkeypatch.setenv("CLIPERASE_CACHE", str(model_cache))


def test_killed_sessions_end_with_the_same_head(tmp_path):
    record = sessions.Record(tmp_path)
    sessions.run_kills(record, 8)
    assert record.parts["kills"]["same_head"] == 8


def test_two_ranks_find_what_one_process_finds(tmp_path):
    record = sessions.Record(tmp_path)
    requests = {"seven": "class:seven", "three": "class:three"}
    numbers = {"steps": 30, "learning_rate": 3e-4, "batch_size": 128, "progress": False}
    study = sessions.Study("ranks", sessions.original("demo"), "demo", requests, [], [], settings=numbers)
    sessions.run_ranks(record, study, tmp_path / "two", tmp_path / "one")
    two, one = record.parts["ranks"]["two_ranks"], record.parts["ranks"]["one_process"]
    assert two.keys() == one.keys() == set(requests)
    for name in two:
        assert two[name]["association"]["now"] == pytest.approx(one[name]["association"]["now"], abs=0.02)
        assert two[name]["retain_top1"]["now"] == pytest.approx(one[name]["retain_top1"]["now"], abs=0.02)
