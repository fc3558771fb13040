"""Test process_group="local", "world" and None, the value of torch.distributed.group.WORLD before initialisation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from shared_batches import features

import cliperase_fast as cf
from cliperase_fast.contrastive import distill_clip_loss, sigmoid_loss
from cliperase_fast.functional import clip_loss, cliperase_loss, similarity_kl

SIZE = 4  # pairs on a rank
REMEDY = "pass process_group='world' for the batch of all processes, or 'local' for a loss of each process's own pairs"


def batch(*ranks):
    rows = slice(ranks[0] * SIZE, (ranks[-1] + 1) * SIZE)
    return [features(2 * SIZE, 6, seed, torch.float64)[rows].clone() for seed in range(4)]


LOSSES = {
    "module": lambda image, text, *teacher, **group: (
        cf.CLIPEraseLoss(**group)(image, text, image, text, *teacher, 9.0, 8.0).total
    ),
    "cliperase_loss": lambda image, text, *teacher, **group: (
        cliperase_loss(image, text, image, text, *teacher, 9.0, 8.0, **group).total
    ),
    "clip_loss": lambda image, text, *_, **group: clip_loss(image, text, 9.0, **group),
    "similarity_kl": lambda image, text, *teacher, **group: similarity_kl(image, text, 9.0, *teacher, 8.0, **group),
    "distill_clip_loss": lambda image, text, *teacher, **group: sum(
        distill_clip_loss(image, text, 9.0, *teacher, 8.0, **group)
    ),
    "sigmoid_loss": lambda image, text, *_, **group: sigmoid_loss(image, text, 9.0, -2.0, **group),
}


def value_on(rank, name, group):
    return LOSSES[name](*batch(rank), **group).item()


def refusal_on(rank, name, group):
    try:
        return value_on(rank, name, group)
    except cf.InputError as error:
        return str(error)


@pytest.mark.parametrize("name", LOSSES)
def test_world_is_the_batch_of_all_ranks_and_local_is_each_ranks_own(two, name):
    whole = LOSSES[name](*batch(0, 1)).item()
    own = [LOSSES[name](*batch(rank)).item() for rank in range(2)]
    assert two.run(value_on, name, {"process_group": "world"}) == pytest.approx([whole, whole], rel=1e-12)
    assert two.run(value_on, name, {"process_group": "local"}) == pytest.approx(own, rel=1e-12)
    assert two.run(value_on, name, {}) == pytest.approx(own, rel=1e-12)
    assert abs(own[0] - whole) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_none_on_several_ranks_is_refused_with_the_remedy(two, name):
    for text in two.run(refusal_on, name, {"process_group": None}):
        assert "process_group=None among 2 processes" in text and REMEDY in text


def called(rank, loss):
    image, text, *teacher = batch(rank)
    try:
        return loss(image, text, image, text, *teacher, 9.0, 8.0).total.item()
    except cf.InputError as error:
        return str(error)


def test_a_module_made_before_the_processes_are_joined_is_resolved_when_it_is_called(two):
    assert dist.group.WORLD is None  # nothing is initialised in this process
    whole = LOSSES["module"](*batch(0, 1)).item()
    assert two.run(called, cf.CLIPEraseLoss(process_group="world")) == pytest.approx([whole, whole], rel=1e-12)
    for text in two.run(called, cf.CLIPEraseLoss(process_group=dist.group.WORLD)):
        assert REMEDY in text


@pytest.mark.parametrize("name", LOSSES)
def test_none_is_refused_among_processes_that_are_not_joined_yet(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(cf.InputError, match=REMEDY):
        LOSSES[name](*batch(0), process_group=dist.group.WORLD)
    assert LOSSES[name](*batch(0)).item() == LOSSES[name](*batch(0), process_group="local").item()


def test_a_module_with_none_is_refused_at_construction_among_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(cf.InputError, match=REMEDY):
        cf.CLIPEraseLoss(process_group=None)
    cf.CLIPEraseLoss(), cf.CLIPEraseLoss(process_group="local"), cf.CLIPEraseLoss(process_group="world")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [None, "1", "", "x"])
def test_none_in_a_single_process_is_its_own_batch_as_ever(name, size, monkeypatch):
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert LOSSES[name](*batch(0), process_group=None).item() == LOSSES[name](*batch(0)).item()


@pytest.mark.parametrize("name", LOSSES)
def test_world_without_joined_processes_says_what_to_call(name):
    with pytest.raises(cf.InputError, match=r"'world': .*call torch\.distributed\.init_process_group\(\)"):
        LOSSES[name](*batch(0), process_group="world")


def test_another_word_is_refused_at_construction():
    with pytest.raises(cf.InputError, match="process_group='all' is not known; use 'local'"):
        cf.CLIPEraseLoss(process_group="all")


def test_a_module_for_the_world_can_be_copied_and_shows_it():
    loss = cf.CLIPEraseLoss(process_group="world", gather="ring")
    assert copy.deepcopy(loss).process_group == pickle.loads(pickle.dumps(loss)).process_group == "world"
    assert "process_group='world', gather='ring'" in repr(loss)
    assert "process_group" not in repr(cf.CLIPEraseLoss())


def eager_on_one(rank):
    group = dist.new_group([rank], use_local_synchronization=True)
    return clip_loss(*batch(rank)[:2], 9.0, process_group=group).item()


def test_a_group_of_one_rank_is_that_ranks_batch(two):
    own = [LOSSES["clip_loss"](*batch(rank)).item() for rank in range(2)]
    assert two.run(eager_on_one) == pytest.approx(own, rel=1e-12)
