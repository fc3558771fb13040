"""Which candidate to keep: the one that forgets most within a floor, or that diverges least at the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cliperase_fast.evaluation import Divergence
from cliperase_fast.evaluation.background import MARGIN
from cliperase_fast.evaluation.divergence import lower_bound
from cliperase_fast.plurals import counted
from cliperase_fast.report.wording import digits_apart, percent, plain_number

FORGET_SCORE = 0.05  # largest forget score at the target
MOVED = 3.0  # nats that a movement of hidden states of 1 counts; other pictures suffer from about 0.1 on
CLOSE = 0.05  # distances from the target that fall into the same multiple of this count as equal


@dataclass(frozen=True)
class Candidate:
    """An evaluation on the validation split. Scores: zero-shot accuracy, or recall@1 where there are no classes.

    divergence: from the original, None where nothing needs it. association_error: standard error of
    `forget_similarity`, 0 where it is unknown. moved: the squared distance of the hidden states of retained captions
    from the original's, relative to their squared length; None unless they are held.
    """

    step: int
    epoch: int
    forget: float
    retain: float
    forget_similarity: float  # mean cosine of the forget pairs
    divergence: Divergence | None = None
    association_error: float = 0.0
    moved: float | None = None

    @property
    def diverged(self) -> float:
        """The mean divergence from the original, infinite if it was not measured or is not a number.

        See `with_movement`.
        """
        mean = math.inf if self.divergence is None else self.divergence.mean
        mean = with_movement(mean, self.moved)
        return mean if math.isfinite(mean) else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return the fields; `moved` only where it was measured."""
        return {name: value for name, value in asdict(self).items() if name != "moved" or value is not None}


@dataclass(frozen=True)
class Target:
    """Where forgetting is complete: the forget pairs are as similar as pairs of a concept that the model never saw.

    background: the background level of the validation split's forget pairs in the teacher, a cosine. pairs: how many
    these are. closeness: how much more a distance between cosines counts than in models of a low logit scale.
    """

    background: float
    pairs: int
    closeness: float = 1.0

    @property
    def association(self) -> float:
        """Largest mean cosine of the forget pairs at the target."""
        return self.background + MARGIN / self.closeness

    def gap(self, candidate: Candidate) -> float:
        """Return how much of the association and of the forget score is left above the target; 0 at the target.

        The association counts up to one standard error. The forget score counts with its own on top, as a score just
        below the limit on a few pairs is above it on others; a single pair that is left counts as it is.
        """
        if not (math.isfinite(candidate.forget) and math.isfinite(candidate.forget_similarity)):
            return math.inf
        association = max(0.0, candidate.forget_similarity - candidate.association_error - self.association)
        error = math.sqrt(candidate.forget * (1 - candidate.forget) / max(self.pairs, 1))
        if candidate.forget * self.pairs < 1.5:
            error = 0.0
        return self.closeness * association + max(0.0, candidate.forget + error - FORGET_SCORE)

    def reached(self, candidate: Candidate) -> bool:
        return self.gap(candidate) <= 1e-9  # the rounding of a fraction

    def reached_safely(self, candidate: Candidate) -> bool:
        """Whether other pairs would be at the target too: it is reached with a standard error to spare.

        Of few pairs, whose error is large, half of the way to the background level is enough.
        """
        spare = min(candidate.association_error, MARGIN / self.closeness / 2)
        return self.reached(candidate) and candidate.forget_similarity + spare <= self.association

    def to_dict(self) -> dict[str, float]:
        return {"background": self.background, "association": self.association, "forget": FORGET_SCORE}


def with_movement(divergence: float, moved: float | None) -> float:
    """Return the divergence in nats, or `MOVED` times the movement of hidden states if that is more.

    moved: None where they are not held.
    """
    if moved is None:
        return divergence
    return max(divergence, MOVED * moved) if math.isfinite(moved) else math.inf


