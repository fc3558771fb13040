"""KL minimisation: raise the contrastive loss of the forget pairs while the retain similarities stay the original's.

    L = KL(S° ‖ S) - CLIP_f

KL is `functional.similarity_kl`: over the rows and the columns of the retain pairs' similarities, from the original (or
teacher=) to the student. CLIP_f is the CLIP loss of the forget pairs with denominators over the whole joint batch.
Source: KL-min of "TOFU", arXiv 2401.06121, with similarities in place of next tokens. No options. Limits: CLIP_f has no
upper bound, so forgetting does not stop by itself; KL is about 0 at first and holds back only once there is damage.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cliperase_fast.functional import similarity_kl
from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TrainingMethod
from cliperase_fast.unlearning.methods.clip_losses import forget_clip_loss, sigmoid_terms
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.run import Run


class KlTerms(NamedTuple):
    """total = consistency - forget."""

    total: Tensor
    consistency: Tensor
    forget: Tensor


class KlMinimization(TrainingMethod):
    """Gradient ascent on the forget pairs, held by the original's retain similarities, see the module."""

    name = "kl_minimization"
    summary = "minus the CLIP loss of the forget pairs, plus the KL of the retain similarities to the original"
    source = "KL-min, arXiv 2401.06121"
    needs = ("forget", "retain", "teacher")
    unused_settings = TERM_SETTINGS - {"backend", "teacher_cache"}

    def objective(self, run: Run) -> Objective:
        def terms(features: BatchFeatures) -> KlTerms:
            assert features.teacher_image is not None and features.teacher_text is not None
            assert features.teacher_logit_scale is not None
            if features.logit_bias is not None:
                only = {"lambda_retain": 0.0, "lambda_forget": 0.0, "lambda_consistency": 1.0}
                consistency = sigmoid_terms(features, self.settings.backend, **only).total
            else:
                consistency = similarity_kl(
                    features.retain_image,
                    features.retain_text,
                    features.logit_scale,
                    features.teacher_image,
                    features.teacher_text,
                    features.teacher_logit_scale,
                    process_group=features.ranks.process_group or "local",
                    backend=self.settings.backend,
                )
            forget = forget_clip_loss(features.gather())
            return KlTerms(consistency - forget, consistency, forget)

        return terms
