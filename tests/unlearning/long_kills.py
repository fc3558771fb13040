"""A run is killed between any two of its file operations, and goes on from each to the same bits: `make long-check`."""

from test_run_directory import CRASHING, assert_same_run, crashes_of, go_on_from


def test_a_run_goes_on_from_every_state_that_a_kill_can_leave(tmp_path, monkeypatch):
    for state in crashes_of(tmp_path, monkeypatch, **CRASHING):
        go_on_from(state)
        assert_same_run(state, tmp_path / "run")
