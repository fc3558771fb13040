"""The automatic recipe on two ranks and with DeepSpeed tries and chooses what one process does."""

from __future__ import annotations

from functools import lru_cache

import pytest
from automatic_runs import run_automatic


@lru_cache
def alone():
    return run_automatic(0, {})


@pytest.mark.parametrize("changes", [{}, {"deepspeed": "zero1"}, {"deepspeed": "zero3"}], ids=str)
def test_ranks_try_and_choose_what_one_process_does(two, changes):
    first, second = two.run(run_automatic, changes)
    assert first == second
    expected = alone()
    assert first["recipe"]["learning_rate"] == expected["recipe"]["learning_rate"]
    assert len(first["recipe"]["probes"]) == len(expected["recipe"]["probes"]) >= 2
    for found, probe in zip(first["recipe"]["probes"], expected["recipe"]["probes"], strict=True):
        assert (found["rate"], found["steps"], found["reached"]) == (probe["rate"], probe["steps"], probe["reached"])
        assert found["association"] == pytest.approx(probe["association"], abs=0.02)
        assert found["divergence"] == pytest.approx(probe["divergence"], abs=0.01)
    assert first["losses"] == pytest.approx(expected["losses"], abs=0.05)
    assert first["selection"]["step"] == expected["selection"]["step"]
