"""A batch over 2 and 4 gloo ranks gives the loss and the gradients of one process with the whole batch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from shared_batches import EVEN, UNEVEN, as_one_process, assert_close, groups, sharded_step, step, whole_batch

from cliperase_fast.functional import clip_loss, similarity_kl
from cliperase_fast.ops.registry import REGISTRY

OPTIONS = list(itertools.product(("cosine", "hinge", "contrastive"), ("logits", "features", "intra")))
BACKENDS = [
    name
    for name, backend in REGISTRY.items()
    if backend.shards and backend.missing is None and (backend.devices is None or "cpu" in backend.devices)
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(ranks, sizes, dtype, weights=(1.0, 0.0, 0.0, 0.0), **options) -> None:
    forget_sizes, retain_sizes = sizes[ranks.size]
    with_groups = options.pop("groups", False)
    batch = whole_batch(sum(forget_sizes), sum(retain_sizes), dtype)
    batch["group_ids"] = groups(sum(retain_sizes)) if with_groups else None
    alone = {name: value for name, value in options.items() if name != "gather"}
    exact = step({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()},
                 weights, **{**alone, "backend": "eager"})  # fmt: skip
    parts = ranks.run(sharded_step, batch, forget_sizes, retain_sizes, weights, options)
    assert all(part["total"].dtype == dtype for part in parts)
    assert_close(as_one_process(parts), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize(("forget", "consistency"), OPTIONS)
def test_every_option_on_four_uneven_ranks_one_of_them_empty(four, forget, consistency, gather, dtype):
    check(four, UNEVEN, dtype, forget=forget, consistency=consistency, margin=0.05, gather=gather, groups=True)


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("with_groups", [False, True])
def test_two_ranks(two, with_groups, gather, sizes):
    for forget, consistency in (("contrastive", "logits"), ("hinge", "intra"), ("cosine", "features")):
        check(two, sizes, torch.float64, forget=forget, consistency=consistency, gather=gather, groups=with_groups)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_that_can(two, backend, gather):
    for keep in ("nothing", "similarities"):
        options = {"forget": "contrastive", "backend": backend, "gather": gather, "groups": True, "keep": keep}
        check(two, UNEVEN, torch.float32, **options)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_four_even_ranks(four, gather):
    check(four, EVEN, torch.float64, forget="contrastive", gather=gather)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0, 0.0), (0.0, 0.0, -2.5, 1e3), (1.0, 0.5, 0.0, 2.0)])
def test_terms_used_apart_with_incoming_gradients_other_than_one(two, weights, gather):
    check(two, UNEVEN, torch.float64, weights, forget="contrastive", gather=gather)


@pytest.mark.parametrize("off", ["lambda_retain", "lambda_forget", "lambda_consistency"])
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_a_term_of_weight_zero_is_left_out_everywhere(two, off, gather):
    check(two, UNEVEN, torch.float64, gather=gather, groups=True, **{off: 0.0})


def _small_losses(rank: int, batch: dict, sizes: list[int], gather: str) -> list[torch.Tensor]:
    own = {name: batch[name].split(sizes)[rank] for name in ("retain_image", "retain_text", "group_ids")}
    teacher = [batch[name].split(sizes)[rank] for name in ("teacher_image", "teacher_text")]
    student = own["retain_image"], own["retain_text"], batch["logit_scale"]
    shared = {"process_group": dist.group.WORLD, "gather": gather}
    return [
        clip_loss(*student, group_ids=own["group_ids"], **shared),
        similarity_kl(*student, *teacher, batch["teacher_logit_scale"], **shared),
    ]


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_clip_loss_and_similarity_kl(four, gather):
    batch = {**whole_batch(0, 17, torch.float64, teacher_width=5), "group_ids": groups(17)}
    student = batch["retain_image"], batch["retain_text"], batch["logit_scale"]
    teacher = batch["teacher_image"], batch["teacher_text"], batch["teacher_logit_scale"]
    exact = [clip_loss(*student, group_ids=batch["group_ids"]), similarity_kl(*student, *teacher)]
    for found in four.run(_small_losses, batch, UNEVEN[4][1], gather):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_two_runs_are_bitwise_equal(four, gather):
    batch = whole_batch(7, 17, torch.float32)
    arguments = (batch, *UNEVEN[4], (1.0, 0.0, 0.0, 0.0), {"forget": "contrastive", "gather": gather})
    for first, second in zip(four.run(sharded_step, *arguments), four.run(sharded_step, *arguments), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (4, 0), (0, 0)])
def test_a_batch_that_is_empty_on_every_rank_is_zero(two, gather, m, n):
    for forget, consistency in OPTIONS:
        batch = whole_batch(m, n, torch.float64)
        sizes = [m // 2, m - m // 2], [n // 2, n - n // 2]
        options = {"forget": forget, "consistency": consistency, "gather": gather}
        found = as_one_process(two.run(sharded_step, batch, *sizes, (1.0, 0.0, 0.0, 0.0), options))
        alone = {"forget": forget, "consistency": consistency, "backend": "eager"}
        assert_close(found, step(batch, (1.0, 0.0, 0.0, 0.0), **alone), 1e-10)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_half_precision_costs_the_rounding_of_the_gradients_only(two, gather):
    batch = whole_batch(6, 16, torch.bfloat16)
    found = as_one_process(
        two.run(sharded_step, batch, *UNEVEN[2], (1.0, 0.0, 0.0, 0.0), {"gather": gather, "forget": "contrastive"})
    )
    exact = step({name: value.double() for name, value in batch.items()}, forget="contrastive", backend="eager")
    assert found["total"].dtype == torch.float32 and found["d retain_text"].dtype == torch.bfloat16
    assert_close(found, exact, 4e-3)
