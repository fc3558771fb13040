"""Make batches to time losses on, and check a loss and its gradients against float64 on a small batch of the same kind.

Two kinds of data:

    peaked   like a trained model's, scale 100: a pair's cosine is about 0.3 above that of unrelated ones; each pair has
             seven siblings of the same concept, about 0.24 above, so that the loss is small but not zero
    random   like an untrained model's, scale 14: nothing is related

The teacher's features are the student's, perturbed: a model that has begun to unlearn. The forget batch has N/8 pairs.

Losses: "cliperase" is RM + 3 FM + 3 CM (retention, forgetting, consistency); "clip" RM alone, the contrastive loss of
CLIP; "siglip" the sigmoid loss of SigLIP (arXiv 2303.15343), with a bias that makes pairs likely and siblings unlikely;
"calibrated" the loss of calibrated forgetting with its default weights, of N pairs of which the first N/8 are to go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.contrastive import sigmoid_loss

SCALE = {"peaked": 100.0, "random": 14.0}
DATA = tuple(SCALE)
BIAS = {"peaked": -27.0, "random": -10.0}  # of the sigmoid loss: between pairs and siblings; SigLIP's at its start
LOSSES = ("cliperase", "clip", "siglip", "calibrated")
WEIGHTS = (1.0, 3.0, 3.0)  # of RM, FM and CM: the paper's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

CHECK_ROWS = 512
# Relative errors that pass. Half precision: losses that materialise logits near 30 in bfloat16 are off by up to 1/16; a
# wrong formula is further off. This package's own losses must be ten times better. The results contain the errors.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_SIBLINGS = 8
_CONCEPT, _ITEM = 0.24, 0.06  # shares of a feature's squared length
_DRIFT = 0.2  # length of what the student has moved from the teacher


@dataclass(frozen=True)
class Case:
    """What is computed on what."""

    loss: str
    data: str
    dtype: str
    n: int
    width: int

    @property
    def products(self) -> int:
        """Products of 2 N² D FLOP that no method without an N x N matrix can avoid: the floor."""
        return {"cliperase": 6, "clip": 4, "siglip": 3, "calibrated": 6}[self.loss]

    @property
    def forward_products(self) -> int:
        """How many of them the forward pass needs: S, and S° with a teacher.

        The sigmoid loss needs no sum over a row before its gradient, so nothing has to be formed again.
        """
        return 2 if self.loss in ("cliperase", "calibrated") else 1

    @property
    def flop(self) -> float:
        return self.products * 2.0 * self.n**2 * self.width

    def __str__(self) -> str:
        return f"{self.loss}, {self.data} data, {self.dtype}, D = {self.width}, N = {self.n:,}"


class Batch(NamedTuple):
    """Features [N, D] (the forget batch's [N/8, D]), 0-d scales and bias; None where the loss has no such thing."""

    image: Tensor
    text: Tensor
    scale: Tensor
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    teacher_scale: Tensor | None = None
    forget_image: Tensor | None = None
    forget_text: Tensor | None = None
    bias: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None and tensor.requires_grad}

    def to(self, dtype: torch.dtype, device: str) -> Batch:
        """A copy; the scales never in half precision."""
        moved = {
            name: tensor.detach()
            .to(device, torch.promote_types(dtype, torch.float32) if tensor.ndim == 0 else dtype)
            .requires_grad_(tensor.requires_grad)
            for name, tensor in self._asdict().items()
            if tensor is not None
        }
        return Batch(**moved)


Loss = Callable[..., Tensor]  # called with the fields of a Batch


def make_batch(case: Case, device: str, seed: int = 0) -> Batch:
    """Features are normalised, then rounded to the dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, data = DTYPES[case.dtype], case.data

    def noise(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.width, generator=generator, device=device), dim=1)

    def pairs(rows: int) -> tuple[Tensor, Tensor]:
        if data == "random":
            return noise(rows), noise(rows)
        concept = noise(-(-rows // _SIBLINGS)).repeat_interleave(_SIBLINGS, 0)[:rows]
        shared = concept.mul_(_CONCEPT**0.5).add_(noise(rows), alpha=_ITEM**0.5)
        alone = (1 - _CONCEPT - _ITEM) ** 0.5
        image, text = (F.normalize(torch.add(shared, noise(rows), alpha=alone), dim=1) for _ in range(2))
        return image, text

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).requires_grad_()

    scale = torch.tensor(SCALE[data], device=device, dtype=torch.promote_types(dtype, torch.float32))
    image, text = pairs(case.n)
    if case.loss not in ("cliperase", "calibrated"):
        bias = torch.full_like(scale, BIAS[data]).requires_grad_() if case.loss == "siglip" else None
        return Batch(rounded(image), rounded(text), scale.requires_grad_(), bias=bias)
    teacher_image, teacher_text = (
        F.normalize(torch.add(own, noise(case.n), alpha=_DRIFT), dim=1).to(dtype) for own in (image, text)
    )
    student = rounded(image), rounded(text), scale.clone().requires_grad_()
    batch = Batch(*student, teacher_image, teacher_text, scale)
    if case.loss == "calibrated":
        return batch
    forget_image, forget_text = map(rounded, pairs(forgotten(case.n)))
    return batch._replace(forget_image=forget_image, forget_text=forget_text)


def forgotten(n: int) -> int:
    """Return how many pairs are forgotten: of a batch of their own, or the first ones of a joint batch."""
    return max(1, n // 8)


def gradients(loss: Loss, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss, and the gradient of every leaf; None where the loss gives none."""
    value = loss(*batch)
    leaves = batch.leaves()
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class Truth:
    """float64. entropy: of the teacher's rows plus of its columns, mean; what a cross-entropy adds to a divergence."""

    loss: float
    entropy: float
    grads: dict[str, Tensor]
    masses: dict[str, float]  # of the scalars, whose gradients are sums that may cancel: Σ of the terms' sizes