def divergence_text(divergence: float, moved: float | None) -> str:
    """Write a divergence in nats, and the movement of hidden states where they are held."""
    return f"{divergence:.3f} nats" + ("" if moved is None else f", hidden states moved by {moved:.3f}")


class Rule(Protocol):
    """A rule of selection. All arguments are of the validation split."""

    @property
    def retain_before(self) -> float: ...

    def within(self, candidate: Candidate) -> bool:
        """Whether the candidate keeps enough of the rest."""
        ...

    def better(self, new: Candidate, old: Candidate | None) -> bool: ...

    def progresses(self, new: Candidate, old: Candidate | None) -> bool:
        """Whether training on is worth it."""
        ...

    def reason(
        self,
        chosen: Candidate,
        evaluations: Sequence[Candidate],
        name: str = "",
        unused_settings: frozenset[str] = frozenset(),
    ) -> str:
        """Say why this candidate was chosen.

        evaluations: all of them. name: what the method calls the candidate, by default its epoch and step.
        unused_settings: those that the method does not use, so that they are not recommended.
        """
        ...


@dataclass(frozen=True)
class Selection:
    """The rule of selection.

    Within the floor the lowest forget score wins; ties go to the higher retain score, then to the lower similarity of
    forget pairs. If nothing is within the floor, the smallest retain drop wins. With `last` the newest always wins.
    """

    retain_before: float
    floor: float
    last: bool = False

    def within(self, candidate: Candidate) -> bool:
        return self.retain_before - candidate.retain <= self.floor + 1e-9  # the rounding of a fraction is not a drop

    def better(self, new: Candidate, old: Candidate | None) -> bool:
        return self.last or old is None or self._rank(new) < self._rank(old)

    def progresses(self, new: Candidate, old: Candidate | None) -> bool:
        """Whether a better score, not merely a lower similarity, makes it worth training on."""
        return old is None or self._rank(new)[:-1] < self._rank(old)[:-1]

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        if self.within(candidate):
            return (0, candidate.forget, -candidate.retain, candidate.forget_similarity)
        return (1, -candidate.retain, candidate.forget, candidate.forget_similarity)

    def reason(
        self,
        chosen: Candidate,
        evaluations: Sequence[Candidate],
        name: str = "",
        unused_settings: frozenset[str] = frozenset(),
    ) -> str:
        name, scores, seen = _words(chosen, evaluations, name, self.retain_before)
        if self.last:
            return f"{name} is the last, as asked for: {scores}."
        if self.within(chosen):
            return (
                f"{name} forgets the most among {seen} whose retain score fell by "
                f"at most {100 * self.floor:g} points: {scores}."
            )
        return (
            f"None of {seen} kept the retain score within {100 * self.floor:g} points; "
            f"{name[0].lower()}{name[1:]} lost the least: {scores}. {_remedy(unused_settings)}."
        )


