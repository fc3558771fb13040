"""CLIPErase: push forget pairs apart, keep retain pairs together, stay consistent with the original."""

from __future__ import annotations

from cliperase_fast.functional import LossTerms
from cliperase_fast.losses import CLIPEraseLoss
from cliperase_fast.unlearning.methods.base import TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import sigmoid_terms
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class CLIPErase(TrainingMethod):
    """The paper's method. Its weights and choices are settings of `UnlearnConfig`.

    For a model that was trained with the sigmoid loss, see `contrastive.sigmoid_cliperase_loss`.
    """

    name = "cliperase"
    summary = "forgetting, retention and consistency losses together"
    source = "CLIPErase, arXiv 2410.23330"
    needs = ("forget", "retain", "teacher")

    @property
    def needs_teacher(self) -> bool:
        return self.settings.lambda_consistency > 0

    def objective(self, run: Run) -> Objective:
        settings = self.settings
        loss = CLIPEraseLoss(
            settings.lambda_retain,
            settings.lambda_forget,
            settings.lambda_consistency,
            forget=settings.forget_loss,
            margin=settings.margin,
            consistency=settings.consistency,
            backend=settings.backend,
            process_group=run.ranks.process_group or "local",
        )

        def terms(features: BatchFeatures) -> LossTerms:
            if features.logit_bias is not None:
                return sigmoid_terms(
                    features,
                    settings.backend,
                    lambda_retain=settings.lambda_retain,
                    lambda_forget=settings.lambda_forget,
                    lambda_consistency=settings.lambda_consistency,
                    forget=settings.forget_loss,
                    margin=settings.margin,
                    consistency=settings.consistency,
                )
            return loss(
                features.forget_image,
                features.forget_text,
                features.retain_image,
                features.retain_text,
                features.teacher_image,
                features.teacher_text,
                features.logit_scale,
                features.teacher_logit_scale,
                group_ids=features.retain_group_ids,
            )

        return terms