def truth(batch: Batch) -> Truth:
    """In float64, from the batch's own (rounded) numbers: the sigmoid loss by its formula, others by "eager"."""
    exact = batch.to(torch.float64, "cpu")
    loss, found = gradients(functional_loss("eager") if exact.bias is None else sigmoid_formula, exact)
    grads = {name: grad for name, grad in found.items() if grad is not None}
    entropy = 0.0
    if exact.teacher_image is not None:
        assert exact.teacher_text is not None and exact.teacher_scale is not None
        teacher = exact.teacher_scale * exact.teacher_image @ exact.teacher_text.T
        for logits in (teacher, teacher.T):
            entropy -= (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()
    masses = {"scale": ((grads["image"] * exact.image).sum(1).abs().sum() / exact.scale).item()}
    if exact.bias is not None:
        masses["bias"] = 2.0  # a pair's term is at most 1, and those of all others no more at the optimum
    return Truth(loss.item(), entropy, grads, masses)


def sigmoid_formula(*fields: Any) -> Tensor:
    """SigLIP's loss as it is written down (algorithm 1), with all N x N logits: mean_i Σ_j -log sigmoid(z_ij X_ij)."""
    b = Batch(*fields)
    assert b.bias is not None
    logits = b.scale * b.image @ b.text.T + b.bias  # [N, N]
    labels = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def functional_loss(backend: str, **options: Any) -> Loss:
    """The public function of this package for a batch.

    It is `sigmoid_loss` with a bias, `clip_loss` without a teacher, `calibrated_loss` without a batch of forget pairs,
    and `cliperase_loss`.
    """
    retain, forget, consistency = WEIGHTS

    def loss(*fields: Any) -> Tensor:
        b = Batch(*fields)
        if b.bias is not None:
            return sigmoid_loss(b.image, b.text, b.scale, b.bias, backend=backend)
        if b.teacher_image is None:
            return functional.clip_loss(b.image, b.text, b.scale, backend=backend, **options)
        assert b.teacher_text is not None and b.teacher_scale is not None
        if b.forget_image is None:
            mask = torch.arange(len(b.image), device=b.image.device) < forgotten(len(b.image))
            return functional.calibrated_loss(
                b.image, b.text, b.teacher_image, b.teacher_text, b.scale, b.teacher_scale, forget_mask=mask,
                backend=backend, **options,
            ).total  # fmt: skip
        assert b.forget_text is not None
        return functional.cliperase_loss(
            b.forget_image, b.forget_text, b.image, b.text, b.teacher_image, b.teacher_text, b.scale, b.teacher_scale,
            lambda_retain=retain, lambda_forget=forget, lambda_consistency=consistency, backend=backend, **options,
        ).total  # fmt: skip

    return loss


def errors(loss: Loss, batch: Batch, exact: Truth, adds_entropy: bool, scale_gradient: bool) -> dict[str, float]:
    """Relative errors: of the loss, of each gradient by its norm; of a scalar's against the terms it sums.

    inf where a gradient is missing (the scale's may be, for a provider that has none).
    """
    value, found = gradients(loss, batch)
    expected = exact.loss + (WEIGHTS[2] * exact.entropy if adds_entropy else 0.0)
    result = {"loss": abs(value.double().item() - expected) / abs(expected)}
    for name, grad in exact.grads.items():
        if name == "scale" and not scale_gradient:
            continue
        own = found[name]
        size = exact.masses.get(name) or grad.norm().item()
        result[name] = float("inf") if own is None else (own.cpu().double() - grad).norm().item() / size
    return result
