"""Backend "triton": the loss sweep in fused kernels, on GPUs (and in Triton's interpreter, on CPU).

Forward: strips of rows; a tile of S and S° is formed once and leaves row and column partials, which are merged in a
fixed order, without atomics, so two runs are bitwise equal. Backward: a strip of dS is formed in the dtype of the
features, from which dI = s dS T and, accumulated in float32, dT = s dSᵀ I. No N x N tensor, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.ops import finish
from cliperase_fast.ops.sweep import no_autocast
from cliperase_fast.ops.triton.configs import INTERPRETER, Config, Configs, configs_for
from cliperase_fast.ops.triton.kernels import backward_kernel, forward_kernel, merge_kernel, pair_dot_kernel

STRIP_BYTES = 128 << 20  # of column partials in the forward pass, of dS in the backward
_PROGRAMS = 1024  # a forward launch has about this many where it can: some for each multiprocessor
_GROUP_ROWS = 8
_MERGE_BLOCK = 256
_OPTIONS = {"enable_fp_fusion": True}  # said, as Triton's default changes in 3.10
_LN_2 = 0.6931471805599453
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_SWEEP_ARGUMENTS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? teacher_image, Tensor? teacher_text, "
    "Tensor? teacher_logit_scale, Tensor? group_ids, bool want_retention, bool want_consistency, "
    "int strip_bytes"
)


def sweep(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `ops.sweep.Sweep`; float64 is not supported. strip_bytes: memory of a strip; 0 is STRIP_BYTES.

    Features in half precision: products accumulate in float32, but dS is rounded to the features' dtype. Features
    whose last dimension is not contiguous are copied.
    """
    for features in (image, text, teacher_image, teacher_text):
        if features is not None and features.dtype not in _DTYPES:
            raise InputError(f"backend 'triton' does not take {features.dtype}; use backend='torch'")
    retention, consistency, _ = triton_sweep(
        image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale, group_ids,
        want_retention, want_consistency, strip_bytes or STRIP_BYTES,
    )  # fmt: skip
    return retention, consistency


class _Problem:
    """The inputs as the kernels take them, and which of the forms of the kernels they need."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        teacher_logit_scale: Tensor | None,
        group_ids: Tensor | None,
        want_retention: bool,
        want_consistency: bool,
    ) -> None:
        self.n = len(image)
        self.image, self.text = _as_pair(image, text)
        self.scale = logit_scale.float()
        self.teacher_image = self.teacher_text = self.teacher_scale = self.group_ids = None
        if want_consistency:
            assert teacher_image is not None and teacher_text is not None and teacher_logit_scale is not None
            self.teacher_image, self.teacher_text = _as_pair(teacher_image, teacher_text)
            self.teacher_scale = teacher_logit_scale.float()
        self.masked = want_retention and group_ids is not None
        if self.masked:
            assert group_ids is not None
            self.group_ids = group_ids.contiguous()
        self.plain = want_consistency or not self.masked
        self.teacher = want_consistency
        self.students = self.plain + self.masked
        self.planes = 2 * self.students + 3 * self.teacher
        self.configs = self._configs()

    def _configs(self) -> Configs:
        if not self.image.is_cuda:
            return INTERPRETER
        dtype, width = self.image.dtype, self.image.shape[1]
        if self.teacher_image is not None:
            dtype, width = torch.promote_types(dtype, self.teacher_image.dtype), max(width, self.teacher_image.shape[1])
        return configs_for(torch.cuda.get_device_capability(self.image.device)[0], dtype, width)

    def strips(self, bytes_a_row: float, config: Config, strip_bytes: int) -> Iterator[tuple[int, int]]:
        blocks = max(1, int(strip_bytes / (bytes_a_row * config.block_m)))
        height = min(blocks, triton.cdiv(self.n, config.block_m)) * config.block_m
        for start in range(0, self.n, height):
            yield start, min(start + height, self.n)

    def scalars(self, shift: Tensor | None) -> Tensor:
        scalars = self.scale.new_zeros(3)
        scalars[0] = self.scale
        if self.teacher_scale is not None and shift is not None:
            scalars[1], scalars[2] = self.teacher_scale, shift
        return scalars

    def widths(self) -> tuple[int, int]:
        return self.image.shape[1], 0 if self.teacher_image is None else self.teacher_image.shape[1]

    def strides(self) -> tuple[int, ...]:
        tensors = (self.image, self.text, self.teacher_image, self.teacher_text)
        return tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors)

    def form(self, config: Config) -> dict[str, Any]:
        """The compile-time arguments that the two large kernels share."""
        width, teacher_width = self.widths()
        return {
            "PLAIN": int(self.plain), "MASKED": int(self.masked), "TEACHER": int(self.teacher),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "EVEN_K": width % config.block_k == 0, "EVEN_K_TEACHER": teacher_width % config.block_k == 0,
            "PRECISION": _float32_precision(), "num_warps": config.warps, "num_stages": config.stages, **_OPTIONS,
        }  # fmt: skip


def _as_pair(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, rows contiguous."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    return _contiguous_rows(image.to(dtype)), _contiguous_rows(text.to(dtype))


def _contiguous_rows(features: Tensor) -> Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def _float32_precision() -> str:
    """What torch's own float32 products use: IEEE float32 unless the user has asked for tf32."""
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked == "none":
        asked = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if asked == "tf32" else "ieee"


