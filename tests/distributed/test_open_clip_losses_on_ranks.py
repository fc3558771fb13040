"""The losses for open_clip on two ranks: its own values and gradients in each of its ways; the unlearning recipe."""

from __future__ import annotations

from types import SimpleNamespace

import open_clip.loss
import pytest
import torch
from shared_batches import features

import cliperase_fast as cf
from cliperase_fast.integrations.open_clip_unlearning import unlearning

SIZE = 9  # pairs on a rank
WAYS = [(local, grad) for local in (False, True) for grad in (False, True)]


def losses_and_gradients(rank, package, name, dtype, local_loss, gather_with_grad, environment=""):
    """(losses, gradients of image, text, scale, calls of open_clip's gathering) of one rank."""
    rows = slice(rank * SIZE, (rank + 1) * SIZE)
    whole = [features(2 * SIZE, width, seed, dtype) for seed, width in enumerate((12, 12, 8, 8))]
    image, text, *teacher = (part[rows].clone() for part in whole)
    scale = torch.tensor(14.0, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in (image, text, scale)]
    calls = []
    gather = open_clip.loss.gather_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.loss, "gather_features", lambda *a, **k: calls.append(1) or gather(*a, **k))
        patch.setenv("CLIPERASE_BACKEND", environment)
        kind = getattr(cf if package == "fused" else open_clip.loss, name)
        loss = kind(local_loss=local_loss, gather_with_grad=gather_with_grad, rank=rank, world_size=2)
        extra = (*teacher, 9.0) if name == "DistillClipLoss" else ()
        found = loss(image, text, scale, *extra, output_dict=True)
        total = sum(weight * value for weight, value in zip((1.0, 0.7), found.values(), strict=False))
        gradients = torch.autograd.grad(total, leaves)
    return {key: value.detach() for key, value in found.items()}, gradients, len(calls)


def compare(two, name, dtype, tolerance, way, environment=""):
    """Assert that all agree; how often the fused loss had open_clip gather features, on each rank."""
    stock, fused = (
        two.run(losses_and_gradients, package, name, dtype, *way, environment) for package in ("stock", "fused")
    )
    for (ours, our_gradients, _), (right, gradients, _) in zip(fused, stock, strict=True):
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)
        for mine, theirs in zip(our_gradients[:2], gradients[:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * max(1, theirs.abs().max().item()))
    ours, right = (torch.stack([gradients[2] for _, gradients, _ in ranks]) for ranks in (fused, stock))
    torch.testing.assert_close(ours.mean(), right.mean(), rtol=tolerance, atol=tolerance)  # as DDP averages it
    return [calls for _, _, calls in fused]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["ClipLoss", "DistillClipLoss"])
def test_every_way_of_open_clips_is_kept_and_own_rows_suffice(two, name, way, dtype, tolerance):
    gathered = compare(two, name, dtype, tolerance, way)
    if way == (True, False):  # others' features are constants, which no sharded sweep does
        assert min(gathered) > 0
    else:
        assert gathered == [0, 0]


@pytest.mark.parametrize("way", WAYS)
def test_a_backend_that_cannot_share_a_batch_sees_the_gathered_one(two, way):
    assert min(compare(two, "DistillClipLoss", torch.float64, 1e-12, way, "eager")) > 0


def siglip(rank, package, dist_impl, dtype, environment=""):
    """(loss, gradients of image, text, scale, bias, exchanges of open_clip's) of one rank."""
    rows = slice(rank * SIZE, (rank + 1) * SIZE)
    image, text = (features(2 * SIZE, 12, seed, dtype)[rows].clone() for seed in (0, 1))
    leaves = [
        leaf.requires_grad_()
        for leaf in (image, text, torch.tensor(14.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype))
    ]
    calls = []
    exchange = open_clip.loss.neighbour_exchange_with_grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.loss, "neighbour_exchange_with_grad", lambda *a: calls.append(1) or exchange(*a))
        patch.setenv("CLIPERASE_BACKEND", environment)
        loss = (cf if package == "fused" else open_clip.loss).SigLipLoss(rank=rank, world_size=2, dist_impl=dist_impl)
        value = loss(*leaves)
        gradients = torch.autograd.grad(0.7 * value, leaves)
    return value.detach(), gradients, len(calls)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("dist_impl", ["bidir", "shift", "reduce", "gather"])
def test_the_sigmoid_loss_has_open_clips_values_and_gradients_in_each_of_its_ways(two, dist_impl, dtype, tolerance):
    stock = two.run(siglip, "stock", dist_impl, dtype)
    fused = two.run(siglip, "fused", dist_impl, dtype)
    alone = two.run(siglip, "fused", dist_impl, dtype, "eager")  # a backend that cannot share: open_clip's exchange
    assert [calls for *_, calls in fused] == [0, 0]
    for ranks in (fused, alone):
        for (ours, our_gradients, _), (right, gradients, calls) in zip(ranks, stock, strict=True):
            assert (calls > 0) == (dist_impl in ("bidir", "shift"))
            torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance)
            for mine, theirs in zip(our_gradients, gradients, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * max(1, theirs.abs().max().item()))


DISTILLING = {"distill": True, "local_loss": False, "gather_with_grad": False, "torchcompile": False}


def unlearning_step(rank, rows, ranks):
    """What open_clip's loop gets from the recipe's loss for some rows of a batch of 3 pairs to forget, 6 to keep."""
    import open_clip_train.main as trainer

    forget, retain = rows
    whole = [features(9, width, seed, torch.float64) for seed, width in enumerate((12, 12, 8, 8))]
    image, text, *teacher = (torch.cat((part[:3][forget[rank]], part[3:][retain[rank]])) for part in whole)
    leaves = image.requires_grad_(), text.requires_grad_()
    pairs = forget[rank].stop - forget[rank].start
    with unlearning("unused", pairs, cf.CLIPEraseLoss(0.5, 2.0, 1.5)):
        arguments = SimpleNamespace(rank=rank, world_size=ranks, **DISTILLING)
        if hasattr(trainer, "create_task"):  # open_clip 4
            loss = trainer.create_task(arguments, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)).loss
        else:
            loss = trainer.create_loss(arguments)
    terms = loss(image, text, 14.0, *teacher, 9.0, output_dict=True)
    return {key: value.detach() for key, value in terms.items()}, torch.autograd.grad(sum(terms.values()), leaves)


def test_the_unlearning_recipe_on_two_ranks_has_the_whole_batchs_terms_and_gradients(two):
    forget, retain = (slice(0, 2), slice(2, 3)), (slice(0, 2), slice(2, 6))
    terms, gradients = unlearning_step(0, ((slice(0, 3),), (slice(0, 6),)), 1)
    for rank, (found, of_features) in enumerate(two.run(unlearning_step, (forget, retain), 2)):
        torch.testing.assert_close(found, terms)
        for mine, exact in zip(of_features, gradients, strict=True):
            own = torch.cat((exact[:3][forget[rank]], exact[3:][retain[rank]]))
            torch.testing.assert_close(mine / 2, own)  # the mean over ranks, as DDP takes it
