"""Compute the sigmoid loss of a batch spread over ranks: own rows meet all ranks' texts, block by block.

As in `distributed/sharded_softmax.py`, gradients are those of the whole batch's loss times the number of ranks. The
forward pass computes them while the texts pass round the ring, and a block's gradient follows it to its owner. The
backward pass only scales them, unless the ranks' incoming gradients differ. Then the texts pass round again, and each
rank weights its part with its own incoming gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.distributed import collectives
from cliperase_fast.distributed.collectives import gather_rows, sum_to_owners, total_over_ranks
from cliperase_fast.distributed.process_group import Shards
from cliperase_fast.distributed.sharded_softmax import column_blocks, zeros
from cliperase_fast.ops.sigmoid import SigmoidKernels, SigmoidParts
from cliperase_fast.ops.spec import Need, SimilarityInputs, no_autocast
from cliperase_fast.ops.transforms import first_derivative_only


def sharded_sigmoid(kernels: SigmoidKernels, shards: Shards, inputs: SimilarityInputs) -> Tensor:
    """Return the mean over all rows of the batch, or over own rows (`Shards.own_values`), 0-d in `inputs.dtype`.

    inputs: this rank's pairs, possibly none; the whole batch must not be empty. Every rank must call this and backward.
    """
    assert inputs.bias is not None
    tensors = (inputs.image, inputs.text, inputs.scale, inputs.bias)
    image, text, scale, bias = (torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)
    return _Sigmoid.apply(kernels, shards, inputs, Need(image, text, scale or bias), *tensors)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: SigmoidKernels, shards: Shards, local: SimilarityInputs, need: Need, *tensors: Tensor
    ) -> Tensor:
        with no_autocast(local.image):
            parts = _parts(kernels, shards, local, need)
        ctx.fixed = (kernels, shards)
        ctx.save_for_backward(*tensors, *parts[1:])
        if shards.own_values:
            return parts.loss / max(shards.own, 1)
        return total_over_ranks(shards.group, parts.loss) / shards.total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Any, ...]:
        kernels, shards = ctx.fixed
        image, text, scale, bias, *units = saved
        weight = grad * (shards.group.size / shards.total)
        gradients = [
            unit * weight if needed else None for unit, needed in zip(units, ctx.needs_input_grad[4:], strict=True)
        ]
        if gradients[1] is not None:
            (everyones,) = gather_rows(Shards(shards.group, (1,) * shards.group.size, "all"), grad.reshape(1))
            assert everyones is not None
            if not bool((everyones == grad).all()):  # other ranks weight their parts of these texts by their gradients
                local = SimilarityInputs(image, text, scale, bias=bias)
                with no_autocast(local.image):
                    gradients[1] = _parts(kernels, shards, local, Need(False, True, False), weight).grad_text
        found = (None if one is None else one.to(of.dtype) for one, of in zip(gradients, saved[:4], strict=True))
        return None, None, None, None, *found


def _parts(
    kernels: SigmoidKernels, shards: Shards, local: SimilarityInputs, need: Need, weight: Tensor | None = None
) -> SigmoidParts:
    """Return the sums of own rows over all columns, and the gradient of own texts over all rows."""
    like = local.text.new_empty(0, dtype=local.dtype)
    grad_image, _, grad_scale = zeros(local, 0, like)
    loss, grad_bias = like.new_zeros(()), like.new_zeros(())
    gathered: list[Tensor | None] = [None, None, None]
    if shards.gather == "all":
        gathered = gather_rows(shards, local.text, *gathered[1:])
    home = None
    if need.text and shards.gather == "ring":
        home = collectives.RingReducer(shards, like, local.text.shape[1])
    grad_text = like
    for rows, inputs in _blocks(shards, local, gathered):
        if home is not None:
            home.receive(rows)
        _, part, _ = zeros(local, rows, like)
        if inputs is not None:
            found = kernels.sigmoid(inputs, need)
            loss, grad_scale, grad_bias = loss + found.loss, grad_scale + found.grad_scale, grad_bias + found.grad_bias
            if need.image:
                grad_image += found.grad_image
            if need.text:
                part = found.grad_text if weight is None else found.grad_text * weight
        if home is not None:
            home.add(part)
        elif need.text:
            grad_text = sum_to_owners(shards, part)
    return SigmoidParts(loss, grad_image, grad_text if home is None else home.arrive(), grad_scale, grad_bias)


def _blocks(
    shards: Shards, local: SimilarityInputs, gathered: list[Tensor | None]
) -> Iterator[tuple[int, SimilarityInputs | None]]:
    """Yield (number of texts in the block, inputs), see `column_blocks`."""
    sizes = (
        [shards.total]
        if shards.gather == "all"
        else [shards.sizes[owner] for owner in collectives.owners(shards.group)]
    )
    for rows, (_, inputs) in zip(sizes, column_blocks(shards, local, gathered), strict=True):
        yield rows, inputs
