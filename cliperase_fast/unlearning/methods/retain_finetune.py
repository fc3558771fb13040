"""Plain fine-tuning on the retain pairs: the control that shows what a method owes to training as such."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cliperase_fast.unlearning.checkpoints import TrainState
from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import retain_clip_loss
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class RetainTerms(NamedTuple):
    """total = retain, the CLIP loss of the retain pairs."""

    total: Tensor
    retain: Tensor


class RetainFinetune(TrainingMethod):
    """The retention module of CLIPErase alone.

    The steps have the retain pairs of the other methods' batches, and no forget pairs. Nothing makes the model forget,
    so trial runs end before the target, and the recipe takes the highest rate that changes the model little enough.
    """

    name = "retain_finetune"
    summary = "the CLIP loss of the retain pairs alone: a control, which is not made to forget"
    source = "control"
    needs = ("retain",)
    unused_settings = TERM_SETTINGS - {"backend"}

    def objective(self, run: Run) -> Objective:
        backend = self.settings.backend

        def terms(features: BatchFeatures) -> RetainTerms:
            loss = retain_clip_loss(features, backend)
            return RetainTerms(loss, loss)

        return terms

    def notes(self, state: TrainState) -> list[str]:
        control = (
            "retain_finetune is a control: it trains on the retain pairs alone, so what the forget pairs lost is a "
            "side effect of the training"
        )
        return [*super().notes(state), control]
