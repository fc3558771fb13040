"""The sigmoid loss of a batch over 2 and 4 gloo ranks is that of one process with the whole batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from shared_batches import EVEN, UNEVEN, features

from cliperase_fast.contrastive import sigmoid_cliperase_loss, sigmoid_loss
from cliperase_fast.distributed import collectives
from cliperase_fast.errors import InputError
from cliperase_fast.ops import backends

BACKENDS = ["torch", *(["native"] if backends()["native"].available else [])]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
ONES = (1.0,) * 4


def whole(n, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    return (
        features(n, 12, 0, dtype),
        features(n, 12, 1, dtype),
        torch.tensor(14.0, dtype=wide),
        torch.tensor(-3.0, dtype=wide),
    )


def step(tensors, weight, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = sigmoid_loss(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(weight * loss, leaves)]


def sharded_step(rank, tensors, sizes, weights, options):
    own = [tensor.split(sizes)[rank] if tensor.ndim else tensor for tensor in tensors]
    return step(own, weights[rank], process_group=dist.group.WORLD, **options)


def assert_whole(parts, exact, tolerance, same_values=True):
    """Compare with the whole batch the mean over ranks of scalars, and rows divided by the number of ranks."""
    values, images, texts, scales, biases = zip(*parts, strict=True)
    if same_values:
        assert all(torch.equal(value, values[0]) for value in values)
    together = [values[0], torch.cat(images) / len(parts), torch.cat(texts) / len(parts)]
    together += [torch.stack(found).mean(0) for found in (scales, biases)]
    for place, (found, right) in enumerate(zip(together, exact, strict=True)):
        if place or same_values:
            error = (found.double() - right.double()).norm().item()
            assert error <= tolerance * right.double().norm().item() + 1e-14, place


def check(ranks, sizes, dtype, **options):
    tensors = whole(sum(sizes), dtype)
    exact = step([tensor.double() for tensor in tensors], 1.7, backend="eager")
    parts = ranks.run(sharded_step, tensors, sizes, (1.7,) * 4, options)
    assert parts[0][0].dtype == dtype
    assert_whole(parts, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gather", ["ring", "all"])
@pytest.mark.parametrize("sizes", [EVEN[4][1], UNEVEN[4][1]], ids=["even", "uneven, one empty"])
def test_four_ranks(four, sizes, gather, dtype):
    check(four, sizes, dtype, gather=gather)


@pytest.mark.parametrize("gather", ["ring", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_on_two_uneven_ranks(two, backend, gather):
    check(two, UNEVEN[2][1], torch.float32, gather=gather, backend=backend)


@pytest.mark.parametrize("gather", ["ring", "all"])
def test_two_runs_are_bitwise_equal(four, gather):
    arguments = (whole(17, torch.float32), UNEVEN[4][1], ONES, {"gather": gather})
    for first, second in zip(four.run(sharded_step, *arguments), four.run(sharded_step, *arguments), strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("gather", ["ring", "all"])
def test_incoming_gradients_that_differ_from_rank_to_rank_reach_the_texts_they_belong_to(four, gather):
    """Every rank weighs the mean of its own rows; 0 on one of them."""
    sizes, weights = UNEVEN[4][1], (1.0, 0.0, 3.0, -2.0)
    tensors = [tensor.double() for tensor in whole(17, torch.float64)]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    image, text, scale, bias = leaves
    logits = scale * image @ text.T + bias
    logits = torch.where(torch.eye(17, dtype=torch.bool), -logits, logits)
    of_rows = torch.nn.functional.softplus(logits, threshold=40).sum(1) / 17
    exact = torch.autograd.grad(
        sum(w * rows.sum() for w, rows in zip(weights, of_rows.split(sizes), strict=True)), leaves
    )
    parts = four.run(sharded_step, tensors, sizes, weights, {"gather": gather, "own_values": True})
    assert_whole(parts, [torch.zeros(()), *exact], 1e-10, same_values=False)


def test_the_texts_go_round_share_by_share(two):
    for most in two.run(ring_shares, whole(16, torch.float32), UNEVEN[2][1]):
        assert sorted(most) == [3, 13]


def ring_shares(rank, tensors, sizes):
    """Rows of each block of texts that one's own images met."""
    met = []
    blocks = collectives.blocks

    def watched(shards, *own):
        for owner, held in blocks(shards, *own):
            met.append(len(held[0]))
            yield owner, held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "blocks", watched)
        sharded_step(rank, tensors, sizes, ONES, {})
    return met


def refused(rank, change):
    tensors = list(whole(4, torch.float32))
    options = {"process_group": dist.group.WORLD, **change.get("everywhere", {})}
    if rank == 1:
        options |= change.get("rank 1", {})
    with pytest.raises(InputError) as error:
        sigmoid_loss(*tensors, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"everywhere": {"negative_only": True}}, "negative_only is for texts of another rank"),
        ({"everywhere": {"backend": "eager"}}, "does not work with a process_group"),
        ({"rank 1": {"gather": "all"}}, "ranks differ in gather"),
        ({"rank 1": {"gather": "some"}}, "gather='some' is not known"),
    ],
)
def test_what_cannot_be_shared_is_refused_on_every_rank(two, change, says):
    assert all(says in text for text in two.run(refused, change))


def test_a_batch_that_is_empty_everywhere_is_zero(two):
    for value, image, *_ in two.run(sharded_step, whole(0, torch.float32), [0, 0], ONES, {}):
        assert value == 0 and image.shape == (0, 12)


def erase_step(rank, features_of_all, sizes, ids, process_group="local", **options):
    """The terms of CLIPErase, and the gradients of the student's features, scale and bias."""
    own = [tensor.split(sizes)[rank] for tensor in (*features_of_all, ids)]
    *student, teacher_image, teacher_text = [tensor.clone() for tensor in own[:-1]]
    leaves = [tensor.requires_grad_() for tensor in student]
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (14.0, -5.0)]
    group = dist.group.WORLD if process_group == "world" else process_group
    terms = sigmoid_cliperase_loss(
        *leaves, teacher_image, teacher_text, *numbers, 12.0, -4.0, group_ids=own[-1], process_group=group, **options
    )
    return [term.detach() for term in terms], torch.autograd.grad(terms.total, [*leaves, *numbers], allow_unused=True)


@pytest.mark.parametrize("sizes", [[5, 5], [7, 0]])
@pytest.mark.parametrize("forget", ["cosine", "contrastive"])
def test_cliperase_with_the_sigmoid_loss_is_that_of_the_whole_batch(two, sizes, forget):
    given = [features(sum(sizes), 12, seed, torch.float64) for seed in range(6)]
    ids = torch.arange(sum(sizes)) // 2
    exact, gradients = erase_step(0, given, [sum(sizes)], ids, backend="eager", forget=forget)
    parts = two.run(partial(erase_step, process_group="world", forget=forget), given, sizes, ids)
    for terms, _ in parts:
        torch.testing.assert_close(torch.stack(terms), torch.stack(exact), atol=1e-12, rtol=1e-10)
    for place, right in enumerate(gradients):
        found = [part[1][place] for part in parts]
        whole_batch = torch.cat(found) / len(sizes) if right.ndim else torch.stack(found).mean()
        torch.testing.assert_close(whole_batch, right, atol=1e-12, rtol=1e-10)
