"""The sigmoid loss of the backend "native", on the CPU: `csrc/cpu/sigmoid_pass.h`. There is none in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.cpu import Call, finished, floats, gradient_buffer
from cliperase_fast.ops.sigmoid import SigmoidParts, as_sigmoid
from cliperase_fast.ops.spec import SimilarityInputs


class _CpuSigmoid:
    """See `ops.sigmoid.SigmoidKernels`; float32 inside, not float64. It chooses its own strips."""

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu

    def sigmoid(
        self,
        problem: SimilarityInputs,
        bias: Tensor,
        need_image: bool,
        need_text: bool,
        need_scalars: bool,
        strip_rows: int,
    ) -> SigmoidParts:
        call = Call(self._cpu, problem)
        grad_image = gradient_buffer(problem.image) if need_image or need_scalars else None
        grad_text = gradient_buffer(problem.text) if need_text else None
        loss, grad_scale, grad_bias = self._cpu.sigmoid(
            call.problem,
            bias=bias.item(),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            need_scale=need_scalars,
            need_bias=need_scalars,
            instruction_set=extension.instruction_set(),
        )
        return SigmoidParts(
            torch.tensor(loss, dtype=torch.float32, device="cpu"),
            floats(0) if grad_image is None or not need_image else finished(grad_image, problem.image, True),
            floats(0) if grad_text is None else finished(grad_text, problem.text, True),
            torch.tensor(grad_scale, dtype=torch.float32, device="cpu"),
            torch.tensor(grad_bias, dtype=torch.float32, device="cpu"),
        )


sigmoid = as_sigmoid(_CpuSigmoid())
