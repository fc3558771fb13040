"""Where names stand on a map, so that each can be read."""

from __future__ import annotations

import numpy as np

_PASSES = 300  # two names need one, a crowd some dozens


def moved_apart(centres: np.ndarray, sizes: np.ndarray, room: tuple[float, float]) -> np.ndarray:
    """Centres [n, 2] of boxes of `sizes` [n, 2], moved as little as it takes until no box covers another's.

    All stay inside (0, 0) to `room`, as far as they fit there. Equal input gives equal output.
    """
    placed = np.array(centres, dtype=np.float64)
    least, most = sizes / 2, np.asarray(room) - sizes / 2
    for _ in range(_PASSES):
        placed = np.clip(placed, np.minimum(least, most), np.maximum(least, most))
        covers = False
        for one in range(len(placed)):
            for other in range(one + 1, len(placed)):
                gap = placed[other] - placed[one]
                covered = (sizes[one] + sizes[other]) / 2 - np.abs(gap)
                if (covered > 0).all():
                    covers = True
                    axis = 0 if covered[0] < covered[1] else 1  # the shorter way out
                    push = (covered[axis] / 2 + 0.05) * (1.0 if gap[axis] >= 0 else -1.0)
                    placed[one, axis] -= push
                    placed[other, axis] += push
        if not covers:
            break
    return placed
