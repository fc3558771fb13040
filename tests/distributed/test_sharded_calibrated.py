"""Calibrated forgetting over gloo ranks gives the loss and the gradients of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from calibrated_cases import STUDENT, batch, exact, step
from shared_batches import as_one_process, assert_close
from torch import Tensor

from cliperase_fast.functional import calibrated_loss
from cliperase_fast.ops.registry import REGISTRY
from cliperase_fast.validation import computes

BACKENDS = [
    name
    for name, backend in REGISTRY.items()
    if backend.shards and backend.missing is None and computes(backend, "calibrated", "cpu")
]
# ranks -> pairs of each; an empty rank, and forget pairs on some ranks only (see `spread`)
EVEN, UNEVEN = {2: [8, 8], 4: [5, 5, 5, 5]}, {2: [3, 13], 4: [7, 2, 0, 11]}
WEIGHTS = (0.0, 0.7, -2.0, 1.3, 5.0)


def part(b: dict[str, Any], rank: int, sizes: list[int]) -> dict[str, Any]:
    return {
        name: value.split(sizes)[rank].clone() if isinstance(value, Tensor) and value.ndim else value
        for name, value in b.items()
    }


def sharded_step(rank: int, b: dict, sizes: list[int], weights: tuple, options: dict) -> dict[str, Tensor]:
    return step(part(b, rank, sizes), weights, process_group=dist.group.WORLD, **options)


def check(ranks, sizes, dtype=torch.float64, weights=WEIGHTS, b=None, tolerance=1e-10, **options) -> None:
    b = batch(sum(sizes[ranks.size]), dtype=dtype) if b is None else b
    parts = ranks.run(sharded_step, b, sizes[ranks.size], weights, options)
    alone = {name: value for name, value in options.items() if name not in ("gather", "backend", "keep")}
    assert_close(as_one_process(parts), step(exact(b), weights, backend="eager", **alone), tolerance)


def on_some_ranks(n: int, first: int, last: int) -> Tensor:
    places = torch.arange(n)
    return (first <= places) & (places < last)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no groups"])
@pytest.mark.parametrize("background", [True, False], ids=["background", "from the batch"])
def test_four_uneven_ranks_one_of_them_empty(four, gather, groups, background):
    b = batch(20, groups=groups, background=background)
    check(four, UNEVEN, b=b, gather=gather)
    # forget pairs on the last rank only; first on it and on all of the first two; nowhere; everywhere
    for mask in (
        on_some_ranks(20, 12, 17),
        on_some_ranks(20, 0, 12),
        on_some_ranks(20, 0, 0),
        on_some_ranks(20, 0, 20),
    ):
        check(four, UNEVEN, b={**b, "forget_mask": mask}, gather=gather)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_on_two_ranks(two, backend, sizes, gather):
    for keep in ("nothing", "similarities"):
        check(two, sizes, torch.float32, tolerance=2e-6, backend=backend, gather=gather, keep=keep)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("weights", [(1.0, 0, 0, 0, 0), (0, 0, 1e3, 0, 0), (0, 0, 0, 0, -2.5)])
def test_terms_apart_with_any_incoming_gradient(two, weights, gather):
    check(two, UNEVEN, weights=weights, gather=gather)
    check(two, EVEN, weights=weights, gather=gather, lambda_consistency=0.0)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_batches_of_no_and_of_one_pair(two, gather):
    for sizes in ([0, 0], [0, 1], [1, 0]):
        for forget in ("none", "all"):
            check(two, {2: sizes}, b=batch(sum(sizes), forget=forget), gather=gather, weights=(1.0, 0, 0, 0, 0))


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_results_are_bitwise_reproducible(four, gather):
    arguments = (sharded_step, batch(20, dtype=torch.float32), UNEVEN[4], (1.0, 0, 0, 0, 0), {"gather": gather})
    for first, second in zip(four.run(*arguments), four.run(*arguments), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def single_gradient(rank: int, b: dict, sizes: list[int], needed: str, gather: str) -> Tensor:
    own = part(b, rank, sizes)
    own[needed].requires_grad_()
    calibrated_loss(**own, process_group=dist.group.WORLD, gather=gather).total.backward()
    assert all(own[name].grad is None for name in STUDENT if name != needed)
    return own[needed].grad


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("needed", STUDENT)
def test_a_single_input_may_need_the_gradient(two, needed, gather):
    b = batch(16)
    found = two.run(single_gradient, b, UNEVEN[2], needed, gather)
    whole = torch.stack(found).mean(0) if needed == "logit_scale" else torch.cat(found) / 2
    torch.testing.assert_close(whole, step(b, backend="eager")[f"d {needed}"])


def other_weights(rank: int, b: dict, sizes: list[int]) -> None:
    calibrated_loss(**part(b, rank, sizes), lambda_anchor=1.0 + rank, process_group=dist.group.WORLD)


def no_mask(rank: int, b: dict, sizes: list[int]) -> None:
    own = part(b, rank, sizes)
    calibrated_loss(**{**own, "forget_mask": None} if rank else own, process_group=dist.group.WORLD)


def test_ranks_that_disagree_or_stop_are_named_on_every_rank(two):
    for function, message in (
        (other_weights, r"lambda_anchor (1.0 on rank 0, 2.0 on rank 1)"),
        (no_mask, "forget_mask must be a bool tensor"),
    ):
        for returned, error in two.try_all(function, batch(16), EVEN[2]):
            assert not returned and error[0] == "InputError" and message in error[1], error
