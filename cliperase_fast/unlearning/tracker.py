"""What a run keeps of its progress: metrics, evaluations, the best weights, checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.report.wording import plain_number
from cliperase_fast.storage import writing
from cliperase_fast.tensor_files import Pieces, join
from cliperase_fast.unlearning import checkpoints
from cliperase_fast.unlearning.advice import advice
from cliperase_fast.unlearning.checkpoints import Checkpoint, OptimizerState, TrainState
from cliperase_fast.unlearning.loggers import MetricsLog
from cliperase_fast.unlearning.recipe import Course
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate

T = TypeVar("T")


class Tracker:
    """Keeps the `TrainState` of a run and writes it to the run directory. All ranks call every method together.

    weights: returns the weights to keep by name, those of the student as it is now.
    """

    def __init__(self, run: Run, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self.run, self.weights = run, weights
        self.state = TrainState(identity=run.setup.identity)
        self.course = Course()  # of a run whose number of steps is open
        self._log: MetricsLog | None = None
        self._root = run.directory / "checkpoints"

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Open the loggers on the first rank and close them at the end."""
        opened: list[MetricsLog] = []
        settings, done = self.run.settings, self.state.metrics
        self.on_first(lambda: opened.append(MetricsLog(self.run.directory, settings.logger, settings.to_dict(), done)))
        self._log = opened[0] if opened else None
        try:
            with self._log or nullcontext():
                yield
        finally:
            self._log = None

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self.state.metrics.append(line)
        if self._log is not None:
            with self._saves():
                self._log.append(line)

    def evaluate(self, epoch: int) -> Candidate:
        """Score the student on the validation split; keep its weights if they are the best so far."""
        candidate = self.run.validate(self.state.step, epoch)
        self.consider(candidate)
        return candidate

    def consider(self, candidate: Candidate) -> None:
        """Take an evaluation of the student as it is now; keep its weights if they are the best so far."""
        state, selection, epoch = self.state, self.run.selection, candidate.epoch
        state.evaluations.append(candidate)
        self.log({"step": candidate.step, "epoch": epoch - 1, "validation": validation_scores(candidate)})
        self.run.say("epoch %d, step %d: validation %s", epoch, candidate.step, describe_scores(candidate))
        if self.run.automatic and self.run.settings.open_ended:
            self._take_course()
        elif selection.progresses(candidate, state.best):
            state.evaluations_without_improvement = 0
        else:
            state.evaluations_without_improvement += 1
            state.stopped_early = 0 < self.run.settings.early_stop <= state.evaluations_without_improvement
        if selection.better(candidate, state.best):
            state.best = candidate
            weights = self.weights()
            state.best_weights = self.on_first(lambda: checkpoints.save_best(self._root, weights), weights)

    def _take_course(self) -> None:
        """Decide whether training should stop now, and at which share of the learning rate it goes on."""
        before, now, step = self.course, self.run.course(self.state.evaluations), self.state.step
        self.course, self.state.stop = now, now.stop
        if now.factor < before.factor:
            self.run.say("learning rate times %g from step %d on", now.factor, step)
        if now.pressed != before.pressed:
            self.run.pressure = now.pressure
            self.run.say("weight of the forget terms times %g from step %d on", now.pressure, step)

    def checkpoint(self, optimizer: Callable[[], OptimizerState] = OptimizerState) -> None:
        """Write a checkpoint, if the run has a directory. optimizer: returns the optimizer's state."""
        if not self.run.resumable:
            return
        state = replace(self.state, weights=self.weights(), optimizer=optimizer(), random=random_states())
        keep = self.run.settings.keep_checkpoints
        moments = join(state.optimizer.moments)
        self.on_first(
            lambda: checkpoints.save_checkpoint(self._root, state, keep=keep, moments=moments), state.weights, moments
        )

    def restore(self, checkpoint: Checkpoint, load: Callable[[TrainState], None]) -> None:
        """Continue from a checkpoint. load: puts its tensors in place. Raises InputError if they do not fit."""
        try:
            load(checkpoint.state)
            set_random_states(checkpoint.state.random)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, (InputError, UnlearningError)):
                raise
            raise InputError(
                f"cannot resume from {checkpoint.path}: its files do not fit this run "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); remove it to go on from the one before"
            ) from error
        self.on_first(lambda: checkpoints.rewind_to(checkpoint, keep=self.run.settings.keep_checkpoints))
        self.state = replace(
            checkpoint.state, identity=self.run.setup.identity, weights={}, optimizer=OptimizerState(), random={}
        )
        if self.run.automatic and self.run.settings.open_ended:
            self.course = self.run.course(self.state.evaluations)
            if self.course.pressed:
                self.run.pressure = self.course.pressure

    def best_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the chosen candidate by name, on the CPU of every rank."""
        best = self.state.best_weights
        assert best is not None
        found: list[Mapping[str, Tensor]] = []
        whole = self.run.ranks.size == 1  # else each is sent as soon as it is read
        self.on_first(lambda: found.append(checkpoints.load_best(self._root, best, whole)))
        return self.run.ranks.broadcast_each(found[0] if found else None)

    def last_checkpoint(self) -> str:
        """Say in a sentence which checkpoint is the last good one."""
        saved = self.run.ranks.run_on_first(lambda: checkpoints.list_checkpoints(self._root))
        return f"The last good checkpoint is {saved[-1]}" if saved else "Without output_dir no checkpoint is kept"

    def on_first(self, work: Callable[[], T], *tensors: Mapping[str, Tensor]) -> T:
        """Run `work` on the first rank. tensors: those that it reads one after another, assembled by all ranks."""

        def skip_rest() -> None:
            for pieces in tensors:
                if isinstance(pieces, Pieces):
                    pieces.skip_rest()

        def guarded() -> T:
            try:
                with self._saves():
                    return work()
            finally:
                skip_rest()

        if not self.run.ranks.first:
            skip_rest()
        return self.run.ranks.run_on_first(guarded)

    @contextmanager
    def _saves(self) -> Iterator[None]:
        """Turn a failing disk into an UnlearningError of one line that says what is left."""
        then = f"what was saved before stays: {advice().go_on}" if self.run.resumable else ""
        try:
            with writing(self.run.directory, then):
                yield
        except checkpoints.DamagedCheckpoint as damage:
            raise UnlearningError(f"{damage}; {then or 'start again'}") from damage


def validation_scores(candidate: Candidate) -> dict[str, float]:
    """Return the scores of an evaluation for its line of metrics.jsonl."""
    scores = {"forget": candidate.forget, "retain": candidate.retain}
    if candidate.divergence is not None:
        scores.update(association=candidate.forget_similarity, divergence=candidate.divergence.mean)
    if candidate.moved is not None:
        scores["moved"] = candidate.moved
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def describe_scores(candidate: Candidate) -> str:
    """Return the scores of an evaluation in words."""
    text = f"forget {100 * candidate.forget:.1f} %, retain {100 * candidate.retain:.1f} %"
    if candidate.divergence is not None:
        text += f", association {plain_number(candidate.forget_similarity)}, divergence {candidate.divergence.mean:.3f}"
    if candidate.moved is not None:
        text += f", hidden states moved by {candidate.moved:.3f}"
    return text


def random_states() -> dict[str, Any]:
    """Return the states of the global generators in types that a weights_only load accepts."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
