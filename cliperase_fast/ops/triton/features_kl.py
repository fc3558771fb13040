"""KL between the softmaxes of a student's and a frozen teacher's features over their width, in one kernel each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.transforms import refuse_second_derivative
from cliperase_fast.ops.triton.tiles import LOG2_E, OPTIONS, exp

WIDEST = 8192  # a row is held in registers


@triton.jit
def _expm1(b_x):
    """Return exp(x) - 1; by its series near 0, where the difference would cancel."""
    b_series = b_x * (1 + b_x * (1 / 2 + b_x * (1 / 6 + b_x * (1 / 24 + b_x * (1 / 120 + b_x * (1 / 720))))))
    return tl.where(tl.abs(b_x) < 0.3, b_series, tl.exp2(b_x * LOG2_E) - 1)


@triton.jit
def _excess(b_x):
    """Return exp(x) - 1 - x; by its series near 0, where the difference would cancel."""
    b_inner = 1 / 24 + b_x * (1 / 120 + b_x * (1 / 720 + b_x * (1 / 5040)))
    b_series = b_x * b_x * (1 / 2 + b_x * (1 / 6 + b_x * b_inner))
    return tl.where(tl.abs(b_x) < 0.3, b_series, tl.exp2(b_x * LOG2_E) - 1 - b_x)


@triton.jit
def features_kl_kernel(
    p_student, p_teacher, p_kl, p_gradient, p_weight, n, width,
    stride_student, stride_student_k, stride_teacher, stride_teacher_k,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KL of the softmaxes over the width, ROWS rows a program. BACKWARD: instead, weight times its gradient [n, width].

    With the gaps g_j = x°_j - x_j, E the mean under p° = softmax(x°) and c_j = g_j - E[g],

        KL(p° || p) = E[g] + log E[exp(-g)] = log(1 + E[exp(-c) - 1 + c])

    where every term of the last mean is positive: nothing cancels, though KLs of normalised features are tiny. The
    gradient with respect to x_j is p_j - p°_j = p°_j (exp(-c_j - KL) - 1). Where the two are far apart, both overflow
    and p° underflows; there the kernel uses E[g] + log Σ exp(x) - log Σ exp(x°) and p_j - p°_j.
    """
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_k = tl.arange(0, BLOCK).to(tl.int64)
    m_k = (o_k < width)[None, :]
    m_tile = m_k & (o_row < n)[:, None]
    p_s = p_student + o_row[:, None] * stride_student + (o_k * stride_student_k)[None, :]
    p_t = p_teacher + o_row[:, None] * stride_teacher + (o_k * stride_teacher_k)[None, :]
    b_s = tl.load(p_s, mask=m_tile, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    b_student_max = tl.max(tl.where(m_k, b_s, float("-inf")), 1)
    b_student_total = tl.sum(tl.where(m_k, exp(b_s - b_student_max[:, None]), 0.0), 1)
    b_t = tl.load(p_t, mask=m_tile, other=0.0).to(tl.float32)
    b_max = tl.max(tl.where(m_k, b_t, float("-inf")), 1)
    b_exp = tl.where(m_k, exp(b_t - b_max[:, None]), 0.0)
    b_total = tl.sum(b_exp, 1)
    b_p = b_exp / b_total[:, None]
    b_gap = b_t - b_s
    b_mean_gap = tl.sum(b_p * b_gap, 1)
    b_c = b_gap - b_mean_gap[:, None]
    # Where p° is 0 in float32, the other factor may be infinite: the product is 0, not NaN.
    b_mean = tl.sum(tl.where(b_p > 0, b_p * _excess(-b_c), 0.0), 1)
    # log(1 + mean), exact where the mean is small: log(u) mean / (u - 1) with u the rounded 1 + mean
    b_u = 1 + b_mean
    b_kl = tl.where(b_u == 1, b_mean, tl.log(b_u) * (b_mean / tl.where(b_u == 1, 1.0, b_u - 1)))
    b_plain = b_mean_gap + (b_student_max - b_max) + (tl.log(b_student_total) - tl.log(b_total))
    b_kl = tl.where(tl.max(tl.where(m_k, tl.abs(b_c), 0.0), 1) < 40, b_kl, b_plain)
    if BACKWARD:
        b_apart = -b_c - b_kl[:, None]
        # Loaded again, as keeping it from above would take too many registers.
        b_again = tl.load(p_s, mask=m_tile, other=0.0).to(tl.float32)
        b_student_p = exp(b_again - b_student_max[:, None]) / b_student_total[:, None]
        b_change = tl.where(tl.abs(b_apart) < 1, b_p * _expm1(b_apart), b_student_p - b_p)
        b_gradient = tl.load(p_weight) * b_change
        p_out = p_gradient + o_row[:, None] * width + o_k[None, :]
        tl.store(p_out, b_gradient.to(p_gradient.dtype.element_ty), mask=m_tile)
    else:
        tl.store(p_kl + o_row, b_kl, mask=o_row < n)


def features_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute `ops.spec.FeaturesKl`, in any dtype but float64. Memory: the gradient only."""
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
            BACKWARD=gradient is not None, num_warps=features_kl_warps(block), **launch, **OPTIONS,
        )  # fmt: skip


def features_kl_launch(block: int) -> dict[str, int]:
    """Return the kernel's block sizes for rows of up to `block` features, a power of two."""
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
