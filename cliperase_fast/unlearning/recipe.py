"""The automatic recipe's decisions: which learning rate to try next, which to take, and when to stop.

All of them are functions of what was measured, so that a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from cliperase_fast.config import PROBE_STEPS
from cliperase_fast.unlearning.selection import Candidate, Target

EARLY = 10  # steps after which a hopeless probe stops
EVALUATE_STEPS = 10  # optimizer steps between two evaluations
MAX_STEPS = 1000  # optimizer steps of a run that chooses their number itself
EXPECTED_STEPS = 150  # of probes and training together, to judge what is worth computing in advance
DIVERGENCE = 0.1  # nats; above it a rate that does not reach the target is too high
STRENGTH = 1e-3  # the first rate as a share of a typical weight, as Adam moves every weight by about the rate
BUDGET, BUDGET_UNREACHED = 60, 90  # steps of other probes, once a rate reaches the target and before
PATIENCE = 3  # evaluations without an improvement at the target; twice as many before it
IMPROVEMENT, LEAST_IMPROVEMENT = 0.05, 1e-3  # relative, and in nats or of the gap: a smaller one does not count


@dataclass(frozen=True)
class Probe:
    """A short run at one rate from the original weights. The scores are of its last evaluation, on validation.

    progress: share of the way to the target. A score is None if it is not finite.
    """

    rate: float
    steps: int
    forget: float | None
    retain: float | None
    association: float | None
    divergence: float | None
    progress: float
    reached: bool
    stopped: str = ""  # why it ended early
    seconds: float = 0.0

    @property
    def index(self) -> int:
        """The rate's place on the grid, which has two rates a decade."""
        return round(2 * math.log10(self.rate))

    @property
    def diverged(self) -> float:
        return math.inf if self.divergence is None else self.divergence

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_rate(parameters: Iterable[nn.Parameter]) -> float:
    """Return the rate of the grid that is nearest to a thousandth of a typical weight.

    A typical weight is the median over the trained matrices of their root mean square.
    """
    sizes = [float(weight.detach().double().square().mean().sqrt()) for weight in parameters if weight.ndim >= 2]
    sizes = sorted(size for size in sizes if size > 0) or [1.0]
    return rate_at(round(2 * math.log10(STRENGTH * sizes[len(sizes) // 2])))


def rate_at(index: int) -> float:
    return float(f"{10 ** (index / 2):.6g}")


def early_end(candidate: Candidate, target: Target, before: Candidate) -> str:
    """Say why a probe should not go on after its first steps; empty if it should.

    Early on, forgetting grows at most with the square of the steps.
    """
    if candidate.diverged > 10 * DIVERGENCE:
        return "diverged"
    if progress(candidate, target, before) < (EARLY / PROBE_STEPS) ** 2:
        return "too slow"
    return ""


def progress(candidate: Candidate, target: Target, before: Candidate) -> float:
    """Return the share of the way from the original to the target, by association where it is above the target."""
    if before.forget_similarity > target.association:
        return (before.forget_similarity - candidate.forget_similarity) / (
            before.forget_similarity - target.association
        )
    whole = target.gap(before)
    return 1.0 if whole <= 0 else 1 - target.gap(candidate) / whole


def next_rate(probes: Sequence[Probe], first: float, most: int = BUDGET_UNREACHED) -> float | None:
    """Return the rate to try next, None if the search is over.

    Goes up from `first` while the target is not reached and the divergence allows, and down while it is reached.
    most: steps that other probes than the chosen one may take at most.
    """
    if not probes:
        return first
    tried = {probe.index: probe for probe in probes}
    reached = [index for index, probe in tried.items() if probe.reached]
    spent = sum(probe.steps for probe in probes) - PROBE_STEPS
    if spent + EARLY > min(most, BUDGET if reached else BUDGET_UNREACHED):
        return None
    if reached:
        low = min(reached)
        worse = low + 1 in reached and tried[low].diverged >= tried[low + 1].diverged
        found = None if worse or low - 1 in tried else low - 1
    else:
        found = _next_unreached(tried)
    return None if found is None else rate_at(found)


def _next_unreached(tried: dict[int, Probe]) -> int | None:
    """Return the place to try next while no rate reaches the target."""
    weak = [index for index, probe in tried.items() if probe.diverged <= DIVERGENCE]
    strong = [index for index in tried if index not in weak]
    if not strong:
        top = max(weak)
        return top + (2 if tried[top].progress < 0.01 else 1)
    low = min(strong)
    if not weak:
        return low - (2 if tried[low].diverged > 10 * DIVERGENCE else 1)
    middle = (max(weak) + low) // 2
    return None if middle in tried else middle


def choose(probes: Sequence[Probe]) -> tuple[Probe, str]:
    """Return the probe to go on from, and why."""
    reached = [probe for probe in probes if probe.reached]
    if reached:
        best = min(reached, key=lambda probe: (probe.diverged, probe.rate))
        return best, (
            f"it diverges least from the original ({best.diverged:.3f} nats) of the {len(reached)} rates that reach "
            f"the target within {best.steps} steps"
            if len(reached) > 1
            else f"it is the only rate that reaches the target within {best.steps} steps"
        )
    gentle = [probe for probe in probes if probe.diverged <= DIVERGENCE]
    none = "no rate reaches the target so soon"
    if gentle:
        best = max(gentle, key=lambda probe: probe.rate)
        return best, f"{none}, and it is the highest whose divergence is at most {DIVERGENCE:g} nats"
    return min(probes, key=lambda probe: (probe.diverged, probe.rate)), f"{none}, and it diverges least"


def stop_reason(evaluations: Sequence[Candidate], target: Target, patience: int, within: Sequence[bool]) -> str:
    """Say why training should stop after the last of these evaluations; empty if it should go on.

    within: whether each of them keeps the rest.
    """
    first = next((number for number, candidate in enumerate(evaluations) if target.reached(candidate)), None)
    if first is not None:
        at = evaluations[first:]
        scores = [one.diverged if target.reached(one) else math.inf for one in at]
        best, since = _best(scores)
        if since >= patience:
            return (
                f"the target was reached at step {at[0].step}, and the divergence from the original stopped improving "
                f"at step {at[best].step}"
            )
        return ""
    best, since = _best([target.gap(candidate) for candidate in evaluations])
    if since >= 2 * patience:
        return (
            f"the target was not reached: the forget pairs stopped coming closer to it at step {evaluations[best].step}"
        )
    lost = list(within)[-2 * patience :]
    if len(lost) == 2 * patience and not any(lost):
        return "the target was not reached before the rest suffered more than the floor allows"
    return ""


def _best(scores: Sequence[float]) -> tuple[int, int]:
    """Return which score was the last real improvement on the one before it, and how many came after it."""
    best = 0
    for number, score in enumerate(scores):
        if score < min(scores[best] * (1 - IMPROVEMENT), scores[best] - LEAST_IMPROVEMENT):
            best = number
    return best, len(scores) - 1 - best
