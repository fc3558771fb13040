"""Labels of the map are moved apart until none covers another."""

from __future__ import annotations

import numpy as np
import pytest

from cliperase_fast.report.drawing import move_apart

ROOM = (430.0, 370.0)


def covered(centres: np.ndarray, sizes: np.ndarray) -> int:
    pairs = [(a, b) for a in range(len(centres)) for b in range(a + 1, len(centres))]
    return sum(bool((np.abs(centres[a] - centres[b]) < (sizes[a] + sizes[b]) / 2).all()) for a, b in pairs)


@pytest.mark.parametrize("spread", [0.0, 5.0, 60.0])
@pytest.mark.parametrize("count", [2, 10, 20])
def test_boxes_are_moved_until_none_overlap_and_all_are_inside(count, spread):
    rng = np.random.default_rng(count)
    centres = np.array(ROOM) / 2 + spread * rng.normal(size=(count, 2))
    sizes = np.stack([rng.uniform(10, 90, count), np.full(count, 15.0)], 1)
    assert covered(centres, sizes) or spread == 60.0
    placed = move_apart(centres, sizes, ROOM)
    assert not covered(placed, sizes)
    assert (placed >= sizes / 2 - 1).all() and (placed <= np.array(ROOM) - sizes / 2 + 1).all()
    assert np.array_equal(placed, move_apart(centres, sizes, ROOM))


def test_boxes_that_do_not_overlap_stay_in_place():
    centres, sizes = np.array([[50.0, 50.0], [200.0, 50.0], [50.0, 80.0]]), np.full((3, 2), 20.0)
    assert np.array_equal(move_apart(centres, sizes, ROOM), centres)


def test_more_boxes_than_fit_are_still_placed():
    placed = move_apart(np.zeros((8, 2)), np.full((8, 2), 30.0), (40.0, 40.0))
    assert placed.shape == (8, 2) and np.isfinite(placed).all()
