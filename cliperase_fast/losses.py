"""Provide the losses as modules, for training loops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cliperase_fast.distributed import LOCAL, check_process_group
from cliperase_fast.functional import CalibratedTerms, LossTerms, calibrated_loss, cliperase_loss
from cliperase_fast.validation import (
    CALIBRATED_WEIGHTS,
    check_backend_name,
    check_gather,
    check_keep,
    check_options,
    check_weights,
)


class CLIPEraseLoss(nn.Module):
    """Compute the CLIPErase loss (arXiv 2410.23330) with fixed options; the module has no parameters and no state.

    `functional.cliperase_loss` describes the options, formulas and shapes. The constructor raises InputError for a
    wrong option.

    process_group: "local": the batch is this process's own, under torchrun too; "world": it is spread over all
    processes of torch.distributed, which must be initialised when the loss is called, but not before; or a
    ProcessGroup. Every rank has such a module and calls it with its part of the batch. Gradients are right after
    DistributedDataParallel has averaged them, see `cliperase_fast.functional`. torch.distributed.group.WORLD is None
    before init_process_group(), so None raises InputError among several processes.
    """

    def __init__(
        self,
        lambda_retain: float = 1.0,
        lambda_forget: float = 3.0,
        lambda_consistency: float = 3.0,
        *,
        forget: str = "cosine",
        margin: float = 0.0,
        consistency: str = "logits",
        process_group: Any = LOCAL,
        gather: str = "all",
        backend: str = "auto",
        keep: str = "auto",
    ) -> None:
        super().__init__()
        check_options(lambda_retain, lambda_forget, lambda_consistency, forget, margin, consistency)
        _check_how(process_group, gather, backend, keep)
        self.lambda_retain = lambda_retain
        self.lambda_forget = lambda_forget
        self.lambda_consistency = lambda_consistency
        self.forget = forget
        self.margin = margin
        self.consistency = consistency
        self.process_group = process_group
        self.gather = gather
        self.backend = backend
        self.keep = keep

    def forward(
        self,
        forget_image: Tensor,
        forget_text: Tensor,
        retain_image: Tensor,
        retain_text: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        logit_scale: Tensor | float,
        teacher_logit_scale: Tensor | float | None,
        *,
        group_ids: Tensor | None = None,
    ) -> LossTerms:
        """Return LossTerms(total, retain, forget, consistency); call backward on `total`.

        Features are L2-normalised: forget_* [M, D], retain_* [N, D], teacher_* [N, D°] without gradient.
        Scales are already exponentiated. group_ids: int64 [N], see `functional.cliperase_loss`.
        """
        return cliperase_loss(
            forget_image, forget_text, retain_image, retain_text, teacher_image, teacher_text,
            logit_scale, teacher_logit_scale,
            lambda_retain=self.lambda_retain, lambda_forget=self.lambda_forget,
            lambda_consistency=self.lambda_consistency, forget=self.forget, margin=self.margin,
            consistency=self.consistency, group_ids=group_ids, process_group=self.process_group,
            gather=self.gather, backend=self.backend, keep=self.keep,
        )  # fmt: skip

    def extra_repr(self) -> str:
        margin = f", margin={self.margin}" if self.forget == "hinge" else ""
        return (
            f"lambda_retain={self.lambda_retain}, lambda_forget={self.lambda_forget}, "
            f"lambda_consistency={self.lambda_consistency}, forget={self.forget!r}{margin}, "
            f"consistency={self.consistency!r}, {_how(self)}"
        )


class CalibratedLoss(nn.Module):
    """Compute the loss of calibrated forgetting with fixed options; the module has no parameters and no state.

    `functional.calibrated_loss` describes the options, formulas and shapes; process_group is as in `CLIPEraseLoss`. The
    loss needs the student's features of one joint batch, so it works behind a gradient cache and with sharded models.
    The constructor raises InputError for a wrong option.
    """

    def __init__(
        self,
        lambda_retain: float = 1.0,
        lambda_forget: float = 3.0,
        lambda_consistency: float = 3.0,
        lambda_anchor: float = 30.0,
        *,
        process_group: Any = LOCAL,
        gather: str = "all",
        backend: str = "auto",
        keep: str = "auto",
    ) -> None:
        super().__init__()
        weights = (lambda_retain, lambda_forget, lambda_consistency, lambda_anchor)
        check_weights(dict(zip(CALIBRATED_WEIGHTS, weights, strict=True)))
        _check_how(process_group, gather, backend, keep)
        self.lambda_retain = lambda_retain
        self.lambda_forget = lambda_forget
        self.lambda_consistency = lambda_consistency
        self.lambda_anchor = lambda_anchor
        self.process_group = process_group
        self.gather = gather
        self.backend = backend
        self.keep = keep

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        teacher_image: Tensor,
        teacher_text: Tensor,
        logit_scale: Tensor | float,
        teacher_logit_scale: Tensor | float,
        *,
        forget_mask: Tensor,
        group_ids: Tensor | None = None,
        background_image: Tensor | None = None,
        background_text: Tensor | None = None,
    ) -> CalibratedTerms:
        """Return CalibratedTerms(total, retain, forget, consistency, anchor); call backward on `total`.

        Features are L2-normalised: image_features, text_features [P, D], teacher_* [P, D°] without gradient. Scales are
        already exponentiated. forget_mask: bool [P]; group_ids: int64 [P]; background_*: [P], cosines, see
        `functional.calibrated_loss`.
        """
        return calibrated_loss(
            image_features, text_features, teacher_image, teacher_text, logit_scale, teacher_logit_scale,
            forget_mask=forget_mask, group_ids=group_ids, background_image=background_image,
            background_text=background_text, lambda_retain=self.lambda_retain, lambda_forget=self.lambda_forget,
            lambda_consistency=self.lambda_consistency, lambda_anchor=self.lambda_anchor,
            process_group=self.process_group, gather=self.gather, backend=self.backend, keep=self.keep,
        )  # fmt: skip

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={getattr(self, name)}" for name in CALIBRATED_WEIGHTS)
        return f"{weights}, {_how(self)}"


def _check_how(process_group: Any, gather: str, backend: str, keep: str) -> None:
    check_keep(keep)
    check_gather(gather)
    check_process_group(process_group)
    check_backend_name(backend)


def _how(loss: CLIPEraseLoss | CalibratedLoss) -> str:
    """Return the options of `_check_how` for a repr."""
    group = loss.process_group
    shared = "" if group in (None, LOCAL) else f", process_group={group!r}, gather={loss.gather!r}"
    return f"backend={loss.backend!r}, keep={loss.keep!r}{shared}"
