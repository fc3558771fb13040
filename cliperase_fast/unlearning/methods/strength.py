"""Search for the strength of an edit by evaluations on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable

from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate

EVALUATIONS = 10  # of a search


def search_strength(
    evaluate: Callable[[float], Candidate],
    wants_more: Callable[[Candidate], bool],
    *,
    first: float = 1.0,
    most: float = math.inf,
    evaluations: int = EVALUATIONS,
) -> None:
    """Evaluate strengths: the first one, doubled for as long as more is wanted, then bisected where that changed.

    evaluate: applies a strength to the original weights and scores the student. wants_more: whether a larger strength
    would be better than that of the candidate. most: the largest strength; the search ends if even that is not enough.
    """
    low, high, strength = 0.0, math.inf, first
    for _ in range(evaluations):
        if not wants_more(evaluate(strength)):
            high = strength
        elif strength == most:
            return
        else:
            low = strength
        strength = min(2 * strength, most) if high == math.inf else (low + high) / 2


def forgets_too_little(run: Run) -> Callable[[Candidate], bool]:
    """Return whether a candidate keeps the rest and still knows some of the forget pairs.

    It knows some until it is at the target, or, in a run that has none, until its forget score is 0.
    """

    def too_little(candidate: Candidate) -> bool:
        done = candidate.forget <= 0 if run.target is None else run.target.reached(candidate)
        return run.selection.within(candidate) and not done

    return too_little
