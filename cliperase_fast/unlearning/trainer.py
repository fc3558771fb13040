"""The training loop: joint batches in, metrics and checkpoints out, resumable at any step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError, UnlearningError, tell_out_of_memory
from cliperase_fast.evaluation import Background
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.fast_paths.blocks import disable_recompute, enable_recompute
from cliperase_fast.models.fast_paths.embedding import merge_rows
from cliperase_fast.progress import Steps
from cliperase_fast.unlearning import recipe
from cliperase_fast.unlearning.advice import advice
from cliperase_fast.unlearning.batches import Batch
from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.engines.deepspeed import ZeroEngine
from cliperase_fast.unlearning.engines.frozen_features import keep_front
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.engines.zero3 import Zero3Engine
from cliperase_fast.unlearning.objective import BatchFeatures, Objective, RelatedImages, checked_terms
from cliperase_fast.unlearning.probing import NotFiniteError, RateSearch
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.step_effect import ChangeMeter, merge_lora
from cliperase_fast.unlearning.teacher import Widen, make_teacher, measure_background
from cliperase_fast.unlearning.tracker import Tracker


class Trainer:
    """Trains the run's student in place by an objective.

    needs_teacher: whether the objective reads the teacher's features of the retain pairs. joint_teacher: and of the
    forget pairs. widen: for an objective that reads more than the features, see `TrainingMethod.widen`. Releases the
    run's other models once their features are cached, and restores the checkpoint if the run resumes.
    """

    def __init__(
        self,
        run: Run,
        objective: Objective,
        *,
        needs_teacher: bool,
        joint_teacher: bool = False,
        widen: Widen | None = None,
        make_engine: Callable[[Run, ClipAdapter], Engine] | None = None,
    ) -> None:
        self.run, self.objective, self.settings = run, objective, run.settings
        self.background: Background | None = None  # on the training device
        self.loader, self.runtime, self.ranks = run.loader, run.runtime, run.ranks
        plan, epochs = self.loader.plan, self.settings.epochs
        self.steps_per_epoch = plan.steps_per_epoch(self.settings.accumulate)
        in_epochs = recipe.MAX_STEPS if isinstance(epochs, str) else epochs * self.steps_per_epoch
        self.total_steps = self.settings.steps or in_epochs
        self.pairs_per_step = self.settings.accumulate * sum(plan.sizes)
        self.counts = tuple([share.stop - share.start for share in self.ranks.shares(count)] for count in plan.sizes)
        self.meter = self.make_meter()
        self.bias = constant_bias(run.student)
        student = run.student if widen is None else widen(run.student, False)
        self.width = None if widen is None else run.feature_width
        self.engine = (make_engine or engine_of)(run, student)
        self.tracker = Tracker(run, self.engine.weights)
        batches, whole = self.total_steps * self.settings.accumulate, run.needs_target or joint_teacher
        self.teacher = (
            make_teacher(run, batches, joint=joint_teacher, whole=whole, widen=widen) if needs_teacher else None
        )
        if whole:
            run.set_target(measure_background(run, self.teacher))
        assert run.setup.models.teacher is not None
        self.teacher_scale = run.setup.models.teacher.logit_scale().detach().float().clone()
        self.teacher_bias = constant_bias(run.setup.models.teacher)
        run.setup.models.release()
        self._speed_up()
        if run.setup.checkpoint is not None:
            self.tracker.restore(run.setup.checkpoint, self._load)
            self.meter.resume(self.state.metrics)
            if self.state.rate:
                self.use_rate(self.state.rate)

    @property
    def state(self) -> TrainState:
        return self.tracker.state

    def train(self) -> TrainState:
        """Train to the end, or to the early stop."""
        self.engine.train_mode()
        if self.state.step == 0:
            self.tracker.checkpoint(self.engine.state)
        with self.tracker.logging():
            if self.settings.learning_rate == AUTO:
                RateSearch(self).run()
            self._train()
        return self.state

    def _train(self) -> None:
        state, total, open_ended = self.state, self.total_steps, self.settings.open_ended
        self.run.say("unlearning: %s%d steps of %d pairs, %d done", "at most " if open_ended else "", total,
                     self.pairs_per_step, state.step)  # fmt: skip
        bar = Steps(total, "unlearning", "step", bar=self.runtime.progress, initial=state.step, leave=True)
        with bar:
            for step, batches in self.joint_batches(state.step, total):
                if state.stopped_early or state.stop:
                    break
                line, note, seconds = self.step(step, batches)
                state.step = step + 1
                state.seconds += seconds
                self.tracker.log(line)
                bar.update(note=note)
                self._end_step()
        if open_ended:
            state.stop = state.stop or f"the limit of {total} steps"
            self.run.say("training ended at step %d: %s", state.step, state.stop)

    def joint_batches(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield the number and the batches of the optimizer steps from `start` (how many are done) up to `stop`."""
        count = self.settings.accumulate
        batches = self.loader.batches(start * count, stop * count)
        for step in range(start, stop):
            with self._bad_pairs(step):
                loaded = list(islice(batches, count))
            yield step, loaded

    def use_rate(self, rate: float) -> None:
        """Train at this peak learning rate."""
        self.settings = replace(self.settings, learning_rate=rate)

    def make_meter(self, trial: bool = False) -> ChangeMeter:
        return ChangeMeter(self.settings, self.steps_per_epoch, self.total_steps, self.ranks, trial=trial)

    def finish(self) -> None:
        """End training: put the chosen weights into the student, in the modules that it had before training."""
        self.run.evaluator.recompute()
        self.engine.close()
        self.engine.load_weights(self.tracker.best_weights())
        merge_rows(self.engine.student)
        disable_recompute(self.engine.student)
        if self.settings.trainable == "lora":
            merge_lora(self.engine.student, self.settings)

    def _speed_up(self) -> None:
        """Recompute activations, and train from the features of frozen layers where that gives the same weights."""
        setup, engine = self.run.setup, self.engine
        if isinstance(engine, LocalEngine):  # DeepSpeed follows the order of modules, which recomputing changes
            enable_recompute(engine.student)  # not before: the baseline and the teacher's features are the original's
        planned = self.loader.substitutes is None and setup.data.stream is None
        if planned and not setup.random_views and not setup.teacher_is_live:
            steps = min(self.total_steps, recipe.EXPECTED_STEPS) if self.settings.automatic else self.total_steps
            batches = steps * self.settings.accumulate
            keep_front(engine, self.loader, batches, self.settings.image_cache_mib * 2**20, self.runtime)
        if isinstance(engine, LocalEngine):
            kept = engine.front if engine.student is self.run.student and not setup.random_views else None
            self.run.evaluator.reuse(
                self.run.student, self.run.data.validation, text=self.settings.trainable == "image", front=kept
            )

    def _load(self, state: TrainState) -> None:
        self.engine.reset(state.weights, state.optimizer)

    def _end_step(self) -> None:
        """Evaluate and write a checkpoint if it is time to."""
        step = self.state.step
        epoch, rest = divmod(step, self.steps_per_epoch)
        last = step == self.total_steps
        if self.settings.epochs == AUTO:
            due = step % recipe.EVALUATE_STEPS == 0
        else:
            due = rest == 0 and epoch % self.settings.evaluate_every == 0
        if due or last:
            self.engine.update_student()
            self.tracker.evaluate(self.epoch_of(step))
        if rest == 0 or last or step % self.settings.checkpoint_every == 0 or self.state.stop:
            self.tracker.checkpoint(self.engine.state)

    def epoch_of(self, step: int) -> int:
        """Return the number of the epoch, from 1, in which so many steps end."""
        return -(-step // self.steps_per_epoch)

    def step(self, done: int, batches: list[Batch]) -> tuple[dict[str, Any], str, float]:
        """Do an optimizer step. done: how many are done.

        Returns its line of metrics.jsonl, the note of the progress bar, and the seconds it took.
        """
        with self._memory_errors(done):
            return self._step(done, batches)

    def _step(self, done: int, batches: list[Batch]) -> tuple[dict[str, Any], str, float]:
        began = time.perf_counter()
        if self.ranks.size > 1:  # dropout differs between ranks, and depends only on the step and the rank
            _seed(self.settings.seed, done + 1, self.ranks.rank)
        rate = learning_rate(self.settings, done, self.total_steps) * self.tracker.course.factor
        terms = self._backward(done, batches)
        self.meter.before(done, self.engine)
        norm, fine = self.engine.step(rate)
        if not fine:
            raise self._not_finite(done, "gradient", terms)
        measured = self.meter.after(done, self.engine, rate, norm)
        seconds = self.ranks.all_gather_numbers(time.perf_counter() - began)
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
        return line, ", ".join([*shown, f"{line['pairs_per_second']:.0f} pairs/s"]), seconds[0]

    def _backward(self, done: int, batches: list[Batch]) -> dict[str, float]:
        """Accumulate the gradients of the batches. Returns the mean of each loss term."""
        sums: dict[str, float] = {}
        for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
            terms = self.engine.backward(batch, 1 / len(batches), self._terms, last=left == 0)
            values = torch.stack([term.detach().double() for term in terms]).cpu().tolist()
            for name, value in zip(terms._fields, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value
        means = {name: value / len(batches) for name, value in sums.items()}
        if not math.isfinite(means["total"]):
            raise self._not_finite(done, "loss", means)
        return means

    def _terms(self, batch: Batch, image: Tensor, text: Tensor, scale: Tensor) -> Any:
        """Compute the terms from image features [M + N, D] and the text features [U, D] of different captions."""
        device = self.runtime.device
        teacher_image, teacher_text = self.teacher.features(batch) if self.teacher is not None else (None, None)
        text = text.index_select(0, batch.text_of_pair.to(device))
        towers: dict[str, Any] = {}
        if self.width is not None:
            image, towers["image_tower"] = _split(image, self.width)
            text, towers["text_tower"] = _split(text, self.width)
            if teacher_image is not None and teacher_text is not None:
                teacher_image, towers["teacher_image_tower"] = _split(teacher_image, self.width)
                teacher_text, towers["teacher_text_tower"] = _split(teacher_text, self.width)
        features = BatchFeatures(
            image=image,
            text=text,
            logit_scale=scale,
            n_forget=batch.n_forget,
            group_ids=None if batch.group_ids is None else batch.group_ids.to(device),
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            teacher_logit_scale=self.teacher_scale,
            logit_bias=self.bias,
            teacher_logit_bias=self.teacher_bias,
            **self._background(teacher_image, teacher_text, batch.group_ids),
            **towers,
            ranks=self.ranks,
            counts=(self.counts[0], self.counts[1]),
        )
        return checked_terms(self.objective(features))

    def _background(
        self, teacher_image: Tensor | None, teacher_text: Tensor | None, concepts: Tensor | None
    ) -> dict[str, Any]:
        """Return the background levels of a batch for an objective that has the teacher's features of all pairs."""
        if self.teacher is None or not self.teacher.joint or self.run.background is None:
            return {}
        assert teacher_image is not None and teacher_text is not None
        if self.background is None:  # once, as every copy to a GPU waits for it
            self.background = self.run.background.to(teacher_image)
        levels, own = self.background, self.background.own
        found: dict[str, Any] = {}
        if concepts is not None:
            concepts = concepts.to(teacher_image.device)
            if own is not None:
                weights = own.of(concepts).to(own.related_weights) @ own.related_weights
                found["related"] = RelatedImages(own.related_images, weights)
        return {
            "background_image": levels.of_images(teacher_image, concepts),
            "background_text": levels.of_captions(teacher_text, concepts),
            **found,
        }

    def _memory_errors(self, done: int) -> AbstractContextManager[None]:
        chunk = self.settings.grad_cache_chunk
        return tell_out_of_memory(
            f"training step {done + 1}",
            f"give a smaller batch_size (now {self.settings.pairs_per_batch}), or a "
            + (f"smaller grad_cache_chunk (now {chunk})" if chunk else "grad_cache_chunk, which encodes it in parts"),
        )

    @contextmanager
    def _bad_pairs(self, done: int) -> Iterator[None]:
        """Turn a pair that cannot be used, met while training, into an UnlearningError that says how to go on."""
        try:
            yield
        except InputError as error:
            saved = f" {self.tracker.last_checkpoint()}." if self.ranks.size == 1 else ""
            repair = f"Repair it and {advice().go_on}" if self.run.resumable else "Repair it"
            skip = ", also with on_error='skip', which puts another pair in the place of an unreadable image"
            raise UnlearningError(
                f"training stopped before step {done + 1}: {error}.{saved} {repair}"
                f"{skip if self.settings.on_error == 'raise' else ''}"
            ) from error

    def _not_finite(self, done: int, what: str, terms: dict[str, float]) -> NotFiniteError:
        values = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        return NotFiniteError(
            f"the {what} is not finite at step {done + 1} ({values}); training stopped before that step "
            f"changed the weights. {self.tracker.last_checkpoint()}. {self._finite_remedy(done)}"
        )

    def _finite_remedy(self, done: int) -> str:
        """Say what may keep the loss and the gradient finite. done: how many steps were done before."""
        rate, others = self.settings.learning_rate, []
        if not self.settings.grad_clip:
            others.append("grad_clip=1")
        if self.runtime.precision != "fp32":
            others.append("precision='fp32'")
        if done == 0:  # whatever the rate, it has had no effect yet
            fix = f"try {others[-1]}" if others[-1:] == ["precision='fp32'"] else "check the model and the pairs"
            return f"No step has changed the weights yet, so the model's own values overflow: {fix}"
        if self.run.settings.learning_rate != AUTO:
            return f"Try {_either(f'a lower learning_rate (now {rate:g})', *others)}"
        reached = any(probe["reached"] for probe in self.state.probes)
        shared = (
            ""
            if reached or not self.state.probes
            else (
                " No rate that was tried reached the target: check that forget and retain pairs do not share captions."
            )
        )
        return (
            f"The learning rate {rate:.2g} was found automatically and proves too high.{shared} "
            f"Give {_either('a lower learning_rate', *others)}"
        )


def engine_of(run: Run, student: ClipAdapter) -> Engine:
    """Return the engine that the settings ask for. student: the run's, or an adapter of the same module."""
    setup = run.setup
    if setup.deepspeed is None:
        return LocalEngine(student, run.parameters, setup.settings, setup.runtime)
    kind = Zero3Engine if setup.deepspeed["zero_optimization"]["stage"] == 3 else ZeroEngine
    return kind(student, run.parameters, setup.settings, setup.runtime, setup.deepspeed)


def constant_bias(adapter: ClipAdapter) -> Tensor | None:
    """Return the bias of the logits of a model with the sigmoid loss, which is not trained; float32, 0-d."""
    bias = adapter.logit_bias()
    return None if bias is None else bias.detach().float().clone()


def _either(*choices: str) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])}{',' * (len(choices) > 2)} or {choices[-1]}"


def _split(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return rows[:, :width], rows[:, width:]


def learning_rate(settings: UnlearnConfig, step: int, total: int) -> float:
    """Return the rate of the next optimizer step: linear warm-up, then constant or half a cosine to 0.

    step: how many are done. total: how many there will be.
    """
    peak = settings.learning_rate
    assert not isinstance(peak, str)
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _seed(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
