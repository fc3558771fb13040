"""Lightning: CLIPErase as the training step of a LightningModule with two towers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.integrations.versions import require
from cliperase_fast.losses import CLIPEraseLoss

require("lightning", (2, 4), (3, 0), install="cliperase_fast[lightning]")

import lightning  # noqa: E402 - the line above says more than an ImportError


class UnlearningModule(lightning.LightningModule):
    """Trains `model` to forget: batches are {"forget": (images, texts), "retain": (images, texts)}.

    That is what `CombinedLoader({"forget": ..., "retain": ...}, "max_size_cycle")` gives, or a dict of loaders.
    model: a module with `encode_image`, `encode_text` and `logit_scale` (its logarithm), such as open_clip's; its
    features are normalised here. teacher: the frozen original, a copy of `model` now if None; it stays in evaluation
    mode and out of the checkpoints. loss: a CLIPEraseLoss, its defaults if None.
    optimizer: parameters -> optimizer, Adam at the paper's 1e-6 if None.
    With several processes each takes the loss of its own batch.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        loss: CLIPEraseLoss | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        for name in ("encode_image", "encode_text", "logit_scale"):
            if not hasattr(model, name):
                raise InputError(f"{type(model).__name__} has no {name}; wrap it in a module that has")
        self.model = model
        frozen = copy.deepcopy(model) if teacher is None else teacher
        self._teacher = [frozen.eval().requires_grad_(False)]  # in a list: no part of the state dict, nor of DDP
        self.loss = CLIPEraseLoss() if loss is None else loss
        self._optimizer = optimizer

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        teacher: Any = self._teacher[0].to(self.device)
        forget, retain = (self._features(self.model, batch[part]) for part in ("forget", "retain"))
        with torch.no_grad():
            consistent = self._features(teacher, batch["retain"])
            teacher_scale = teacher.logit_scale.exp()
        model: Any = self.model
        terms = self.loss(*forget, *retain, *consistent, model.logit_scale.exp(), teacher_scale)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in terms._asdict().items()},
            batch_size=len(forget[0]) + len(retain[0]),
        )
        return terms.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(parameters, lr=1e-6) if self._optimizer is None else self._optimizer(parameters)

    @staticmethod
    def _features(model: Any, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = pairs
        return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(texts), dim=-1)
