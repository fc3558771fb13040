"""Replace open_clip's losses by fused subclasses with the same arguments and results, and no N x N matrix.

A call with unknown arguments, from a newer open_clip, goes to open_clip's own forward. The fused losses compute in
float32 or float64, and return at least float32, under autocast too, where open_clip rounds its similarities to half
precision. The teacher gets no gradient. CLIPERASE_BACKEND chooses the backend.

Several ranks: with L the loss of the whole batch, F a rank's features and W the number of ranks, open_clip computes

    local_loss  gather_with_grad   value on a rank         gradient of F   gradient of the scale
    no          yes                L                       W dL/dF         dL/ds
    no          no                 L                       dL/dF           dL/ds
    yes         yes                of own rows, columns    W dL/dF         its mean over ranks is dL/ds
    yes         no                 of own rows, columns    of own rows and columns only, others' features constant

The first three use one sweep sharded over the ranks, where each rank forms only its own rows. There the gradients of
the scale differ between ranks, and their mean is dL/ds. So after DistributedDataParallel has averaged them, all
gradients equal open_clip's. The last one, horovod, and CLIPERASE_BACKEND=eager gather the features as open_clip does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cliperase_fast.contrastive import distill_clip_loss, local_clip_loss, sigmoid_loss
from cliperase_fast.extras import require_version
from cliperase_fast.functional import contrast
from cliperase_fast.validation import auto_shards


def check_version() -> None:
    """Raise InputError if open_clip is missing or has an unsupported version."""
    require_version("open_clip_torch", ">=3.0,<5.0")


check_version()

from open_clip import loss as stock  # noqa: E402 - check_version gives a better message than an ImportError


def _original(name: str) -> Any:
    """Return open_clip's own class, even if its name has since been rebound to a subclass."""
    current = getattr(stock, name)
    return next(kind for kind in current.__mro__ if (kind.__module__, kind.__name__) == (stock.__name__, name))


StockClipLoss: Any = _original("ClipLoss")
StockDistillClipLoss: Any = _original("DistillClipLoss")
StockSigLipLoss: Any = _original("SigLipLoss")


def _overridden(loss: torch.nn.Module, base: type, *methods: str) -> bool:
    """Return whether a subclass overrides methods that the fused loss would not call."""
    return any(getattr(type(loss), method) is not getattr(base, method) for method in methods)


def _is_constant(bias: Tensor | float | None) -> bool:
    return not isinstance(bias, Tensor) or bias.numel() == 1


class _DividedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def _sharding(loss: Any, **options: Any) -> dict[str, Any]:
    """Return the group and `options` if the loss's ranks are those of this run and the backend supports a group."""
    if loss.world_size == 1 or not auto_shards() or not dist.is_initialized():
        return {}
    if (dist.get_rank(), dist.get_world_size()) != (loss.rank, loss.world_size):
        return {}
    return {"process_group": dist.group.WORLD, **options}


