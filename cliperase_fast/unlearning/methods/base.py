"""What a method is: its description, its options, and how it changes the student."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.batches import CaptionTable
from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.engines.base import Engine
from cliperase_fast.unlearning.objective import Objective
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate
from cliperase_fast.unlearning.splits import Split
from cliperase_fast.unlearning.step_effect import notes
from cliperase_fast.unlearning.teacher import Widen, measure_background, wide_adapter
from cliperase_fast.unlearning.tracker import Tracker
from cliperase_fast.unlearning.trainer import Trainer, engine_of

# Settings that only some methods use, for `unused_settings`.
TERM_SETTINGS = frozenset(
    ["lambda_retain", "lambda_forget", "lambda_consistency", "forget_loss", "margin", "consistency", "backend",
     "teacher_cache"]
)  # fmt: skip
TRAINING_SETTINGS = frozenset(
    ["false_negatives", "epochs", "steps", "epoch_over", "batch_size", "forget_fraction", "learning_rate",
     "optimizer", "weight_decay", "schedule", "warmup_steps", "grad_clip", "accumulate", "grad_cache_chunk",
     "trainable", "lora_rank", "lora_alpha", "deepspeed", "evaluate_every", "early_stop", "checkpoint_every"]
)  # fmt: skip
DATA = ("forget", "retain", "teacher")  # what a method may need


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


class Method(ABC):
    """A way to make the student forget. Subclasses describe themselves in class attributes.

    name: for `unlearn(method=...)`. summary: one line. source: the paper, or "baseline".
    Options: the dataclass of `method_options`; its `__post_init__` raises InputError for wrong values.
    needs: which of the forget pairs, the retain pairs and the teacher's features it reads.
    joint_teacher: whether it reads the teacher's features of the forget pairs too, not only of the retain pairs.
    tower_features: whether it reads the features of each tower before its projection too, of student and teacher.
    unused_settings: fields of UnlearnConfig that it ignores, so that setting them is an error.
    trains: whether the trainer trains the parameters. needs_gradient: whether a gradient must reach them otherwise.
    softmax_only: whether its loss is not defined for models that were trained with the sigmoid loss.
    presses: whether its objective multiplies its forget terms by `Run.pressure`.
    reads_levels: whether its objective reads the background levels.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[tuple[str, ...]] = ("forget", "retain")
    joint_teacher: ClassVar[bool] = False
    tower_features: ClassVar[bool] = False
    unused_settings: ClassVar[frozenset[str]] = frozenset()
    trains: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    softmax_only: ClassVar[bool] = False
    presses: ClassVar[bool] = False
    reads_levels: ClassVar[bool] = False

    def __init__(self, settings: UnlearnConfig, options: Any) -> None:
        self.settings, self.options = settings, options

    @property
    def needs_teacher(self) -> bool:
        """Whether this run reads the teacher's features."""
        return "teacher" in self.needs

    @property
    def forget_level(self) -> str:
        """Which background levels this run has: "unrelated", "related", "similar" or "auto", see `related.level_of`."""
        return self.settings.forget_level

    def check_inputs(self, teacher: Any) -> None:
        """Raise InputError for a setting or an argument that the method does not use."""
        for spec in dataclasses.fields(UnlearnConfig):
            value = getattr(self.settings, spec.name)
            if spec.name in self.unused_settings and value != spec.default:
                raise InputError(
                    f"method={self.name!r} does not use {spec.name} (now {value!r}); leave it at its default "
                    f"{spec.default!r}"
                )
        if teacher is not None and "teacher" not in self.needs:
            raise InputError(f"method={self.name!r} does not use a teacher: leave out teacher=")

    def check_loss(self, model: ClipAdapter, teacher: ClipAdapter) -> None:
        """Raise InputError if the loss is not defined for the model: one with the sigmoid loss has a logit_bias."""
        sigmoid = model.logit_bias() is not None
        if sigmoid and self.softmax_only:
            able = ", ".join(sorted({"cliperase", "gradient_difference", "text_projection"}))
            raise InputError(
                f"method={self.name!r} is defined by softmaxes over similarities, and the model was trained with the "
                f"sigmoid loss (it has a logit_bias): use another method, such as {able}"
            )
        if self.needs_teacher and sigmoid != (teacher.logit_bias() is not None):
            raise InputError(
                "one of the model and the teacher has a logit_bias (the sigmoid loss) and the other has none, so their "
                "similarities do not compare: give a teacher of the model's kind, or leave out teacher="
            )
        used = "consistency" not in self.unused_settings and self.needs_teacher
        if sigmoid and used and self.settings.consistency == "intra":
            raise InputError(
                "consistency='intra' is not defined for a model that was trained with the sigmoid loss: use 'logits' "
                "or 'features'"
            )

    def check_model(self, model: ClipAdapter, train: Split, captions: CaptionTable) -> None:
        """Raise InputError for a model or training pairs that the method cannot work on. Optional.

        It is called before anything is measured or written, and leaves the model as it is.
        """
        return

    def prepare(self, run: Run) -> None:
        """Compute what the method needs before it changes the student, such as a mask of weights. Optional.

        A resumed run calls it too.
        """
        return

    @abstractmethod
    def run(self, run: Run) -> TrainState:
        """Change `run.student` and leave the chosen weights in it. Returns what was done, for the record."""

    def describe(self, candidate: Candidate) -> str:
        """Return the candidate's name in the result's sentences."""
        if self.settings.epochs == AUTO:
            return f"Step {candidate.step}"
        return f"Epoch {candidate.epoch} (step {candidate.step})"

    def notes(self, state: TrainState) -> list[str]:
        """Return what a reader of the result should know."""
        return []


