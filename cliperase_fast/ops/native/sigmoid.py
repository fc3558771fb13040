"""The sigmoid loss of the backend "native", on the CPU: `csrc/cpu/sigmoid_pass.h`. There is none in CUDA."""

from __future__ import annotations

import torch

from cliperase_fast.ops.native import extension
from cliperase_fast.ops.native.cpu import Call, finished, floats, gradient_buffer
from cliperase_fast.ops.sigmoid import SigmoidParts, as_sigmoid
from cliperase_fast.ops.spec import Need, SimilarityInputs


class _CpuSigmoid:
    """See `ops.sigmoid.SigmoidKernels`; float32 inside, not float64. It chooses its own strips."""

    name = "native"

    def __init__(self) -> None:
        self._cpu = extension.load().cpu

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        assert inputs.bias is not None
        call = Call(self._cpu, inputs)
        grad_image = gradient_buffer(inputs.image) if need.image or need.scale else None
        grad_text = gradient_buffer(inputs.text) if need.text else None
        loss, grad_scale, grad_bias = self._cpu.sigmoid(
            call.problem,
            bias=inputs.bias.item(),
            grad_image=call.buffer(grad_image),
            grad_text=call.buffer(grad_text),
            need_scale=need.scale,
            need_bias=need.scale,
            instruction_set=extension.instruction_set(),
        )
        return SigmoidParts(
            torch.tensor(loss, dtype=torch.float32, device="cpu"),
            floats(0) if grad_image is None or not need.image else finished(grad_image, inputs.image, True),
            floats(0) if grad_text is None else finished(grad_text, inputs.text, True),
            torch.tensor(grad_scale, dtype=torch.float32, device="cpu"),
            torch.tensor(grad_bias, dtype=torch.float32, device="cpu"),
        )


sigmoid = as_sigmoid(_CpuSigmoid())
