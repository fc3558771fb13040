"""The automatic recipe's decisions: which learning rate to try next, which to take, when to lower it, when to stop.

All of them are functions of what was measured, so that a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from cliperase_fast.config import PROBE_STEPS
from cliperase_fast.unlearning.selection import Candidate, Target, divergence_text, with_movement

EARLY = 10  # steps after which a hopeless probe stops
EVALUATE_STEPS = 10  # optimizer steps between two evaluations
MAX_STEPS = 1000  # optimizer steps of a run that chooses their number itself
EXPECTED_STEPS = 150  # of probes and training together, to judge what is worth computing in advance
DIVERGENCE = 0.1  # nats; above it a rate that is not on its way to the target is too high
HEALING = 0.5  # nats; as much is fine for a rate on its way, as the divergence falls again once the forgetting is done
UNNOTICED = 0.01  # nats; a rate at the target that diverges less needs no comparison with a lower one
RUINED = 1.0  # nats; above it a rate is too high even at the target
ON_ITS_WAY = 0.5  # share of the way to the target that a probe has made
STAGES = (1.0, 0.3, 0.1)  # times the learning rate, one after another; the lower ones let what was disturbed settle
STRENGTH = 1e-3  # the first rate as a share of a typical weight, as Adam moves every weight by about the rate
BUDGET, BUDGET_UNREACHED = 60, 90  # steps of other probes, once a rate reaches the target and before
PATIENCE = 3  # evaluations without an improvement at the target; twice as many before it
PRESSURE, PRESSES = 3.0, 3  # the weight of the forget terms grows by this factor, at most so many times
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
    moved: float | None = None  # see `Candidate`

    @property
    def index(self) -> int:
        """The rate's place on the grid, which has two rates a decade."""
        return round(2 * math.log10(self.rate))

    @property
    def diverged(self) -> float:
        return math.inf if self.divergence is None else with_movement(self.divergence, self.moved)

    @property
    def diverged_text(self) -> str:
        return divergence_text(math.inf if self.divergence is None else self.divergence, self.moved)

    @property
    def gentle(self) -> bool:
        return self.diverged <= DIVERGENCE

    @property
    def promising(self) -> bool:
        return self.progress >= ON_ITS_WAY and self.diverged <= HEALING

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; `moved` only where it was measured."""
        return {name: value for name, value in asdict(self).items() if name != "moved" or value is not None}


def first_rate(parameters: Iterable[Tensor]) -> float:
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

    Early on, forgetting grows at most with the square of the steps, so that a slow one will not come half way.
    """
    if candidate.diverged > RUINED:
        return "diverged"
    if progress(candidate, target, before) < ON_ITS_WAY * (EARLY / PROBE_STEPS) ** 2:
        return "too slow"
    return ""


def reaches(candidate: Candidate, target: Target) -> bool:
    """Whether a probe that ends like this is at the target, and the model is not ruined."""
    return target.reached(candidate) and candidate.diverged <= RUINED


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
        done = worse or low - 1 in tried or tried[low].diverged <= UNNOTICED
        found = None if done else low - 1
    else:
        found = _next_unreached(tried)
    return None if found is None else rate_at(found)


def _next_unreached(tried: dict[int, Probe]) -> int | None:
    """Return the place to try next while no rate reaches the target."""
    weak = [index for index, probe in tried.items() if probe.gentle or probe.promising]
    strong = [index for index in tried if index not in weak]
    if not strong:
        top = max(weak)
        return top + (2 if tried[top].progress < 0.01 else 1)
    low = min(strong)
    if not weak:
        return low - (2 if tried[low].diverged > RUINED else 1)
    middle = (max(weak) + low) // 2
    return None if middle in tried else middle


