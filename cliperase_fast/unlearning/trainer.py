"""The training loop: joint batches in, metrics and checkpoints out, resumable at any step."""

from __future__ import annotations

import math
import random
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import UnlearningError, tell_out_of_memory
from cliperase_fast.models.fast_paths.blocks import disable_recompute, enable_recompute
from cliperase_fast.models.fast_paths.embedding import merge_rows
from cliperase_fast.progress import Steps
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.engines.deepspeed import ZeroEngine
from cliperase_fast.unlearning.engines.frozen_features import keep_front
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.step_effect import ChangeMeter, merge_lora
from cliperase_fast.unlearning.teacher import make_teacher
from cliperase_fast.unlearning.tracker import Tracker


class Trainer:
    """Trains the run's student in place by an objective.

    needs_teacher: whether the objective reads the teacher's features of the retain pairs. joint_teacher: and of the
    forget pairs. Releases the run's other models once their features are cached, and restores the checkpoint if the run
    resumes.
    """

    def __init__(self, run: Run, objective: Objective, *, needs_teacher: bool, joint_teacher: bool = False) -> None:
        self.run, self.objective, self.settings = run, objective, run.settings
        self.loader, self.runtime, self.ranks = run.loader, run.runtime, run.ranks
        plan = self.loader.plan
        self.steps_per_epoch = plan.steps_per_epoch(self.settings.accumulate)
        self.total_steps = self.settings.epochs * self.steps_per_epoch
        self.pairs_per_step = self.settings.accumulate * (plan.forget_pairs + plan.retain_pairs)
        self.counts = tuple(
            [share.stop - share.start for share in self.ranks.shares(count)]
            for count in (plan.forget_pairs, plan.retain_pairs)
        )
        self.meter = ChangeMeter(self.settings, self.steps_per_epoch, self.total_steps, self.ranks)
        self.engine = make_engine(run)
        self.tracker = Tracker(run, self.engine.weights)
        batches = self.total_steps * self.settings.accumulate
        self.teacher = make_teacher(run, batches, joint=joint_teacher) if needs_teacher else None
        assert run.setup.models.teacher is not None
        self.teacher_scale = run.setup.models.teacher.logit_scale().detach().float().clone()
        run.setup.models.release()
        self._speed_up()
        if run.setup.checkpoint is not None:
            self.tracker.restore(run.setup.checkpoint, self._load)
            self.meter.resume(self.state.metrics)

    @property
    def state(self) -> TrainState:
        return self.tracker.state

    def train(self) -> TrainState:
        """Train to the end, or to the early stop."""
        self.engine.train_mode()
        if self.state.step == 0:
            self.tracker.checkpoint(self.engine.state)
        done, total = self.state.step, self.total_steps
        self.run.say("unlearning: %d steps of %d pairs, %d done", total, self.pairs_per_step, done)
        bar = Steps(total, "unlearning", "step", bar=self.runtime.progress, initial=done, leave=True)
        batches = self.loader.batches(done * self.settings.accumulate, total * self.settings.accumulate)
        with bar, self.tracker.logging():
            while self.state.step < total and not self.state.stopped_early:
                with self._memory_errors():
                    line, note = self._step([next(batches) for _ in range(self.settings.accumulate)])
                self.tracker.log(line)
                bar.update(note=note)
                self._end_step()
        return self.state

    def finish(self) -> None:
        """End training: put the chosen weights into the student, in the modules that it had before training."""
        self.engine.close()
        self.engine.load_weights(self.tracker.best_weights())
        merge_rows(self.engine.student)
        disable_recompute(self.engine.student)
        if self.settings.trainable == "lora":
            merge_lora(self.engine.student, self.settings)

    def _speed_up(self) -> None:
        """Recompute activations, and train from the features of frozen layers where that gives the same weights."""
        if not isinstance(
            self.engine, LocalEngine
        ):  # DeepSpeed follows the order of modules, which recomputing changes
            return
        setup, engine = self.run.setup, self.engine
        enable_recompute(engine.student)  # not before: the baseline and the teacher's features are the original's
        if self.ranks.size == 1 and not setup.random_views and not setup.teacher_is_live:
            batches = self.total_steps * self.settings.accumulate
            keep_front(engine, self.loader, batches, self.settings.image_cache_mib * 2**20, self.runtime)

    def _load(self, state: TrainState) -> None:
        self.engine.load_weights(state.weights)
        self.engine.load_state(state.optimizer)

    def _end_step(self) -> None:
        """Evaluate and write a checkpoint if it is time to."""
        step = self.state.step
        epoch, rest = divmod(step, self.steps_per_epoch)
        last = step == self.total_steps
        if rest == 0 and (epoch % self.settings.evaluate_every == 0 or last):
            self.engine.update_student()
            self.tracker.evaluate(epoch)
        if rest == 0 or last or step % self.settings.checkpoint_every == 0:
            self.tracker.checkpoint(self.engine.state)

    def _step(self, batches: list[Batch]) -> tuple[dict[str, Any], str]:
        """Do an optimizer step. Returns its line of metrics.jsonl, and the note of the progress bar."""
        began, done = time.perf_counter(), self.state.step
        if self.ranks.size > 1:  # dropout differs between ranks, and depends only on the step and the rank
            _seed(self.settings.seed, done + 1, self.ranks.rank)
        rate = learning_rate(self.settings, done, self.total_steps)
        terms = self._backward(batches)
        self.meter.before(done, self.engine)
        norm, fine = self.engine.step(rate)
        if not fine:
            raise self._not_finite("gradient", terms)
        measured = self.meter.after(done, self.engine, rate, norm)
        self.state.step = done + 1
        seconds = self.ranks.all_gather_numbers(time.perf_counter() - began)
        self.state.seconds += seconds[0]
        line: dict[str, Any] = {
            "step": done + 1,
            "epoch": done // self.steps_per_epoch,
            **terms,
            "learning_rate": rate,
            "grad_norm": float(norm),
            **measured,
            "pairs_per_second": self.pairs_per_step / seconds[0],
        }
        if self.ranks.size > 1:
            pairs = self.loader.pairs_of_ranks()
            line["rank_pairs_per_second"] = [len(batches) * n / s for n, s in zip(pairs, seconds, strict=True)]
        shown = [f"{name} {value:.4f}" for name, value in terms.items()]
        return line, ", ".join([*shown, f"{line['pairs_per_second']:.0f} pairs/s"])

    def _backward(self, batches: list[Batch]) -> dict[str, float]:
        """Accumulate the gradients of the batches. Returns the mean of each loss term."""
        sums: dict[str, float] = {}
        for batch in batches:
            terms = self.engine.backward(batch, 1 / len(batches), self._terms)
            values = torch.stack([term.detach().double() for term in terms]).cpu().tolist()
            for name, value in zip(terms._fields, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
        means = {name: value / len(batches) for name, value in sums.items()}
        if not math.isfinite(means["total"]):
            raise self._not_finite("loss", means)
        return means

    def _terms(self, batch: Batch, image: Tensor, text: Tensor, scale: Tensor) -> Any:
        """Compute the terms from image features [M + N, D] and the text features [U, D] of different captions."""
        device = self.runtime.device
        teacher_image, teacher_text = self.teacher.features(batch) if self.teacher is not None else (None, None)
        features = BatchFeatures(
            image=image,
            text=text.index_select(0, batch.text_of_pair.to(device)),
            logit_scale=scale,
            n_forget=batch.n_forget,
            group_ids=None if batch.group_ids is None else batch.group_ids.to(device),
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            teacher_logit_scale=self.teacher_scale,
            ranks=self.ranks,
            counts=(self.counts[0], self.counts[1]),
        )
        return self.objective(features)

    def _memory_errors(self) -> AbstractContextManager[None]:
        chunk = self.settings.grad_cache_chunk
        return tell_out_of_memory(
            f"training step {self.state.step + 1}",
            f"give a smaller batch_size (now {self.settings.batch_size}), or a "
            + (f"smaller grad_cache_chunk (now {chunk})" if chunk else "grad_cache_chunk, which encodes it in parts"),
        )

    def _not_finite(self, what: str, terms: dict[str, float]) -> UnlearningError:
        values = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        return UnlearningError(
            f"the {what} is not finite at step {self.state.step + 1} ({values}); training stopped before that step "
            f"changed the weights. {self.tracker.last_checkpoint()}. Try a lower learning_rate (now "
            f"{self.settings.learning_rate:g}), grad_clip=1, or precision='fp32'"
        )


def make_engine(run: Run) -> Engine:
    """Return the engine that the settings ask for."""
    setup = run.setup
    if setup.deepspeed is None:
        return LocalEngine(run.student, run.parameters, setup.settings, setup.runtime)
    return ZeroEngine(run.student, run.parameters, setup.settings, setup.runtime, setup.deepspeed)


def learning_rate(settings: UnlearnConfig, step: int, total: int) -> float:
    """Return the rate of the next optimizer step: linear warm-up, then constant or half a cosine to 0.

    step: how many are done. total: how many there will be.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _seed(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
