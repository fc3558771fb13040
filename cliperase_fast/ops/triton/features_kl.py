"""KL between the softmaxes of a student's and a frozen teacher's features over their width, in one kernel each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.transforms import refuse_second_derivative
from cliperase_fast.ops.triton.kernels import features_kl_kernel

WIDEST = 8192  # a row is held in registers


def features_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """See `ops.spec.FeaturesKl`; not float64. Memory: the gradient only."""
    if student.shape[1] > WIDEST:
        return eager.features_kl(student, teacher)
    return torch.ops.cliperase_fast.triton_features_kl(student, teacher)


@torch.library.custom_op("cliperase_fast::triton_features_kl", mutates_args=())
def _forward(student: Tensor, teacher: Tensor) -> Tensor:
    kl = student.new_empty(len(student), dtype=torch.float32)
    _launch(student, teacher, kl, None, None)
    return kl.mean()


@torch.library.custom_op("cliperase_fast::triton_features_kl_backward", mutates_args=())
def _gradient(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    gradient = student.new_empty(student.shape)
    _launch(student, teacher, None, gradient, grad.float() / len(student))
    return gradient


def _launch(
    student: Tensor, teacher: Tensor, kl: Tensor | None, gradient: Tensor | None, weight: Tensor | None
) -> None:
    n, width = student.shape
    block = triton.next_power_of_2(width)
    launch = features_kl_launch(block)
    with torch.cuda.device_of(student):
        features_kl_kernel[(triton.cdiv(n, launch["ROWS"]),)](
            student, teacher, kl, gradient, weight, n, width, *student.stride(), *teacher.stride(),
            BACKWARD=gradient is not None, num_warps=features_kl_warps(block), enable_fp_fusion=True, **launch,
        )  # fmt: skip


def features_kl_launch(block: int) -> dict[str, int]:
    """Blocks of the kernel for rows of up to `block` features, a power of two."""
    return {"ROWS": max(1, 2048 // block), "BLOCK": block}


def features_kl_warps(block: int) -> int:
    return min(16, max(4, block // 512))


@_forward.register_fake
def _(student: Tensor, teacher: Tensor) -> Tensor:
    return student.new_empty((), dtype=torch.float32)


@_gradient.register_fake
def _(grad: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return student.new_empty(student.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.cliperase_fast.triton_features_kl_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_backward, setup_context=_keep_for_backward)
refuse_second_derivative(_gradient)
