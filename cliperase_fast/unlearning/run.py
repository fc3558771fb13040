"""What a method works with: the arguments of `unlearn()`, what was loaded from them, and the prepared run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.evaluation import Background, DivergenceMeter, EncodedPairs, closeness
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.runtime import training_modes, weight_dtypes
from cliperase_fast.progress import say
from cliperase_fast.unlearning.batches import BatchLoader, CaptionTable
from cliperase_fast.unlearning.checkpoints import Checkpoint
from cliperase_fast.unlearning.evaluator import Evaluator
from cliperase_fast.unlearning.precision import Precision
from cliperase_fast.unlearning.recipe import PATIENCE, PRESSES, Course, course
from cliperase_fast.unlearning.related import UNRELATED, concepts_of, related_note
from cliperase_fast.unlearning.run_directory import RunDirectory
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Candidate, Rule, Selection, Target, TargetSelection
from cliperase_fast.unlearning.splits import PreparedData


@dataclass(frozen=True)
class Inputs:
    """The arguments of `unlearn()` that name models and data."""

    model: Any
    forget: Any
    retain: Any
    test: Any
    validation: Any
    teacher: Any
    tokenizer: Callable[[Sequence[str]], Tensor] | None
    transform: Callable[[Any], Tensor] | None
    templates: Sequence[str] | None
    oracle: Any = None  # a model or a list of models, for the audit

    @property
    def model_is_the_callers(self) -> bool:
        """Whether the caller holds the model, so that it must be left untouched."""
        return not isinstance(self.model, (str, Path))

    @property
    def model_name(self) -> str:
        return type(self.model).__name__ if self.model_is_the_callers else str(self.model)

    def load_model(self, settings: UnlearnConfig, device: torch.device) -> ClipAdapter:
        """Load the model, or wrap the caller's."""
        cut = settings.long_captions == "truncate"
        return load_model(self.model, tokenizer=self.tokenizer, truncate=cut, device=device)

    def named(self) -> dict[str, Any]:
        """Return what was named by strings, from which a later audit can load it; None for objects."""
        found = {"model": self.model, "forget": self.forget, "retain": self.retain, "test": self.test}
        texts = {name: str(value) if isinstance(value, (str, Path)) else None for name, value in found.items()}
        return {**texts, "own_test": self.test is not None, "templates": list(self.templates or ())}


@dataclass
class Models:
    """The models of a run. `release` drops them once nothing needs them, so that the student may be all that is left.

    given: as the caller gave it. original: `given` in float32, the same object if it is float32. teacher: in float32;
    it reads the same tokens and pixels, but its width may differ.
    """

    given: ClipAdapter | None
    original: ClipAdapter | None
    teacher: ClipAdapter | None

    def __post_init__(self) -> None:
        assert self.given is not None
        assert self.original is not None
        self.dtypes = {"given": weight_dtypes(self.given), "trained": "float32"}
        self.closeness = closeness(float(self.original.logit_scale().detach()))
        self.rounded_to = None if self.given is self.original else self.given
        self.modes = training_modes(self.given.module)

    def release(self) -> None:
        self.given = self.original = self.teacher = None


@dataclass
class Setup:
    """What was loaded and checked; nothing has been changed or written."""

    inputs: Inputs
    settings: UnlearnConfig
    directory: RunDirectory
    runtime: Runtime
    deepspeed: dict[str, Any] | None  # DeepSpeed's configuration
    data: PreparedData
    captions: CaptionTable
    models: Models
    transform: Callable[[Any], Tensor] | None  # for training; evaluation uses the model's own
    random_views: bool  # whether a pair's image differs from step to step
    teacher_is_live: bool  # whether the teacher encodes every batch
    identity: dict[str, Any]  # what a run that resumes must share
    checkpoint: Checkpoint | None  # to resume from
    test_held_out: bool  # whether the test pairs were taken from those given, as the data has no test split
    precision: Precision  # of the encoders; that of `settings` is the one used


@dataclass(frozen=True)
class Baseline:
    """The model before unlearning: test features, test scores, and its scores on the validation split."""

    encoded: EncodedPairs
    scores: dict[str, Any]
    validation: Candidate
    validation_encoded: EncodedPairs
    meter: DivergenceMeter | None = None  # of validation, None if nothing needs the divergence


