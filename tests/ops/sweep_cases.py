"""Shared by the tests of the loss sweep: batches, and a second, naive writing of the formulas."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops import backends
from cliperase_fast.ops.spec import SimilarityInputs, Sweep

# those that run everywhere and in float64
BACKENDS = tuple(name for name, status in backends().items() if status.available and status.devices == "any")
# and those that stop at float32; triton, in its interpreter, has tests of its own
CPU_BACKENDS = (*BACKENDS, *(name for name in ("native",) if backends()[name].available))


class Batch(SimilarityInputs):
    """Inputs of a sweep over a whole batch."""

    def to(self, dtype: torch.dtype) -> Batch:
        """The features in `dtype`, the scales in it too unless it is a half precision."""
        scale_dtype = torch.promote_types(dtype, torch.float32)
        return replace(
            self,
            image=self.image.to(dtype),
            text=self.text.to(dtype),
            scale=self.scale.to(scale_dtype),
            teacher_image=None if self.teacher_image is None else self.teacher_image.to(dtype),
            teacher_text=None if self.teacher_text is None else self.teacher_text.to(dtype),
            teacher_scale=None if self.teacher_scale is None else self.teacher_scale.to(scale_dtype),
        )

    def without_teacher(self) -> Batch:
        return replace(self, teacher_image=None, teacher_text=None, teacher_scale=None)

    def inputs(self, *student: Tensor, **changes: Any) -> Batch:
        """The same with other image, text and scale, as many as are given, and other options."""
        return replace(self, **dict(zip(("image", "text", "scale"), student, strict=False)), **changes)


def moved(batch: Batch, device: str) -> Batch:
    """All of its tensors on `device`."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}
    return replace(batch, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Outcome:
    retention: Tensor
    consistency: Tensor
    image: Tensor  # the gradients
    text: Tensor
    scale: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.retention, self.consistency, self.image, self.text, self.scale


def features(n: int, width: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)


def random_batch(
    n: int,
    width: int = 40,
    teacher_width: int = 24,
    scale: float = 14.0,
    teacher_scale: float = 9.0,
    seed: int = 0,
) -> Batch:
    """Unrelated float64 features."""
    g = torch.Generator().manual_seed(seed)
    student = [features(n, width, g) for _ in range(2)]
    teacher = [features(n, teacher_width, g) for _ in range(2)]
    scales = [torch.tensor(value, dtype=torch.float64) for value in (scale, teacher_scale)]
    return Batch(*student, scales[0], *teacher, scales[1])


def outcome(sweep: Sweep, batch: Batch, weights: tuple[float, float] = (1.0, 1.0), **options: int | str) -> Outcome:
    """Losses, and the gradients of their weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in (batch.image, batch.text, batch.scale)]
    retention, consistency = sweep(batch.inputs(*leaves, **options))
    (weights[0] * retention + weights[1] * consistency).backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return Outcome(retention.detach(), consistency.detach(), *gradients)  # type: ignore[arg-type]


def naive_sweep(inputs: SimilarityInputs) -> tuple[Tensor, Tensor]:
    """The formulas as a textbook has them, with log_softmax, in the dtype of the features."""
    dtype = inputs.image.dtype
    similarity = inputs.scale.to(dtype) * inputs.image @ inputs.text.T
    retention = consistency = similarity.new_zeros(())
    if inputs.want_retention:
        masked = similarity
        if inputs.group_ids is not None:
            same = inputs.group_ids[:, None] == inputs.group_ids[None, :]
            masked = similarity.masked_fill(same & ~torch.eye(inputs.n, dtype=torch.bool), -torch.inf)
        for dim in (0, 1):
            retention = retention - 0.5 * F.log_softmax(masked, dim).diagonal().mean()
    if inputs.teacher is not None:
        image, text, scale = inputs.teacher
        teacher = scale.to(dtype) * image @ text.T
        for dim in (0, 1):
            log_p, log_p_teacher = F.log_softmax(similarity, dim), F.log_softmax(teacher, dim)
            consistency = consistency + (log_p_teacher.exp() * (log_p_teacher - log_p)).sum(dim).mean()
    return retention, consistency
