"""Progress of long work: bars on a terminal, lines in a log."""

import logging
import subprocess
import sys

import pytest
import tqdm.auto

from cliperase_fast import progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(progress, "_said", self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_long_work_has_a_line_now_and_then_with_what_is_left(clock, caplog):
    caplog.set_level(logging.INFO, "cliperase_fast")
    with progress.Steps(100, "unlearning", "step", bar=False) as steps:
        for number in range(100):
            clock.now += 1
            steps.update(note=f"loss {number}")
    assert [record.message for record in caplog.records] == [
        f"unlearning: step {done} of 100, loss {done - 1}, about {100 - done} s left" for done in range(15, 100, 15)
    ]


def test_short_work_has_no_line_of_its_own_and_many_short_ones_have_some(clock, caplog):
    caplog.set_level(logging.INFO, "cliperase_fast")
    for _ in range(30):
        with progress.Steps(1, "encoding", "image", bar=False) as steps:
            clock.now += 1
            steps.update()
    assert len(caplog.records) == 2


def test_where_a_bar_is_drawn_no_line_is_written(clock, caplog, capfd):
    caplog.set_level(logging.INFO, "cliperase_fast")
    with progress.Steps(3, "unlearning", "step", bar=True) as steps:
        for _ in range(3):
            clock.now += 100
            steps.update(note="loss 1")
    assert caplog.records == []
    assert "unlearning" in capfd.readouterr().err


class Closed:
    def isatty(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, object(), Closed()], ids=["none", "bare", "closed"])
def test_without_a_terminal_no_bars_are_shown_by_default(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert progress.bars_by_default() is False


def test_without_standard_error_a_bar_becomes_lines(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cliperase_fast")
    monkeypatch.setattr(sys, "stderr", None)
    with progress.Steps(3, "unlearning", "step", bar=True) as steps:
        for _ in range(3):
            clock.now += 100
            steps.update(note="loss 1")
    assert len(caplog.records) == 3


def test_a_notebook_with_ipywidgets_gets_its_own_bar():
    """tqdm.auto chooses at import; a plain tqdm would print each refresh as text."""
    with progress.Steps(3, "unlearning", "step", bar=True) as steps:
        assert isinstance(steps._bar, tqdm.auto.tqdm)


def test_the_library_is_silent_until_logging_is_set_up():
    code = """
import logging
from cliperase_fast import progress
progress.SECONDS = 0
progress.say("a")
steps = progress.Steps(2, "w", "u", bar=False)
steps.update()
logging.basicConfig(level=logging.INFO)
progress.say("b")
steps.update()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "INFO:cliperase_fast:b\nINFO:cliperase_fast:w: u 2 of 2\n")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (5999, "100 min"), (7200, "2.0 h")]
)
def test_durations_have_readable_units(seconds, words):
    assert progress.duration(seconds) == words