class GatheredFeatures:
    """Handle several ranks, for the losses that gather features."""

    rank: int
    world_size: int
    local_loss: bool
    gather_with_grad: bool
    use_horovod: bool = False  # removed in open_clip 4

    def _shared(self) -> dict[str, Any]:
        """Return the options that shard the sweep over these ranks with open_clip's values; empty if it must not be."""
        if self.use_horovod or (self.local_loss and not self.gather_with_grad):
            return {}
        return _sharding(self, own_values=self.local_loss)

    def _with_gradients(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return features for the sharded sweep, whose gradients have the magnitude of open_clip's."""
        if self.gather_with_grad:
            return image, text
        return _DividedGradient.apply(image, self.world_size), _DividedGradient.apply(text, self.world_size)

    def _gathered(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return all ranks' features [N, D], as open_clip gathers them."""
        if self.world_size == 1:
            return image, text
        return stock.gather_features(
            image,
            text,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
            **({"use_horovod": True} if self.use_horovod else {}),
        )

    @property
    def _only_own_rows(self) -> bool:
        return self.world_size > 1 and self.local_loss

    def _local(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        teacher: tuple[Tensor, Tensor] | None = None,
        teacher_scale: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the mean (contrastive, distill) of own images against all texts and own texts against all images."""
        all_image, all_text = self._gathered(image, text)
        first = self.rank * len(image)
        directions: list[tuple[Tensor, Tensor, dict[str, Any]]] = [(image, all_text, {}), (text, all_image, {})]
        if teacher is not None:
            all_teacher = self._gathered(*teacher)
            for modality, (_, _, options) in enumerate(directions):
                options["teacher_query"], options["teacher_keys"] = teacher[modality], all_teacher[1 - modality]
                options["teacher_logit_scale"] = teacher_scale
        losses = [local_clip_loss(query, keys, scale, first, **options) for query, keys, options in directions]
        contrastive, distill = (0.5 * (of_images + of_texts) for of_images, of_texts in zip(*losses, strict=True))
        return contrastive, distill


class ClipLoss(GatheredFeatures, StockClipLoss):
    """Compute `open_clip.loss.ClipLoss`, streamed: memory grows as N, not N².

    logit_bias shifts all similarities equally, so it changes neither the loss nor its gradients (its own is 0).
    open_clip computes a bias of several elements and a subclass that overrides `get_logits` or `get_ground_truth`.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Return the loss, 0-d, or {"contrastive_loss": loss}. Features [n, D]; logit_scale already exponentiated."""
        own = _overridden(self, StockClipLoss, "get_logits", "get_ground_truth")
        if own or options or not _is_constant(logit_bias):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict, **options)
        if shared := self._shared():
            features = self._with_gradients(image_features, text_features)
            loss = contrast("clip_loss", *features, logit_scale, **shared)[0]
        elif self._only_own_rows:
            loss = self._local(image_features, text_features, logit_scale)[0]
        else:
            loss = contrast("clip_loss", *self._gathered(image_features, text_features), logit_scale)[0]
        if isinstance(logit_bias, Tensor):  # DDP waits for the gradient of this parameter
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(GatheredFeatures, StockDistillClipLoss):
    """Compute `open_clip.loss.DistillClipLoss`, streamed: memory grows as N, not N².

    distill_loss is open_clip's cross-entropy: `functional.similarity_kl` halved, plus half of the teacher's entropies.
    open_clip computes a subclass that overrides `get_logits`, `get_ground_truth` or `dist_loss`.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Return (contrastive, distill), or a dict of both. dist_*: the frozen teacher's features and scale."""
        student = (image_features, text_features)
        teacher = (dist_image_features, dist_text_features)
        if options or _overridden(self, StockDistillClipLoss, "get_logits", "get_ground_truth", "dist_loss"):
            return super().forward(*student, logit_scale, *teacher, dist_logit_scale, output_dict, **options)
        if shared := self._shared():
            image, text = self._with_gradients(*student)
            contrastive, distill = distill_clip_loss(image, text, logit_scale, *teacher, dist_logit_scale, **shared)
        elif self._only_own_rows:
            contrastive, distill = self._local(*student, logit_scale, teacher, dist_logit_scale)
        else:
            contrastive, distill = distill_clip_loss(
                *self._gathered(*student), logit_scale, *self._gathered(*teacher), dist_logit_scale
            )
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)


class SigLipLoss(StockSigLipLoss):
    """Compute `open_clip.loss.SigLipLoss`, fused: memory grows as N, not N².

    On several ranks the texts pass round a ring for every `dist_impl`, since they differ in rounding only; with
    "gather" each rank holds all texts. open_clip computes a bias of several elements and a subclass that overrides
    `get_logits`, `get_ground_truth` or `_loss`.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Return the loss of own images, 0-d, or {"contrastive_loss": loss}. Features [n, D]; scale exponentiated."""
        shared = _sharding(self, own_values=True, gather="all" if self.dist_impl == "gather" else "ring")
        if not shared or options or not self._fuses(logit_bias) or _overridden(self, SigLipLoss, "_loss"):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict, **options)
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, **shared)
        return {"contrastive_loss": loss} if output_dict else loss

    def _fuses(self, logit_bias: Tensor | float | None) -> bool:
        return not _overridden(self, StockSigLipLoss, "get_logits", "get_ground_truth") and _is_constant(logit_bias)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        if not self._fuses(logit_bias):
            return super()._loss(image_features, text_features, logit_scale, logit_bias, negative_only)
        return sigmoid_loss(image_features, text_features, logit_scale, logit_bias, negative_only=negative_only)
