"""Compute the loss of `ops/bernoulli.py`, of one process or of a batch spread over ranks.

The gradients for a grad_output of 1 are formed in the forward pass and kept, O((n + m) D). On ranks, own rows meet all
ranks' texts, gathered at once, and the gradients of texts are summed to their owners. As in
`distributed/sharded_softmax.py`, gradients are those of the whole batch's loss times the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.distributed.collectives import gather_rows, sum_to_owners, total_over_ranks
from cliperase_fast.distributed.process_group import Shards
from cliperase_fast.distributed.sharded_softmax import column_blocks
from cliperase_fast.ops.bernoulli import BernoulliInputs, BernoulliParts, streamed
from cliperase_fast.ops.spec import Need, no_autocast
from cliperase_fast.ops.transforms import first_derivative_only


def bernoulli_terms(shards: Shards | None, inputs: BernoulliInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weighted sum, retention, consistency), means over the rows of the whole batch, 0-d.

    Only the first is differentiable. inputs: this rank's pairs, possibly none; the whole batch must not be empty. Every
    rank must call this and backward, with equal incoming gradients.
    """
    given = inputs.similarity
    assert given.bias is not None
    tensors = (given.image, given.text, given.scale, given.bias)
    image, text, scale, bias = (torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors)
    return _Bernoulli.apply(shards, inputs, Need(image, text, scale or bias), *tensors)


class _Bernoulli(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: Shards | None, inputs: BernoulliInputs, need: Need, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(tensors[0]):
            parts = streamed(inputs, need) if shards is None else _sharded(shards, inputs, need)
        count, ctx.ranks = (inputs.similarity.n, 1) if shards is None else (shards.total, shards.group.size)
        ctx.count = count
        ctx.save_for_backward(*tensors, *parts[2:])
        retain, consistency = parts.retain / count, parts.consistency / count
        ctx.mark_non_differentiable(retain, consistency)
        return inputs.lambda_retain * retain + inputs.lambda_consistency * consistency, retain, consistency

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, *_others: Tensor) -> tuple[Any, ...]:
        weight = grad * (ctx.ranks / ctx.count)
        found = [
            (unit * weight).to(tensor.dtype) if needed else None
            for unit, tensor, needed in zip(saved[4:], saved[:4], ctx.needs_input_grad[3:], strict=True)
        ]
        return None, None, None, *found


def _sharded(shards: Shards, inputs: BernoulliInputs, need: Need) -> BernoulliParts:
    """Return the sums over the whole batch, and the gradients of own rows over all columns and of own texts."""
    local = inputs.similarity
    gathered = gather_rows(shards, local.text, local.teacher_text, local.group_ids)
    ((_, block),) = column_blocks(shards, local, gathered)
    if block is None:  # no rows here
        zero = local.text.new_zeros((), dtype=local.dtype)
        grad_text = zero.new_zeros(shards.total if need.text else 0, local.text.shape[1])
        parts = BernoulliParts(zero, zero, zero.new_zeros(local.image.shape), grad_text, zero, zero)
    else:
        parts = streamed(inputs._replace(similarity=block), need)
    retain, consistency = total_over_ranks(shards.group, torch.stack((parts.retain, parts.consistency))).unbind()
    grad_text = sum_to_owners(shards, parts.grad_text) if need.text else parts.grad_text
    return parts._replace(retain=retain, consistency=consistency, grad_text=grad_text)
