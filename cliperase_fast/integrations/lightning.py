"""A LightningModule that trains a two-tower model with CLIPErase."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.extras import require_version
from cliperase_fast.losses import CLIPEraseLoss

require_version("lightning", ">=2.4,<3.0", extra="lightning")

import lightning  # noqa: E402 - the check above has a better message than an ImportError

_DIGEST_KEY = "cliperase_fast_teacher"


class UnlearningModule(lightning.LightningModule):
    """Train `model` to forget, on batches {"forget": (images, texts), "retain": (images, texts)}.

    `CombinedLoader({"forget": ..., "retain": ...}, "max_size_cycle")` yields such batches, and so does a dict of
    loaders.
    model: a module with `encode_image`, `encode_text` and `logit_scale` (the logarithm), such as open_clip's; its
        features are normalised here. Models with a `logit_bias` (SigLIP) are refused.
    teacher: the frozen original; None copies `model` as it is now. It stays in evaluation mode, is not saved in
        checkpoints, follows this module to its device and dtype, and is checked by a digest when a checkpoint is
        loaded.
    loss: a CLIPEraseLoss; None uses its defaults.
    optimizer: parameters -> optimizer; None uses Adam at the paper's 1e-6.

    With several processes each computes the loss of its own batch; with CLIPEraseLoss(process_group="world") that of
    all batches.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        loss: CLIPEraseLoss | None = None,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        for given in (model, model if teacher is None else teacher):
            for name in ("encode_image", "encode_text", "logit_scale"):
                if not hasattr(given, name):
                    raise InputError(f"{type(given).__name__} has no {name}; wrap it in a module that has one")
            if getattr(given, "logit_bias", None) is not None:
                raise InputError(
                    f"{type(given).__name__} has a logit_bias, so it was trained with the sigmoid loss, for which "
                    "CLIPEraseLoss is not defined; use cliperase_fast.unlearn(), which has a loss for such models"
                )
        self.model = model
        frozen = copy.deepcopy(model) if teacher is None else teacher
        if {id(tensor) for tensor in frozen.parameters()} & {id(tensor) for tensor in model.parameters()}:
            raise InputError("teacher shares weights with model, which would be frozen; omit it or pass a copy")
        self._teacher = [frozen.eval().requires_grad_(False)]  # in a list, to keep it out of the state dict and DDP
        self._teacher_digest = _digest(frozen)  # before any change of dtype
        self.loss = CLIPEraseLoss() if loss is None else loss
        self._optimizer = optimizer

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        teacher: Any = self._followed()
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
        if self._optimizer is not None:
            optimizer = self._optimizer(parameters)
            _warn_of_lost_eps(optimizer)
            return optimizer
        half = {parameter.dtype for parameter in parameters} & {torch.float16, torch.bfloat16}
        if half:
            dtype = str(next(iter(half))).removeprefix("torch.")
            warnings.warn(
                f"the weights are {dtype}, so steps of Adam at 1e-6 are mostly lost to rounding; use a Trainer with "
                "precision='bf16-mixed' or '32-true', or pass an optimizer with a larger learning rate",
                stacklevel=2,
            )
        return torch.optim.Adam(parameters, lr=1e-6, eps=1e-4 if half else 1e-8)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_DIGEST_KEY] = self._teacher_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(_DIGEST_KEY)
        if saved is not None and self._teacher_digest is not None and saved != self._teacher_digest:
            raise InputError(
                "the teacher is not the one that this checkpoint was trained with; build the UnlearningModule from the "
                "original model, not from a trained one, or pass the original as teacher="
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnlearningModule:
        """Apply every .to(), .half() and .cuda() of this module, Lightning's included, to the teacher too."""
        super()._apply(fn, recurse)
        self._teacher[0]._apply(fn)
        return self

    def _followed(self) -> nn.Module:
        """Return the teacher on the student's device and in its dtypes, even if only the student was moved."""
        teacher = self._teacher[0].to(self.device)
        student = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
            twin = student.get(name)
            if twin is not None and tensor.is_floating_point() and tensor.dtype != twin.dtype:
                tensor.data = tensor.data.to(twin.dtype)
        return teacher

    @staticmethod
    def _features(model: Any, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, texts = pairs
        return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(texts), dim=-1)


def _warn_of_lost_eps(optimizer: torch.optim.Optimizer) -> None:
    """Warn if Adam's eps is 0 in the weights' dtype: dividing by sqrt(v) + eps is then NaN without a gradient."""
    for group in optimizer.param_groups:
        eps = group.get("eps", 1.0)
        dtypes = {parameter.dtype for parameter in group["params"]}
        lost = any(eps > 0 and torch.tensor(eps, dtype=dtype, device="cpu") == 0 for dtype in dtypes)
        if not group.get("fused") and lost:
            name = type(optimizer).__name__
            warnings.warn(
                f"{name}'s eps={eps} is 0 in float16, so weights without a gradient become NaN; pass eps=1e-4, or use "
                "a Trainer with precision='16-mixed'",
                stacklevel=3,
            )
            return


def _digest(model: nn.Module) -> str | None:
    """Return a digest of all weights; None if they have no data yet (device meta)."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            return None
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
