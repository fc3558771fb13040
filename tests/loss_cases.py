"""Define every public loss with its options as a function of (image, text, scale)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.contrastive import distill_clip_loss, local_clip_loss, sigmoid_loss
from cliperase_fast.functional import calibrated_loss, clip_loss, cliperase_loss, similarity_kl
from cliperase_fast.ops import backends

N = 33  # inductor compiles smaller matrices differently
WIDTH = 8
GROUPS = torch.arange(N) % 12
FORGET = GROUPS % 5 == 1  # among the first rows, and others
# triton has its own tests, which run in its interpreter
BACKENDS = tuple(name for name in ("eager", "torch", "native") if backends()[name].available)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(N, WIDTH, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(image, text, scale), leaves."""
    scale = torch.tensor(10.0, dtype=dtype)
    return rows(1, dtype).requires_grad_(), rows(2, dtype).requires_grad_(), scale.requires_grad_()


def losses(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """By name; the rows' losses of `local_clip_loss` have one backend only."""
    frozen = (rows(3, dtype), rows(4, dtype), 5.0)

    def local(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        own = {"teacher_query": frozen[0][1:4], "teacher_keys": frozen[1], "teacher_logit_scale": 5.0}
        contrastive, distill = local_clip_loss(image[1:4], text, scale, 1, **own)
        return contrastive + 0.5 * distill

    def distill(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        contrastive, distilled = distill_clip_loss(image, text, scale, *frozen, backend=backend)
        return contrastive + 0.5 * distilled

    def cliperase(forget: str, consistency: str, group_ids: Tensor | None) -> Loss:
        def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return cliperase_loss(
                image[:3], text[:3], image, text, frozen[0], frozen[1], scale, frozen[2], forget=forget, margin=0.01,
                consistency=consistency, group_ids=group_ids, backend=backend,
            ).total  # fmt: skip

        return loss

    def calibrated(group_ids: Tensor | None) -> Loss:
        def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return calibrated_loss(
                image, text, *frozen[:2], scale, frozen[2], forget_mask=FORGET, group_ids=group_ids, backend=backend
            ).total

        return loss

    return {
        "clip": lambda image, text, scale: clip_loss(image, text, scale, backend=backend),
        "kl": lambda image, text, scale: similarity_kl(image, text, scale, *frozen, backend=backend),
        "distill": distill,
        "local": local,
        "sigmoid": lambda image, text, scale: sigmoid_loss(image, text, scale, -3.0, backend=backend),
        "cliperase": cliperase("cosine", "logits", GROUPS),
        "hinge, features": cliperase("hinge", "features", None),
        "contrastive, intra": cliperase("contrastive", "intra", None),
        "calibrated": calibrated(GROUPS),
        "calibrated, no groups": calibrated(None),
    }


def gradients(loss: Loss, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The loss and its gradients with respect to image, text and scale."""
    leaves = inputs(dtype)
    value = loss(*leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves))
