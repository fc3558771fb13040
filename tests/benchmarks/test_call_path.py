"""One loss call stays within few files, so that a reader can follow it."""

from __future__ import annotations

import pytest

from cliperase_fast import config, terms
from cliperase_fast.benchmarks.call_path import call_path, of_backend
from cliperase_fast.ops import backends


def test_the_torch_backend_is_read_in_five_files() -> None:
    files, switches = of_backend("torch")
    assert files[0] == "functional.py"
    assert len(files) <= 5
    assert switches <= 15


@pytest.mark.skipif(not backends()["native"].available, reason=backends()["native"].reason)
def test_the_native_backend_is_read_in_six_files() -> None:
    assert len(of_backend("native")[0]) <= 6


def test_entries_and_switches_are_counted() -> None:
    files, switches = call_path(lambda: (terms.nearest_name("retian", ["retain"]), config.UnlearnConfig.paper("cc12m")))
    assert files[:2] == ["terms.py", "config.py"]
    assert call_path(lambda: terms.nearest_name("retian", ["retain"])) == (["terms.py"], 1)
    assert switches >= 2
