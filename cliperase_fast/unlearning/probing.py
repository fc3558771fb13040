"""Try learning rates from the original weights, and go on from the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cliperase_fast.config import PROBE_STEPS
from cliperase_fast.errors import UnlearningError
from cliperase_fast.progress import Steps
from cliperase_fast.unlearning import recipe
from cliperase_fast.unlearning.recipe import Probe
from cliperase_fast.unlearning.selection import Candidate
from cliperase_fast.unlearning.tracker import describe_scores, random_states, set_random_states, validation_scores

if TYPE_CHECKING:
    from cliperase_fast.unlearning.trainer import Trainer


NOT_FINITE = "not finite"  # why a probe stopped


class NotFiniteError(UnlearningError):
    """A loss or a gradient that is not finite."""


@dataclass
class _Snapshot:
    """What training continues from."""

    engine: Any  # see `Engine.snapshot`
    random: dict[str, Any]


@dataclass
class _Trial:
    """A probe with its lines of metrics, its last evaluation and where it ended."""

    probe: Probe
    lines: list[dict[str, Any]]
    candidate: Candidate
    end: _Snapshot


class RateSearch:
    """Finds the learning rate of a run that starts, and trains the first steps with it.

    Every probe starts from the same weights, an empty optimizer and the same random state, and sees the same batches.
    The chosen probe is the beginning of the run: its steps are not repeated. A checkpoint after each probe holds the
    probes so far; a resumed run repeats at most the steps of the chosen one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.tracker, self.engine = trainer, trainer.tracker, trainer.engine
        assert trainer.run.target is not None
        self.target, self.before = trainer.run.target, trainer.run.baseline.validation
        self.steps = min(PROBE_STEPS, trainer.total_steps)

    def run(self) -> None:
        state = self.tracker.state
        start = self._snapshot()
        weights = self.engine.weights()
        first = self.tracker.on_first(
            lambda: recipe.first_rate(weight for name, weight in weights.items() if name in self.engine.names), weights
        )
        probes = [Probe(**probe) for probe in state.probes]
        kept: _Trial | None = None
        while (rate := recipe.next_rate(probes, first, self._most())) is not None:
            trial = self._try(rate, start)
            probes.append(trial.probe)
            state.probes = [probe.to_dict() for probe in probes]
            if recipe.choose(probes)[0] is trial.probe:
                kept = trial
            self._go_to(start)
            self.tracker.checkpoint(self.engine.state)
        chosen, why = recipe.choose(probes)
        if chosen.stopped == NOT_FINITE:  # as it diverges most, none of the others was better
            rates = [probe.rate for probe in probes]
            raise NotFiniteError(
                f"no learning rate was found: the loss or the gradient is not finite after a few steps at each of the "
                f"{len(rates)} rates that were tried, from {min(rates):.2g} to {max(rates):.2g}. Give grad_clip=1, or "
                "check the model and the pairs"
            )
        self.trainer.run.say("learning rate %.2g: %s", chosen.rate, why)
        if kept is None or kept.probe is not chosen:  # tried before the run was resumed
            kept = self._try(chosen.rate, start, again=chosen)
        self._adopt(kept)

    def _most(self) -> int:
        """Return how many steps the other probes may take: at most those of a run whose number of steps is given."""
        return recipe.BUDGET_UNREACHED if self.trainer.settings.open_ended else self.trainer.total_steps

    def _try(self, rate: float, start: _Snapshot, again: Probe | None = None) -> _Trial:
        """Train a few steps at this rate. again: the same probe of an earlier start, whose lines are known already."""
        trainer = self.trainer
        self._go_to(start)
        trainer.use_rate(rate)
        trainer.meter = trainer.make_meter(trial=True)
        lines: list[dict[str, Any]] = []
        seconds, done, stopped = 0.0, 0, ""
        candidate = self.before
        last = self.steps if again is None else again.steps
        with Steps(last, f"trying learning rate {rate:.2g}", "step", bar=trainer.runtime.progress) as bar:
            for step, batches in trainer.joint_batches(0, last):
                try:
                    line, note, took = trainer.step(step, batches)
                except NotFiniteError:
                    if step == 0:  # the rate has not had any effect yet
                        raise
                    stopped = NOT_FINITE
                    break
                lines.append(line)
                seconds, done = seconds + took, step + 1
                self._log({**line, "probe": rate}, again)
                bar.update(note=note)
                if done == recipe.EARLY < last:
                    candidate = self._evaluate(rate, done, again)
                    stopped = recipe.early_end(candidate, self.target, self.before)
                    if stopped:
                        break
        if not stopped:
            candidate = self._evaluate(rate, done, again)
        probe = self._probe(rate, candidate, done, stopped, seconds)
        if again is None:
            trainer.run.say("learning rate %.2g, %d steps: %s%s", rate, done, describe_scores(candidate),
                            f" ({stopped})" if stopped else "")  # fmt: skip
        return _Trial(again or probe, lines, candidate, self._snapshot())

    def _probe(self, rate: float, candidate: Candidate, steps: int, stopped: str, seconds: float) -> Probe:
        broken = stopped == NOT_FINITE or math.isinf(candidate.diverged)
        diverged = None if broken or candidate.divergence is None else candidate.divergence.mean
        return Probe(
            rate=rate,
            steps=steps,
            forget=_finite(candidate.forget),
            retain=_finite(candidate.retain),
            association=_finite(candidate.forget_similarity),
            divergence=diverged,
            progress=_finite(recipe.progress(candidate, self.target, self.before)) or 0.0,
            reached=not stopped and recipe.reaches(candidate, self.target),
            stopped=stopped,
            seconds=seconds,
            moved=None if candidate.moved is None else _finite(candidate.moved),
        )

    def _evaluate(self, rate: float, step: int, again: Probe | None) -> Candidate:
        self.engine.update_student()
        epoch = self.trainer.epoch_of(step)
        candidate = self.trainer.run.validate(step, epoch)
        self._log({"step": step, "epoch": epoch - 1, "probe": rate, "validation": validation_scores(candidate)}, again)
        return candidate

    def _log(self, line: dict[str, Any], again: Probe | None) -> None:
        if again is None:
            self.tracker.log(line)

    def _adopt(self, trial: _Trial) -> None:
        """Make a probe the beginning of the run."""
        state, trainer = self.tracker.state, self.trainer
        self._go_to(trial.end)
        trainer.use_rate(trial.probe.rate)
        state.rate, state.step, state.seconds = trial.probe.rate, trial.probe.steps, trial.probe.seconds
        for line in trial.lines:
            self.tracker.log(line)
        trainer.meter = trainer.make_meter()
        trainer.meter.resume(state.metrics)
        self.tracker.consider(replace(trial.candidate, epoch=trainer.epoch_of(trial.probe.steps)))
        self.tracker.checkpoint(self.engine.state)

    def _snapshot(self) -> _Snapshot:
        return _Snapshot(self.engine.snapshot(), random_states())

    def _go_to(self, snapshot: _Snapshot) -> None:
        self.engine.restore(snapshot.engine)
        set_random_states(snapshot.random)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