@dataclass(frozen=True)
class TargetSelection:
    """Among the candidates at the target that keep the rest, the one that diverges least from the original.

    A candidate keeps the rest if no retained class diverges by more than `class_floor` nats, and the retain score falls
    by at most `floor`, both up to one standard error. If no such candidate is at the target, the one that comes closest
    to it wins, and of those that come about as close (`CLOSE`) the one that diverges least; if none keeps the rest, the
    one that diverges least.

    pairs: retain pairs of the validation split. safely: prefer candidates that are at the target with a standard error
    to spare.
    """

    retain_before: float
    pairs: int
    target: Target
    floor: float
    class_floor: float
    safely: bool = False

    def within(self, candidate: Candidate) -> bool:
        before, after = self.retain_before, candidate.retain
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / max(self.pairs, 1))
        return before - after - error <= self.floor + 1e-9 and self.worst(candidate) <= self.class_floor

    @staticmethod
    def worst(candidate: Candidate) -> float:
        """Return the divergence of the worst class (without classes, of all pairs) less its standard error."""
        found = candidate.divergence
        if found is None:
            return math.inf
        mean, error = (found.mean, found.error) if found.worst_mean is None else (found.worst_mean, found.worst_error)
        return lower_bound(mean, error)

    def better(self, new: Candidate, old: Candidate | None) -> bool:
        return old is None or self._rank(new) < self._rank(old)

    progresses = better

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        if not self.within(candidate):
            return (2, candidate.diverged)
        if not self.target.reached(candidate):
            gap = self.target.gap(candidate)
            return (1, gap if math.isinf(gap) else int(gap / CLOSE), candidate.diverged)
        return (0, self.safely and not self.target.reached_safely(candidate), candidate.diverged)

    def reason(
        self,
        chosen: Candidate,
        evaluations: Sequence[Candidate],
        name: str = "",
        unused_settings: frozenset[str] = frozenset(),
    ) -> str:
        """See `Rule.reason`."""
        name, scores, seen = _words(chosen, evaluations, name, self.retain_before)
        lower = name[0].lower() + name[1:]
        mean = math.inf if chosen.divergence is None else chosen.divergence.mean
        diverged = divergence_text(mean, chosen.moved)
        if not self.within(chosen):
            return (
                f"None of {seen} kept the rest: the worst class diverged by more than {self.class_floor:g} "
                f"nats, or the retain score fell by more than {100 * self.floor:g} points. The floor gave way; {lower} "
                f"diverges least from the original ({diverged}): {scores}. Allow more with worst_class_floor or "
                "retain_floor, or choose a method that keeps more."
            )
        if not self.target.reached(chosen):
            rest, remedy = " and kept the rest", "Allow more with worst_class_floor or retain_floor"
            if all(map(self.within, evaluations)):
                rest, remedy = ", though all kept the rest", _push(unused_settings)
            digits = digits_apart(chosen.forget_similarity, self.target.association, 3)
            ours, most = (plain_number(of, digits) for of in (chosen.forget_similarity, self.target.association))
            return (
                f"None of {seen} reached the target (association at most {most}, forget at most "
                f"{FORGET_SCORE:.0%}){rest}. The target gave way; {lower} came closest to it (association {ours}): "
                f"{scores}. {remedy}, or choose another method."
            )
        reached = "reached the target"
        if self.safely and self.target.reached_safely(chosen):
            reached += " with a standard error to spare"
        return (
            f"{name} diverges least from the original ({diverged}) among those of {seen} that {reached} (association "
            f"at most {plain_number(self.target.association, 3)}, forget at most {FORGET_SCORE:.0%}): {scores}."
        )


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` trials (Wilson 1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _words(
    chosen: Candidate, evaluations: Sequence[Candidate], name: str, retain_before: float
) -> tuple[str, str, str]:
    """Return the candidate's name, its scores and the number of evaluations in words."""
    name = name or f"Epoch {chosen.epoch} (step {chosen.step})"
    scores = (
        f"on the validation split forget {percent(chosen.forget)}, retain {percent(chosen.retain)} "
        f"(before {percent(retain_before)})"
    )
    return name, scores, counted(len(evaluations), "checkpoint")


def _remedy(unused: frozenset[str]) -> str:
    """Say which settings may keep more, of those that the method uses."""
    if "learning_rate" in unused:
        return "Allow more with retain_floor, or change method_options"
    if "lambda_retain" in unused:
        return "Try a lower learning_rate or fewer epochs, or allow more with retain_floor"
    return "Try a lower learning_rate, a larger lambda_retain or lambda_consistency, or allow more with retain_floor"


def _push(unused: frozenset[str]) -> str:
    """Say which settings may forget more, of those that the method uses."""
    if "lambda_forget" not in unused:
        return "Give the forget terms more weight (lambda_forget, method_options)"
    if "learning_rate" not in unused:
        return "Give a higher learning_rate"
    return "Change method_options"