def choose(probes: Sequence[Probe]) -> tuple[Probe, str]:
    """Return the probe to go on from, and why.

    A gentle one that was not too slow goes before one that is at the target but disturbs the rest.
    """
    reached = [probe for probe in probes if probe.reached]
    gently = [probe for probe in probes if probe.gentle and not probe.stopped]
    there = [probe for probe in reached if probe.gentle] or ([] if gently else reached)
    if there:
        best = _least_divergent(there)
        return best, (
            f"it diverges least from the original ({best.diverged_text}) of the {len(there)} rates that reach "
            f"the target within {best.steps} steps"
            if len(there) > 1
            else f"it is the only rate that reaches the target within {best.steps} steps"
        )
    none = "no rate reaches the target so soon" + (f" within {DIVERGENCE:g} nats of divergence" if reached else "")
    promising = [probe for probe in probes if probe.promising]
    if gently or not promising:
        highest = max(gently or [p for p in probes if p.gentle], key=lambda probe: probe.rate, default=None)
        if highest is not None:
            return highest, f"{none}, and it is the highest whose divergence is at most {DIVERGENCE:g} nats"
    best = _least_divergent(promising or probes)
    where = " of those that come more than half way" if promising else ""
    return best, f"{none}, and it diverges least{where} ({best.diverged_text})"


def _least_divergent(probes: Sequence[Probe]) -> Probe:
    return min(probes, key=lambda probe: (probe.diverged, probe.rate))


@dataclass(frozen=True)
class Course:
    """Where training stands after some evaluations.

    lowered: the steps after which the learning rate fell to the next of `STAGES`. stop: why training should stop now,
    empty if it should go on. pressed: the steps after which the forget terms got more weight.
    """

    lowered: tuple[int, ...] = ()
    stop: str = ""
    pressed: tuple[int, ...] = ()

    @property
    def factor(self) -> float:
        return STAGES[len(self.lowered)]

    @property
    def pressure(self) -> float:
        """By how much the weight of the forget terms has grown."""
        return PRESSURE ** len(self.pressed)


def course(
    evaluations: Sequence[Candidate], target: Target, patience: int, within: Sequence[bool], presses: int = 0
) -> Course:
    """Follow the evaluations of a run from its first step on.

    A stage ends when so many evaluations (`patience`, twice as many in the first stage before the target is reached)
    bring no improvement: before the target is reached of the distance to it, then of the divergence at the target.
    Where it would end though no evaluation that keeps the rest is safely at the target, the forget terms get more
    weight instead, as they stand in balance with those that keep the rest.

    within: whether each of them keeps the rest. presses: how often the forget terms can get more weight.
    """
    lowered: tuple[int, ...] = ()
    pressed: tuple[int, ...] = ()
    safe = False
    best, reached = math.inf, None
    improved = waited = 0
    for number, candidate in enumerate(evaluations):
        at = target.reached(candidate)
        safe = safe or (within[number] and target.reached_safely(candidate))
        if at and reached is None:
            best, reached = math.inf, candidate.step
        score = target.gap(candidate) if reached is None else candidate.diverged if at else math.inf
        if score < min(best * (1 - IMPROVEMENT), best - LEAST_IMPROVEMENT) or (math.isinf(best) and score < best):
            best, waited, improved = score, 0, candidate.step
        else:
            waited += 1
        if reached is None and _suffers(evaluations[: number + 1], within, 2 * patience, target):
            why = "the target was not reached before the rest suffered more than the floor allows"
            return Course(lowered, why, pressed)
        if waited < (2 * patience if reached is None and not lowered else patience):
            continue
        if not safe and len(pressed) < presses:
            pressed, waited = (*pressed, candidate.step), 0
        elif len(lowered) + 1 == len(STAGES):
            return Course(lowered, _end(reached, improved), pressed)
        else:
            lowered, waited = (*lowered, candidate.step), 0
    return Course(lowered, "", pressed)


def _suffers(evaluations: Sequence[Candidate], within: Sequence[bool], count: int, target: Target) -> bool:
    """Whether none of the last evaluations keeps the rest, and nothing promises that a later one will.

    The divergence falls again once the forgetting is done. So a run that still comes closer to the target goes on, as
    long as it diverges no more than a rate on its way may.
    """
    last = evaluations[-count:]
    if len(last) < count or any(within[len(evaluations) - count : len(evaluations)]):
        return False
    if last[-1].diverged < last[0].diverged:
        return False
    nearer = target.gap(last[-1]) < target.gap(last[0]) * (1 - IMPROVEMENT)
    return not (nearer and last[-1].diverged <= HEALING)


def _end(reached: int | None, improved: int) -> str:
    if reached is None:
        return f"the target was not reached: the forget pairs stopped coming closer to it at step {improved}"
    return (
        f"the target was reached at step {reached}, and the divergence from the original stopped improving at step "
        f"{improved}"
    )
