"""Test that gradient caching encodes a large batch of the demo model in little memory."""

from __future__ import annotations

import pytest
from processes import apart

from cliperase_fast.benchmarks.grad_cache import measure


def test_a_batch_in_chunks_uses_much_less_memory_and_has_the_same_gradient():
    at_once, chunked = apart(measure, 512, 0), apart(measure, 512, 64)
    # Half of the activations of the other 448 pairs: how much an allocator keeps varies.
    assert at_once["peak_bytes"] - chunked["peak_bytes"] > 80 << 20
    for name in ("total", "grad_norm"):
        assert chunked[name] == pytest.approx(at_once[name], rel=1e-4)
