"""The training loop: batches in, metrics and checkpoints out, resumable at any step."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError, UnlearningError, tell_out_of_memory
from cliperase_fast.functional import LossTerms
from cliperase_fast.losses import CLIPEraseLoss
from cliperase_fast.progress import Steps, say
from cliperase_fast.storage import writing
from cliperase_fast.unlearning import checkpoints
from cliperase_fast.unlearning.batches import Batch, BatchLoader
from cliperase_fast.unlearning.checkpoints import OptimizerState, TrainState
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.loggers import MetricsLog
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Candidate, Selection
from cliperase_fast.unlearning.step_effect import ChangeMeter
from cliperase_fast.unlearning.teacher import Teacher

T = TypeVar("T")


class Trainer:
    """Trains the engine's student in place.

    teacher: None when lambda_consistency is 0. validate: scores the student on the validation split. directory: where
    checkpoints and metrics.jsonl go. identity: what a checkpoint must share with a run that resumes from it.
    resumable: whether checkpoints are written at all.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: Teacher | None,
        teacher_scale: Tensor | None,
        loader: BatchLoader,
        config: UnlearnConfig,
        runtime: Runtime,
        selection: Selection,
        validate: Callable[[int, int], Candidate],
        directory: Path,
        identity: dict[str, Any],
        resumable: bool = True,
    ) -> None:
        self.engine, self.teacher, self.teacher_scale, self.loader = engine, teacher, teacher_scale, loader
        self.config, self.runtime, self.selection, self.validate = config, runtime, selection, validate
        self.directory, self.identity, self.resumable, self.ranks = directory, identity, resumable, runtime.ranks
        self.loss = CLIPEraseLoss(
            config.lambda_retain,
            config.lambda_forget,
            config.lambda_consistency,
            forget=config.forget_loss,
            margin=config.margin,
            consistency=config.consistency,
            backend=config.backend,
            process_group=self.ranks.process_group or "local",
        )
        self.steps_per_epoch = loader.plan.steps_per_epoch(config.accumulate)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.state = TrainState(identity=identity)
        self.meter = ChangeMeter(config, self.steps_per_epoch, self.total_steps, self.ranks)

    def run(self) -> TrainState:
        """Train to the end (or to the early stop) and leave the chosen weights in the student."""
        self.engine.train_mode()
        if self.state.step == 0:
            self._checkpoint()
        if self.ranks.first:
            plan = self.loader.plan
            pairs = self.config.accumulate * (plan.forget_pairs + plan.retain_pairs)
            say("unlearning: %d steps of %d pairs, %d done", self.total_steps, pairs, self.state.step)
        bar = Steps(
            self.total_steps, "unlearning", "step", bar=self.runtime.progress, initial=self.state.step, leave=True
        )
        first = self.state.step * self.config.accumulate
        batches = self.loader.batches(first, self.total_steps * self.config.accumulate)
        opened: list[MetricsLog] = []
        settings, done = self.config.to_dict(), self.state.metrics
        self._on_first(lambda: opened.append(MetricsLog(self.directory, self.config.logger, settings, done)))
        log = opened[0] if opened else None
        with bar, log or nullcontext():
            while self.state.step < self.total_steps and not self.state.stopped_early:
                with self._fits():
                    line = self._step([next(batches) for _ in range(self.config.accumulate)])
                self._log(log, line)
                terms = [f"{name} {line[name]:.4f}" for name in ("total", "retain", "forget", "consistency")]
                bar.update(note=", ".join([*terms, f"{line['pairs_per_second']:.0f} pairs/s"]))
                epoch, rest = divmod(self.state.step, self.steps_per_epoch)
                last = self.state.step == self.total_steps
                if rest == 0 and (epoch % self.config.evaluate_every == 0 or last):
                    self._evaluate(log, epoch)
                if rest == 0 or last or self.state.step % self.config.checkpoint_every == 0:
                    self._checkpoint()
        return self.state

    def load_chosen(self) -> None:
        """Put the weights of the chosen checkpoint into the student; training is over then."""
        self.engine.close()
        best = self.state.best_weights
        assert best is not None
        found: dict[str, Tensor] = {}
        self._on_first(lambda: found.update(checkpoints.load_best(self.directory / "checkpoints", best)))
        self.engine.load_weights(self.ranks.broadcast_tensors(found))

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Go on from a checkpoint: weights, optimizer, random states, metrics. Raises InputError if it does not fit."""
        state = checkpoint.state
        try:
            self.engine.load_weights(state.weights)
            self.engine.load_state(state.optimizer)
            _set_random_states(state.random)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, (InputError, UnlearningError)):
                raise
            raise InputError(
                f"cannot resume from {checkpoint.path}: its files do not fit this run "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); remove it to go on from the one before"
            ) from error
        self._on_first(lambda: checkpoints.rewind_to(checkpoint, keep=self.config.keep_checkpoints))
        self.state = replace(state, identity=self.identity, weights={}, optimizer=OptimizerState(), random={})
        self.meter.resume(self.state.metrics)

    def _step(self, batches: list[Batch]) -> dict[str, Any]:
        began = time.perf_counter()
        number = self.state.step + 1
        if self.ranks.size > 1:  # dropout differs between ranks and does not hang on how many there were before
            _seed(self.config.seed, number, self.ranks.rank)
        rate = learning_rate(self.config, self.state.step, self.total_steps)
        sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        for batch in batches:
            terms = self.engine.backward(batch, 1 / len(batches), self._terms)
            sums += torch.stack([term.detach().double() for term in terms]).cpu()
        values = [value / len(batches) for value in sums.tolist()]
        if not math.isfinite(values[0]):
            raise self._not_finite(number, values)
        self.meter.before(self.state.step, self.engine)
        norm, fine = self.engine.step(rate)
        if not fine:
            raise self._not_finite(number, values, gradient=True)
        measured = self.meter.after(self.state.step, self.engine, rate, norm)
        self.state.step = number
        seconds = self.ranks.all_gather_numbers(time.perf_counter() - began)
        self.state.seconds += seconds[0]
        plan = self.loader.plan
        line: dict[str, Any] = {
            "step": number,
            "epoch": (number - 1) // self.steps_per_epoch,
            **dict(zip(LossTerms._fields, values, strict=True)),
            "learning_rate": rate,
            "grad_norm": float(norm),
            **measured,
            "pairs_per_second": len(batches) * (plan.forget_pairs + plan.retain_pairs) / seconds[0],
        }
        if self.ranks.size > 1:
            pairs = self.loader.pairs_of_ranks()
            line["rank_pairs_per_second"] = [len(batches) * n / s for n, s in zip(pairs, seconds, strict=True)]
        return line

    def _terms(self, batch: Batch, image: Tensor, text: Tensor, scale: Tensor) -> LossTerms:
        """The losses of image features [M + N, D], and of text features [U, D] of the batch's different captions."""
        device = self.runtime.device
        text = text.index_select(0, batch.text_of_pair.to(device))
        forget = len(batch.pixels) - len(batch.retain_indices)
        teacher_image, teacher_text = self.teacher.features(batch) if self.teacher is not None else (None, None)
        return self.loss(
            image[:forget],
            text[:forget],
            image[forget:],
            text[forget:],
            teacher_image,
            teacher_text,
            scale,
            self.teacher_scale,
            group_ids=None if batch.group_ids is None else batch.group_ids.to(device),
        )

    def _evaluate(self, log: MetricsLog | None, epoch: int) -> None:
        self.engine.update_student()
        state, candidate = self.state, self.validate(self.state.step, epoch)
        state.evaluations.append(candidate)
        line = {
            "step": candidate.step,
            "epoch": epoch - 1,
            "validation": {"forget": candidate.forget, "retain": candidate.retain},
        }
        self._log(log, line)
        if self.ranks.first:
            say("epoch %d, step %d: validation forget %.1f %%, retain %.1f %%", candidate.epoch, candidate.step,
                100 * candidate.forget, 100 * candidate.retain)  # fmt: skip
        if self.selection.progresses(candidate, state.best):
            state.evaluations_without_improvement = 0
        else:
            state.evaluations_without_improvement += 1
            state.stopped_early = 0 < self.config.early_stop <= state.evaluations_without_improvement
        if self.selection.better(candidate, state.best):
            state.best = candidate
            weights = self.engine.weights()
            root = self.directory / "checkpoints"
            state.best_weights = self._on_first(lambda: checkpoints.save_best(root, weights))

    def _log(self, log: MetricsLog | None, line: dict[str, Any]) -> None:
        self.state.metrics.append(line)
        if log is not None:
            with self._saves():
                log.append(line)

    def _checkpoint(self) -> None:
        if not self.resumable:
            return
        state = replace(
            self.state, weights=self.engine.weights(), optimizer=self.engine.state(), random=_random_states()
        )
        root, keep = self.directory / "checkpoints", self.config.keep_checkpoints
        self._on_first(lambda: checkpoints.save_checkpoint(root, state, keep=keep))

    def _on_first(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            with self._saves():
                return work()

        return self.ranks.run_on_first(guarded)

    @contextmanager
    def _saves(self) -> Iterator[None]:
        """Say in one line what a disk that fails costs, which is nothing that was saved before."""
        then = "what was saved before stays: go on with resume=True" if self.resumable else ""
        try:
            with writing(self.directory, then):
                yield
        except checkpoints.DamagedCheckpoint as damage:
            raise UnlearningError(f"{damage}; {then or 'start again'}") from damage

    def _fits(self) -> AbstractContextManager[None]:
        chunk = self.config.grad_cache_chunk
        return tell_out_of_memory(
            f"training step {self.state.step + 1}",
            f"give a smaller batch_size (now {self.config.batch_size}), or a "
            + (f"smaller grad_cache_chunk (now {chunk})" if chunk else "grad_cache_chunk, which encodes it in parts"),
        )

    def _not_finite(self, number: int, values: list[float], gradient: bool = False) -> UnlearningError:
        what = "gradient" if gradient else "loss"
        terms = ", ".join(f"{name} {value:g}" for name, value in zip(LossTerms._fields, values, strict=True))
        saved = self.ranks.run_on_first(lambda: checkpoints.list_checkpoints(self.directory / "checkpoints"))
        kept = f"The last good checkpoint is {saved[-1]}" if saved else "Without output_dir no checkpoint is kept"
        return UnlearningError(
            f"the {what} is not finite at step {number} ({terms}); training stopped before "
            f"that step changed the weights. {kept}. Try a lower learning_rate (now "
            f"{self.config.learning_rate:g}), grad_clip=1, or precision='fp32'"
        )


def learning_rate(config: UnlearnConfig, step: int, total: int) -> float:
    """Rate of the optimizer step after `step` have been done: linear warm-up, then constant or half a cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _seed(*entropy: int) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _random_states() -> dict[str, Any]:
    """The global generators' states, in types that a weights_only load accepts."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
