"""What a method works with: the arguments of `unlearn()`, what was loaded from them, and the prepared run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks
from cliperase_fast.evaluation import EncodedPairs
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.runtime import weight_dtypes
from cliperase_fast.progress import say
from cliperase_fast.unlearning.batches import BatchLoader, CaptionTable
from cliperase_fast.unlearning.checkpoints import Checkpoint
from cliperase_fast.unlearning.evaluator import Evaluator
from cliperase_fast.unlearning.run_directory import RunDirectory
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Candidate, Selection
from cliperase_fast.unlearning.splits import PreparedData


@dataclass(frozen=True)
class Inputs:
    """The arguments of `unlearn()` that name models and data."""

    model: Any
    forget: Any
    retain: Any
    test: Any
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
        self.dtypes = {"given": weight_dtypes(self.given), "trained": "float32"}
        self.rounded_to = None if self.given is self.original else self.given

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


@dataclass(frozen=True)
class Baseline:
    """The model before unlearning: test features, test scores, and its scores on the validation split."""

    encoded: EncodedPairs
    scores: dict[str, Any]
    validation: Candidate


@dataclass
class Run:
    """A prepared run: the method changes `student` in place.

    parameters: those that may change, by name. loader: joint batches of forget and retain pairs. directory: where
    checkpoints and metrics go. selection: which candidate is kept.
    """

    setup: Setup
    student: ClipAdapter
    parameters: list[tuple[str, nn.Parameter]]
    loader: BatchLoader
    evaluator: Evaluator
    baseline: Baseline
    selection: Selection
    directory: Path
    began: float  # time.perf_counter() when `unlearn` was called

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
    def resumable(self) -> bool:
        """Whether checkpoints are written."""
        return self.setup.directory.path is not None

    def validate(self, step: int, epoch: int) -> Candidate:
        """Score the student on the validation split."""
        return self.evaluator.candidate(self.student, self.data.validation, step, epoch)

    def say(self, message: str, *values: object) -> None:
        """Log a line of progress on the first rank."""
        if self.ranks.first:
            say(message, *values)
