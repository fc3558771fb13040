"""The sigmoid loss of the backend "triton": one kernel forms a tile of S, sums its losses and leaves dS.

A strip of dS is formed in the dtype of the features, within the memory for strips, and multiplied by the features as in
the sweep. Stats of tiles are added in a fixed order, without atomics. No n x m tensor, no host synchronisation.
"""

from __future__ import annotations

import torch
import triton

from cliperase_fast.ops.matmul import add_product, product
from cliperase_fast.ops.sigmoid import SigmoidParts, as_sigmoid
from cliperase_fast.ops.spec import Need, SimilarityInputs
from cliperase_fast.ops.triton.kernels import sigmoid_kernel
from cliperase_fast.ops.triton.sweep import _GROUP_ROWS, Operands

# dS lies between -1 and 1, mostly near 0: in float16 small entries would be lost without a factor.
_FLOAT16_LOSS_SCALE = 2.0**13


class _TritonSigmoid:
    """See `ops.sigmoid.SigmoidKernels`; not float64. dS is rounded to the features' dtype."""

    name = "triton"

    def sigmoid(self, inputs: SimilarityInputs, need: Need) -> SigmoidParts:
        assert inputs.bias is not None
        with torch.cuda.device_of(inputs.image):
            operands, n, m = Operands(inputs, None), inputs.n, inputs.m
            image, text, config = operands.image, operands.text, operands.configs.backward
            gradient = any(need)
            loss_scale = _FLOAT16_LOSS_SCALE if image.dtype == torch.float16 else 1.0
            scalars = operands.scale.new_full((3,), loss_scale)
            scalars[0], scalars[1] = operands.scale, inputs.bias
            grad_image = scalars.new_empty(image.shape if need.image else (0,))
            grad_text = scalars.new_zeros(text.shape if need.text else (0,))
            loss, grad_scale, grad_bias = (scalars.new_zeros(()) for _ in range(3))
            form = operands.form(config)
            strip = image.new_empty(0, m)
            for start, stop in operands.strips(m * image.itemsize, config, inputs.strip_rows, 0):
                programs = triton.cdiv(stop - start, config.block_m) * triton.cdiv(m, config.block_n)
                sums = scalars.new_empty(1 + gradient, programs)
                if gradient and len(strip) < stop - start:
                    strip = image.new_empty(stop - start, m)
                rows = strip[: stop - start]
                sigmoid_kernel[(programs,)](
                    image, text, scalars, sums, rows, start, stop, n, m, inputs.pair_offset, image.shape[1],
                    image.stride(0), text.stride(0), GRADIENT=gradient, GROUP_ROWS=_GROUP_ROWS,
                    **{key: value for key, value in form.items() if key not in _OF_THE_SWEEP},
                )  # fmt: skip
                loss += sums[0].sum()
                if not gradient:
                    continue
                image_rows = image[start:stop]
                if need.scale:
                    grad_bias += sums[1].sum()
                if need.image or need.scale:
                    towards_text = product(rows, text)  # [h, D]
                    if need.scale:  # before the factor s, which may be 0
                        grad_scale += (towards_text * image_rows).sum()
                    if need.image:
                        grad_image[start:stop] = towards_text.mul_(operands.scale / loss_scale)
                if need.text:
                    add_product(grad_text, rows.T, image_rows)
            return SigmoidParts(
                loss, grad_image, grad_text.mul_(operands.scale / loss_scale), grad_scale / loss_scale, grad_bias
            )


_OF_THE_SWEEP = ("PLAIN", "MASKED", "TEACHER", "EVEN_K_TEACHER")  # what this kernel has no use for

sigmoid = as_sigmoid(_TritonSigmoid())
