"""Test that all ranks raise an error that names what differs or is wrong on any of them, and that none hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import COLLECTIVE_TIMEOUT
from shared_batches import EVEN, STUDENT, as_one_process, part, sharded_step, whole_batch

from cliperase_fast.errors import InputError
from cliperase_fast.functional import clip_loss, cliperase_loss, similarity_kl
from cliperase_fast.losses import CLIPEraseLoss

WHOLE = (1.0, 0.0, 0.0, 0.0)


def _with_one_different(rank: int, batch: dict, what: str) -> None:
    own = part(batch, rank, *EVEN[2])
    options: dict = {}
    student = {name: own[name].requires_grad_() for name in STUDENT}
    if rank == 1:
        if what == "forget":
            options["forget"] = "hinge"
        elif what == "lambda_retain":
            options["lambda_retain"] = 0.5
        elif what == "gather":
            options["gather"] = "ring"
        elif what == "keep":
            options["keep"] = "similarities"
        elif what == "dtype":
            student["retain_text"] = student["retain_text"].float()
        elif what == "gradient":
            student["retain_image"] = student["retain_image"].detach()
        elif what == "groups":
            own["group_ids"] = torch.zeros(len(own["retain_image"]), dtype=torch.int64)
        elif what == "teacher width":
            own["teacher_image"], own["teacher_text"] = own["teacher_image"][:, :5], own["teacher_text"][:, :5]
        elif what == "shape":
            own["retain_text"] = student["retain_text"] = student["retain_text"][:-1]
        elif what == "backend":
            options["backend"] = "nonsense"
        elif what == "gather mode":
            options["gather"] = "rings"
        elif what == "loss":
            clip_loss(own["retain_image"], own["retain_text"], 1.0, process_group=dist.group.WORLD)
    cliperase_loss(**{**own, **student}, process_group=dist.group.WORLD, **options)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("forget", "ranks differ in forget (cosine on rank 0, hinge on rank 1); give the same on every rank"),
        ("lambda_retain", "ranks differ in lambda_retain (1.0 on rank 0, 0.5 on rank 1)"),
        ("gather", "ranks differ in gather (all on rank 0, ring on rank 1)"),
        ("keep", "ranks differ in keep (auto on rank 0, similarities on rank 1)"),
        ("dtype", "text features (torch.float64 of width 12 with gradient on rank 0, torch.float32 of width 12 with"),
        ("gradient", "image features (torch.float64 of width 12 with gradient on rank 0, torch.float64 of width 12 w"),
        ("groups", "group_ids (none on rank 0, torch.int64 without gradient on rank 1)"),
        ("teacher width", "teacher_text (torch.float64 of width 12 without gradient on rank 0, torch.float64 of wid"),
        ("shape", "differ in number of rows"),
        ("backend", "backend='nonsense' is not a backend"),
        ("gather mode", "gather='rings' is not known; use one of all, ring"),
        ("loss", "loss (cliperase_loss on rank 0, clip_loss on rank 1)"),
    ],
)
def test_every_rank_is_told_what_differs_and_goes_on(two, what, text):
    batch = whole_batch(6, 16, torch.float64)
    started = time.monotonic()
    for fine, answer in two.try_all(_with_one_different, batch, what):
        assert not fine
        kind, message, trace = answer
        assert kind == "InputError" and text in message, trace
    assert time.monotonic() - started < COLLECTIVE_TIMEOUT.total_seconds()  # nobody has waited for a timeout
    # the group is as usable as before
    assert as_one_process(two.run(sharded_step, batch, *EVEN[2], WHOLE, {}))["total"].isfinite()


def test_a_rank_that_stops_is_named_to_the_others(two):
    answers = two.try_all(_with_one_different, whole_batch(6, 16, torch.float64), "shape")
    assert answers[0][1][1].startswith("rank 1 stopped: retain_image [8, 12] and retain_text [7, 12]")
    assert answers[1][1][1].startswith("retain_image [8, 12] and retain_text [7, 12]")


def _eager(rank: int) -> None:
    clip_loss(torch.eye(2), torch.eye(2), 1.0, backend="eager", process_group=dist.group.WORLD)


def test_the_eager_backend_takes_no_group(two):
    for fine, answer in two.try_all(_eager):
        assert not fine and "backend='eager' does not work with a process_group; use auto, torch" in answer[1]


def _on_meta(rank: int) -> None:
    features = torch.eye(2, device="meta")
    clip_loss(features, features, 1.0, backend="torch", process_group=dist.group.WORLD)


def test_a_device_without_a_backend_in_the_group_is_named(two):
    for fine, answer in two.try_all(_on_meta):
        assert not fine and answer[0] == "InputError" and "has no backend for tensors on meta" in answer[1]


def _not_a_member(rank: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return str(clip_loss(torch.eye(2), torch.eye(2), 1.0, process_group=group).item())
    try:
        clip_loss(torch.eye(2), torch.eye(2), 1.0, process_group=group)
    except InputError as error:
        return str(error)
    return "nothing"


def test_ranks_outside_a_group_of_one_are_refused(two):
    alone, outside = two.run(_not_a_member)
    assert float(alone) == pytest.approx(clip_loss(torch.eye(2), torch.eye(2), 1.0).item(), rel=1e-6)
    assert "not a member of the group" in outside


def test_without_a_group_being_initialised_it_says_what_to_call():
    x = torch.eye(3)
    for call in (
        lambda group: clip_loss(x, x, 1.0, process_group=group),
        lambda group: similarity_kl(x, x, 1.0, x, x, 1.0, process_group=group),
        lambda group: CLIPEraseLoss(process_group=group)(x, x, x, x, x, x, 1.0, 1.0),
    ):
        with pytest.raises(InputError, match=r"not initialised; call torch\.distributed\.init_process_group\(\)"):
            call(True)


def _not_a_group(rank: int) -> str:
    try:
        clip_loss(torch.eye(2), torch.eye(2), 1.0, process_group="gloo")
    except InputError as error:
        return str(error)
    return "nothing"


def test_a_process_group_of_another_type_is_named(two):
    assert all("torch.distributed.ProcessGroup, not another str" in text for text in two.run(_not_a_group))


def test_an_unknown_way_to_gather_is_named_without_a_group_too():
    with pytest.raises(InputError, match="gather='rings' is not known; use one of all, ring"):
        CLIPEraseLoss(gather="rings")
    with pytest.raises(InputError, match="gather='some'"):
        clip_loss(torch.eye(2), torch.eye(2), 1.0, gather="some")
