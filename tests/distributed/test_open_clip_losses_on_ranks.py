"""cf.ClipLoss and cf.DistillClipLoss on two ranks: values and gradients of open_clip's own, in each of its ways."""

from __future__ import annotations

import open_clip.loss
import pytest
import torch
from shared_batches import features

import cliperase_fast as cf

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
