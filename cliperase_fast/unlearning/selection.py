"""Which candidate to keep: the one that forgets most among those within the floor on the retain score."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """An evaluation on the validation split. Scores: zero-shot accuracy, or recall@1 where there are no classes."""

    step: int
    epoch: int
    forget: float
    retain: float
    forget_similarity: float  # mean cosine of the forget pairs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        self, chosen: Candidate, evaluations: int, name: str = "", unused_settings: frozenset[str] = frozenset()
    ) -> str:
        """Say why this candidate was chosen.

        evaluations: how many there were. name: what the method calls the candidate, by default its epoch and step.
        unused_settings: those that the method does not use, so that they are not recommended.
        """
        name = name or f"Epoch {chosen.epoch} (step {chosen.step})"
        scores = (
            f"on the validation split forget {chosen.forget:.1%}, retain {chosen.retain:.1%} "
            f"(before {self.retain_before:.1%})"
        )
        seen = f"{evaluations} checkpoint" + ("s" if evaluations != 1 else "")
        if self.last:
            return f"{name} is the last, as asked for: {scores}."
        if self.within(chosen):
            return (
                f"{name} forgets the most among {seen} whose retain score fell by "
                f"at most {100 * self.floor:g} points: {scores}."
            )
        return (
            f"No checkpoint of {seen} kept the retain score within {100 * self.floor:g} points; "
            f"{name[0].lower()}{name[1:]} lost the least: {scores}. {_remedy(unused_settings)}."
        )


def _remedy(unused: frozenset[str]) -> str:
    """Say which settings may keep more, of those that the method uses."""
    if "learning_rate" in unused:
        return "Allow more with retain_floor, or change method_options"
    if "lambda_retain" in unused:
        return "Try a lower learning_rate or fewer epochs, or allow more with retain_floor"
    return "Try a lower learning_rate, a larger lambda_retain or lambda_consistency, or allow more with retain_floor"
