"""What gradient caching is for: a large batch of the demo model in little memory."""

from __future__ import annotations

import pytest

from benchmarks import grad_cache
from benchmarks.write_docs import load


def test_a_batch_in_chunks_takes_much_less_memory_and_has_the_same_gradient():
    at_once, chunked = grad_cache.measured_apart(2048, 0), grad_cache.measured_apart(2048, 64)
    assert at_once["peak_bytes"] - chunked["peak_bytes"] > 500 << 20  # the activations of the other 1984 pairs
    for name in ("total", "grad_norm"):
        assert chunked[name] == pytest.approx(at_once[name], rel=1e-4)


def test_the_committed_run_of_65536_pairs_stayed_under_4_gib():
    runs = {(run["batch"], run["chunk"]): run for run in load("grad-cache")["runs"]}
    assert runs.keys() == set(grad_cache.CASES)
    assert all(run["peak_bytes"] < 4 << 30 for (batch, _), run in runs.items() if batch == 65_536)