def _pair_dot(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """scale <left_i, right_i>, [N] float32."""
    n, width = left.shape
    out = scale.new_empty(n)
    block_m, block_k = 16, min(256, triton.next_power_of_2(width))
    pair_dot_kernel[(triton.cdiv(n, block_m),)](
        left, right, out, n, width, left.stride(0), right.stride(0), BLOCK_M=block_m, BLOCK_K=block_k, **_OPTIONS
    )
    return out.mul_(scale)


@torch.library.custom_op(
    "cliperase_fast::triton_sweep",
    mutates_args=(),
    schema=f"({_SWEEP_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def triton_sweep(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(retention, consistency, state [8, N]), float32; see `ops/finish.py` for the state."""
    with torch.cuda.device_of(image), no_autocast(image):
        problem = _Problem(
            image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale, group_ids,
            want_retention, want_consistency,
        )  # fmt: skip
        n = problem.n
        state = problem.scale.new_zeros(8, n)
        state[finish.DIAGONAL] = _pair_dot(problem.image, problem.text, problem.scale)
        shift = None
        if problem.teacher_image is not None and problem.teacher_text is not None and problem.teacher_scale is not None:
            state[finish.TEACHER_DIAGONAL] = _pair_dot(
                problem.teacher_image, problem.teacher_text, problem.teacher_scale
            )
            # any constant would do; this one keeps the gaps small, so exact, where S° - S hardly varies
            shift = state[finish.TEACHER_DIAGONAL, 0] - state[finish.DIAGONAL, 0]

        # [rows or columns, planes, N]: maxima (in units of log 2) and sums
        sums = _off_diagonal_sums(problem, problem.scalars(shift), strip_bytes)
        place = 0
        if problem.plain:
            state[finish.STUDENT] = finish.log_odds(sums[:, 0] * _LN_2, sums[:, 1], state[finish.DIAGONAL])
            state[finish.RETENTION] = state[finish.STUDENT]
            place = 2
        if problem.masked:
            maximum, total = sums[:, place] * _LN_2, sums[:, place + 1]
            state[finish.RETENTION] = finish.log_odds(maximum, total, state[finish.DIAGONAL])
        mean_gap = None
        if problem.teacher:
            maximum, total, gap = sums[:, -3] * _LN_2, sums[:, -2], sums[:, -1]
            state[finish.TEACHER] = finish.log_odds(maximum, total, state[finish.TEACHER_DIAGONAL])
            mean_gap = gap / total * _LN_2
        retention, consistency = finish.losses(state, mean_gap, shift, want_retention, want_consistency)
        return retention, consistency, state


def _off_diagonal_sums(problem: _Problem, scalars: Tensor, strip_bytes: int) -> Tensor:
    """What `forward_kernel` leaves, merged: [2, planes, N], of rows and of columns."""
    n, planes, config = problem.n, problem.planes, problem.configs.forward
    sums = scalars.new_empty(2, planes, n)
    tiles = triton.cdiv(n, config.block_n)
    for start, stop in problem.strips(4 * planes * n / config.block_m, config, strip_bytes):
        blocks = triton.cdiv(stop - start, config.block_m)
        tiles_per_chunk = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
        chunks = triton.cdiv(tiles, tiles_per_chunk)
        of_rows = scalars.new_empty(chunks, planes, stop - start)
        of_columns = scalars.new_empty(blocks, planes, n)
        forward_kernel[(blocks, chunks)](
            problem.image, problem.text, problem.teacher_image, problem.teacher_text, problem.group_ids,
            scalars, of_rows, of_columns,
            start, stop, n, *problem.widths(), tiles_per_chunk, *problem.strides(),
            PLANES=planes, **problem.form(config),
        )  # fmt: skip
        _merge_into(sums[0], of_rows, start, problem, fresh=True)
        _merge_into(sums[1], of_columns, 0, problem, fresh=start == 0)
    return sums


def _merge_into(merged: Tensor, partial: Tensor, first: int, problem: _Problem, fresh: bool) -> None:
    """partial [parts, planes, positions] into merged [planes, N], from position `first` on."""
    parts, planes, positions = partial.shape
    merge_kernel[(triton.cdiv(positions, _MERGE_BLOCK),)](
        partial, merged, problem.n, first, positions, parts,
        FRESH=fresh, STUDENTS=problem.students, TEACHER=int(problem.teacher), PLANES=planes, BLOCK=_MERGE_BLOCK,
        **_OPTIONS,
    )  # fmt: skip


@torch.library.custom_op(
    "cliperase_fast::triton_sweep_backward",
    mutates_args=(),
    schema=f"(Tensor grad_retention, Tensor grad_consistency, Tensor state, {_SWEEP_ARGUMENTS}, "
    "bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)",
)
def triton_sweep_backward(
    grad_retention: Tensor,
    grad_consistency: Tensor,
    state: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_logit_scale: Tensor | None,
    group_ids: Tensor | None,
    want_retention: bool,
    want_consistency: bool,
    strip_bytes: int,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and logit_scale, each in its own dtype; an empty tensor for one not needed."""
    with torch.cuda.device_of(image), no_autocast(image):
        problem = _Problem(
            image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale, group_ids,
            want_retention, want_consistency,
        )  # fmt: skip
        n, configs = problem.n, problem.configs
        config = configs.backward_groups if problem.masked else configs.backward
        softmaxes, diagonal, unit = _scaled_terms(problem, state, grad_retention, grad_consistency, want_retention)
        scalars = problem.scalars(state[finish.DIAGONAL, 0])  # the shift is not used here
        grad_image = image.new_empty(image.shape if need_image else (0,))
        grad_text = state.new_zeros(text.shape if need_text else (0,))
        grad_scale = state.new_zeros(())
        strip = None
        for start, stop in problem.strips(n * problem.image.itemsize, config, strip_bytes):
            if strip is None:
                strip = problem.image.new_empty(stop - start, n)
            rows = strip[: stop - start]
            backward_kernel[(triton.cdiv(stop - start, config.block_m) * triton.cdiv(n, config.block_n),)](
                problem.image, problem.text, problem.teacher_image, problem.teacher_text, problem.group_ids,
                scalars, softmaxes, diagonal, rows,
                start, stop, n, *problem.widths(), *problem.strides(),
                GROUP_ROWS=_GROUP_ROWS, **problem.form(config),
            )  # fmt: skip
            image_rows = problem.image[start:stop]
            if need_image or need_scale:
                product = _product(rows, problem.text)  # [h, D]
                if need_scale:  # before the factor s, which may be 0
                    grad_scale += (product * image_rows).sum()
                if need_image:
                    grad_image[start:stop] = product.mul_(unit * problem.scale)
            if need_text:
                _add_product(grad_text, rows.T, image_rows)
        grad_text = grad_text.mul_(unit * problem.scale).to(text.dtype)
        return grad_image, grad_text, (grad_scale * unit).to(logit_scale.dtype)


def _scaled_terms(
    problem: _Problem, state: Tensor, grad_retention: Tensor, grad_consistency: Tensor, want_retention: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(softmaxes [terms, 4, N], diagonal [N], unit []): dS / unit as the kernel takes it.

    The unit is about the largest entry of dS, the larger weight times the largest 1 - P_ii, so that in half precision
    dS keeps its digits whatever the incoming gradients and however far the pairs have converged. No entry is more than
    4 units; float16 is lifted to its upper range on top.
    """
    weight_retention, weight_consistency = 0.5 * grad_retention.float(), grad_consistency.float()
    weights, used = [], []
    if want_retention:
        weights, used = [weight_retention], [finish.RETENTION]
    if problem.teacher:
        weights, used = [*weights, weight_consistency], [*used, finish.STUDENT, finish.TEACHER]
    largest = torch.stack(weights).abs().amax() * finish.rest(torch.cat([state[rows] for rows in used])).amax()
    largest = largest.clamp_min(1e-30)  # its inverse must be a number
    lift = 2.0**13 if problem.image.dtype == torch.float16 else 1.0
    to_units = lift / largest
    terms = finish.gradient_terms(
        state, weight_retention * to_units, weight_consistency * to_units,
        problem.masked, want_retention, problem.teacher,
    )  # fmt: skip
    softmaxes = [softmax for softmax in terms[:3] if softmax is not None]
    stacked = torch.stack([torch.cat(tuple(softmax)) for softmax in softmaxes])  # [terms, 4, N]
    return stacked, terms.diagonal, largest / (lift * problem.n)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


@triton_sweep.register_fake
def _(image: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    state = image.new_empty((8, image.shape[0]), dtype=torch.float32)
    return state.new_empty(()), state.new_empty(()), state


@triton_sweep_backward.register_fake
def _(
    grad_retention: Tensor,
    grad_consistency: Tensor,
    state: Tensor,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_image, need_text = arguments[-3:-1]
    return (
        image.new_empty(image.shape if need_image else (0,)),
        text.new_empty(text.shape if need_text else (0,)),
        logit_scale.new_empty(()),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.want_retention, ctx.want_consistency, ctx.strip_bytes = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx: Any, grad_retention: Tensor, grad_consistency: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    state, *tensors = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = triton_sweep_backward(
        grad_retention, grad_consistency, state, *tensors,
        ctx.want_retention, ctx.want_consistency, ctx.strip_bytes, *need,
    )  # fmt: skip
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, need, strict=True))
    return *wanted, *[None] * 7


triton_sweep.register_autograd(_backward, setup_context=_keep_for_backward)