class TrainingMethod(Method):
    """A method that trains the student by an objective of its own."""

    @abstractmethod
    def objective(self, run: Run) -> Objective:
        """Return the function from the features of a joint batch to its loss terms."""

    def run(self, run: Run) -> TrainState:
        run.pressure = 1.0 if self.presses else None
        trainer = Trainer(
            run,
            self.objective(run),
            needs_teacher=self.needs_teacher,
            joint_teacher=self.joint_teacher,
            widen=self.widen(run),
            make_engine=self.make_engine,
        )
        state = trainer.train()
        trainer.finish()
        return state

    def widen(self, run: Run) -> Widen | None:
        """Return what gives student and teacher encoders with more after the features; None for the features alone.

        What follows the features of images and captions is `image_tower` and `text_tower` of the batch.
        """
        return partial(wide_adapter, run) if self.tower_features else None

    def make_engine(self, run: Run, student: ClipAdapter) -> Engine:
        """Return the engine that trains. student: the run's, or an adapter of the same module."""
        return engine_of(run, student)

    def notes(self, state: TrainState) -> list[str]:
        return notes(state.metrics, self.settings.to_dict())


class ClosedFormMethod(Method):
    """A method that changes weights directly, without the trainer."""

    unused_settings = TERM_SETTINGS | TRAINING_SETTINGS
    trains = False

    @abstractmethod
    def edit(self, run: Run, evaluate: Callable[[], Candidate]) -> None:
        """Change the weights of `run.student` in place, without gradient.

        evaluate: scores the student on the validation split and returns the scores. The best student evaluated is
        chosen. Without a call the student is evaluated once, at the end.
        """

    def run(self, run: Run) -> TrainState:
        kept = {**dict(run.parameters), **dict(run.student.module.named_buffers())}
        tracker = Tracker(run, lambda: kept)
        if run.needs_target:
            run.set_target(measure_background(run, None))
        run.setup.models.release()
        if run.setup.checkpoint is not None:  # written once the edit was done
            tracker.restore(run.setup.checkpoint, lambda state: None)
        else:
            self._edit(run, tracker)
            tracker.checkpoint()
        load_tensors(kept, dict(tracker.best_weights()))
        return tracker.state

    def _edit(self, run: Run, tracker: Tracker) -> None:
        def evaluate() -> Candidate:
            tracker.state.step += 1
            return tracker.evaluate(tracker.state.step)

        began = time.perf_counter()
        with tracker.logging(), torch.no_grad():
            self.edit(run, evaluate)
            if tracker.state.step == 0:
                evaluate()
        tracker.state.seconds = time.perf_counter() - began

    def describe(self, candidate: Candidate) -> str:
        return f"Edit {candidate.step}"


def load_tensors(targets: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same name."""
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(found[name])