@dataclass
class Run:
    """A prepared run: the method changes `student` in place.

    parameters: those that may change, by name. loader: joint batches of forget and retain pairs. directory: where
    checkpoints and metrics go. background: the background levels of the original's features of the training split, and
    target: where forgetting is complete; None until `set_target`, or if nothing needs them. pressure: by how much the
    method should multiply the weight of its forget terms; None if it cannot. movement: measures how far the student's
    hidden states have moved, where a method holds them. notes: for the result. forget_level: which background levels
    the run has, see `related.level_of`.
    """

    setup: Setup
    student: ClipAdapter
    parameters: list[tuple[str, nn.Parameter]]
    loader: BatchLoader
    evaluator: Evaluator
    baseline: Baseline
    directory: Path
    began: float  # time.perf_counter() when `unlearn` was called
    automatic: bool = False  # whether it finds its learning rate or its number of steps
    background: Background | None = None
    target: Target | None = None
    pressure: float | None = None
    movement: Callable[[ClipAdapter], float] | None = None
    notes: list[str] = field(default_factory=list)
    forget_level: str = UNRELATED

    @property
    def settings(self) -> UnlearnConfig:
        return self.setup.settings

    @property
    def runtime(self) -> Runtime:
        return self.setup.runtime

    @property
    def ranks(self) -> Ranks:
        return self.setup.runtime.ranks

    @property
    def data(self) -> PreparedData:
        return self.setup.data

    @property
    def captions(self) -> CaptionTable:
        return self.setup.captions

    @property
    def feature_width(self) -> int:
        """Number of features of the original's embeddings, D."""
        return self.baseline.encoded.image_features.shape[1]

    @property
    def resumable(self) -> bool:
        """Whether checkpoints are written."""
        return self.setup.directory.path is not None

    def validate(self, step: int, epoch: int) -> Candidate:
        """Score the student on the validation split."""
        evaluator, part, meter = self.evaluator, self.data.validation, self.baseline.meter
        encoded = evaluator.encode(self.student, part)
        divergence = None if meter is None else evaluator.divergence(self.student, encoded, meter)
        found = evaluator.candidate(encoded, part, step, epoch, divergence)
        return found if self.movement is None else replace(found, moved=self.movement(self.student))

    @property
    def needs_target(self) -> bool:
        """Whether the run is judged by the background level and by the divergence from the original."""
        return self.automatic or self.settings.select == "divergence"

    def set_target(self, background: Background) -> None:
        """Take the background levels of the teacher, whose models must not have been released yet."""
        self.background = background
        ids = self.loader.group_ids
        masked = ids is not None and ids.size > 0
        note = related_note(self.data.train, background, self.settings.forget_level, masked)
        if note is not None and note not in self.notes:  # probes set the target too
            self.notes.append(note)
        if not self.needs_target:
            return
        models, part = self.setup.models, self.data.validation
        assert models.teacher is not None
        own = models.teacher is models.original
        encoded = self.baseline.validation_encoded if own else self.evaluator.encode(models.teacher, part)
        concepts = concepts_of(part, self.data.train) if background.own is not None else None
        level = background.association(encoded, part.forget_mask, concepts)
        self.target = Target(level, part.n_forget, models.closeness)

    @cached_property
    def selection(self) -> Rule:
        """The rule by which the candidate to keep is chosen."""
        settings, before = self.settings, self.baseline.validation.retain
        if settings.select != "divergence":
            return Selection(before, settings.retain_floor, settings.select == "last")
        assert self.target is not None
        part = self.data.validation
        pairs = len(part.pairs) - part.n_forget
        floors, safely = (settings.retain_floor, settings.worst_class_floor), self.pressure is not None
        return TargetSelection(before, pairs, self.target, *floors, safely)

    def course(self, evaluations: Sequence[Candidate]) -> Course:
        """Return where training stands after these evaluations, in a run that finds its number of steps itself."""
        assert self.target is not None
        patience = self.settings.early_stop or PATIENCE
        within = [self.selection.within(one) for one in evaluations]
        return course(evaluations, self.target, patience, within, PRESSES if self.pressure is not None else 0)

    def say(self, message: str, *values: object) -> None:
        """Log a line of progress on the first rank."""
        if self.ranks.first:
            say(message, *values)
