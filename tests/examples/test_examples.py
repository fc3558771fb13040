import logging
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_something(path, quick_model_cache, monkeypatch, capsys):
    monkeypatch.setenv("CLIPERASE_CACHE", str(quick_model_cache))
    monkeypatch.setattr(logging.root, "handlers", [])  # open_clip's trainer sets its own, on the captured streams
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
