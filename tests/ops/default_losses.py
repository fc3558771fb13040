"""Every public loss in all its options, as functions of a backend: values and gradients. Inputs are made beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from sweep_cases import random_batch
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.contrastive import distill_clip_loss, local_clip_loss, sigmoid_loss

N = 20
Case = Callable[[str, torch.dtype], list[Tensor]]


@cache
def _inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch = random_batch(N, 24, 17).to(dtype)
    ids = torch.arange(N, dtype=torch.int64, device="cpu") // 2
    assert batch.teacher_image is not None and batch.teacher_text is not None and batch.teacher_scale is not None
    return batch.image, batch.text, batch.scale, batch.teacher_image, batch.teacher_text, batch.teacher_scale, ids


def _run(loss: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, number: bool = False) -> list[Tensor]:
    """Values, and the gradients of the first; number: the scale as a Python number."""
    image, text, scale, *rest = _inputs(dtype)
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    if not number:
        leaves.append(scale.clone().requires_grad_())
    values = loss(*leaves, *[scale.item()] * number, *rest)
    values[0].backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [*(value.detach() for value in values), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _clip(
    backend: str, dtype: torch.dtype, keep: str = "auto", groups: bool = False, number: bool = False
) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor | float, *rest: Tensor) -> tuple[Tensor, ...]:
        ids = rest[-1] if groups else None
        return (functional.clip_loss(image, text, scale, group_ids=ids, backend=backend, keep=keep),)

    return _run(loss, dtype, number)


def _kl(backend: str, dtype: torch.dtype, keep: str = "auto", number: bool = False) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor | float, *rest: Tensor) -> tuple[Tensor, ...]:
        teacher = (*rest[:2], rest[2].item() if number else rest[2])
        return (functional.similarity_kl(image, text, scale, *teacher, backend=backend, keep=keep),)

    return _run(loss, dtype, number)


def _cliperase(
    backend: str, dtype: torch.dtype, forget: str, consistency: str, groups: bool, keep: str
) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        teacher = (image.detach().flip(0), text.detach().flip(0)) if consistency == "features" else rest[:2]
        return functional.cliperase_loss(
            image[:7], text[:7], image, text, *teacher, scale, rest[2], forget=forget, margin=0.1,
            consistency=consistency, group_ids=rest[3] if groups else None, backend=backend, keep=keep,
        )  # fmt: skip

    return _run(loss, dtype)


def _calibrated(
    backend: str, dtype: torch.dtype, groups: bool, keep: str, number: bool = False, background: bool = False
) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor | float, *rest: Tensor) -> tuple[Tensor, ...]:
        levels = (rest[0][:, 0], rest[1][:, 1]) if background else (None, None)
        return functional.calibrated_loss(
            image, text, *rest[:2], scale, rest[2].item() if number else rest[2], forget_mask=rest[3] % 3 == 1,
            group_ids=rest[3] if groups else None, background_image=levels[0], background_text=levels[1],
            backend=backend, keep=keep,
        )  # fmt: skip

    return _run(loss, dtype, number)


def _empty(backend: str, dtype: torch.dtype) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return (functional.clip_loss(image[:0], text[:0], scale, backend=backend),)

    return _run(loss, dtype)


def _sigmoid(backend: str, dtype: torch.dtype, number: bool = False, negative_only: bool = False) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor | float, *rest: Tensor) -> tuple[Tensor, ...]:
        bias = -5.0 if number else -0.5 * rest[2]
        return (sigmoid_loss(image, text, scale, bias, backend=backend, negative_only=negative_only),)

    return _run(loss, dtype, number)


def _distill(backend: str, dtype: torch.dtype) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        contrastive, distill = distill_clip_loss(image, text, scale, *rest[:3], backend=backend)
        return contrastive + distill, contrastive, distill

    return _run(loss, dtype)


def _local(backend: str, dtype: torch.dtype) -> list[Tensor]:
    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        contrastive, distill = local_clip_loss(
            image[:9], text, scale, 3, teacher_query=rest[0][:9], teacher_keys=rest[1], teacher_logit_scale=rest[2]
        )
        return contrastive + distill, contrastive, distill

    return _run(loss, dtype)


CASES: dict[str, Case] = {
    "clip, nothing kept": partial(_clip, keep="nothing"),
    "clip, similarities kept": partial(_clip, keep="similarities"),
    "clip, groups": partial(_clip, groups=True),
    "clip, a number for the scale": partial(_clip, number=True),
    "clip, no pairs": _empty,
    "similarity_kl, nothing kept": partial(_kl, keep="nothing"),
    "similarity_kl, similarities kept": partial(_kl, keep="similarities"),
    "similarity_kl, numbers for the scales": partial(_kl, number=True),
    **{
        f"cliperase, {forget}, {consistency}": partial(
            _cliperase, forget=forget, consistency=consistency, groups=forget == "hinge", keep=keep
        )
        for forget, keep in (("cosine", "auto"), ("hinge", "similarities"), ("contrastive", "nothing"))
        for consistency in ("logits", "features", "intra")
    },
    "calibrated": partial(_calibrated, groups=True, keep="nothing"),
    "calibrated, levels given": partial(_calibrated, groups=True, keep="similarities", background=True),
    "calibrated, no groups, numbers": partial(_calibrated, groups=False, keep="auto", number=True),
    "sigmoid": _sigmoid,
    "sigmoid, numbers": partial(_sigmoid, number=True),
    "sigmoid, other texts": partial(_sigmoid, negative_only=True),
    "distillation": _distill,
    "own rows": _local,
}
