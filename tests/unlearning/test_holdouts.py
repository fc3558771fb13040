"""What a source holds out is seen neither by unlearning nor counted as retained."""

import numpy as np
import pytest
import torch
from tiny import QUICK, make_tiny_clip

import cliperase_fast as cf
from cliperase_fast.auditing import sets as audit_sets
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import open_source, select, select_holdouts
from cliperase_fast.unlearning.splits import open_sets, prepare_data

SPEC = "personas?people=12&train=1&test=1&size=16"
SELECTOR = "class:person 0[0-2] phone,person 01 job"
FORGET = f"{SPEC}#{SELECTOR}"


@pytest.fixture(scope="module")
def held_out():
    """The ids of the training and of the test pairs that are held out."""
    source = open_source(SPEC)
    train = source.holdouts(source.train, select(source.train, SELECTOR))
    test = select_holdouts(source, SELECTOR)
    return tuple({name: set(pairs.ids) for name, pairs in held.items()} for held in (train, test))


def test_no_pair_of_a_run_is_held_out(held_out):
    sets = open_sets(FORGET, "rest", None, UnlearnConfig(), templates=None)
    data = prepare_data(sets, UnlearnConfig(), progress=False)
    seen = {name: set(part.pairs.ids) for name, part in vars(data).items() if name in ("train", "validation", "test")}
    train, test = (set.union(*of.values()) for of in held_out)
    assert len(train) == len(test) > 8
    assert not seen["train"] & train and not seen["validation"] & train and not seen["test"] & test
    source = open_source(SPEC)
    assert seen["test"] | test == set(source.test.ids)
    assert seen["train"] | seen["validation"] | train == set(source.train.ids)
    assert {name: set(pairs.ids) for name, pairs in data.holdouts.items()} == held_out[1]
    assert data.names["retain"] == "rest without the holdouts (association and identity)"
    assert data.train.pairs.entities is not None


def open_audit_sets(*data, **more):
    return audit_sets.read_sets(audit_sets.open_sets(*data, **more))


def test_the_audit_scores_the_holdouts_that_unlearning_leaves_out(held_out):
    sets = open_audit_sets(FORGET, "rest")
    assert {name: set(pairs.ids) for name, pairs in sets.holdouts.items()} == held_out[1]
    run = open_sets(FORGET, "rest", None, UnlearnConfig(), templates=None)
    assert set(sets.retain.ids) == set(run.retain.ids)
    assert set(sets.test.ids) == set(run.test[0].ids) | set(run.test[1].ids)


def test_an_audit_with_the_numbers_of_a_run_scores_the_pairs_that_it_held_out():
    pairs = [(torch.full((3, 8, 8), float(n)), f"a {n % 2} thing") for n in range(40)]
    config = UnlearnConfig(seed=3, test_fraction=0.4)
    data = prepare_data(open_sets(pairs[::2], pairs[1::2], None, config, templates=None), config, progress=False)
    numbers = {"seed": config.seed, "test_fraction": config.test_fraction}
    sets = audit_sets.read_sets(audit_sets.open_sets(pairs[::2], pairs[1::2], **numbers), **numbers)
    drawn = [{float(part[n][0].mean()) for n in range(len(part))} for part in (data.test.pairs, sets.test)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 16


def test_test_pairs_that_are_training_pairs_are_noted():
    pairs = [(torch.full((3, 8, 8), n / 40), f"a {('red', 'green')[n % 2]} square") for n in range(40)]
    new = [(image + 1, caption) for image, caption in pairs]
    forget, retain = pairs[::2], pairs[1::2]
    for test, said in (
        ((forget, retain), "40 of the 40 test pairs show images of the training data"),
        ((new[::2], [*new[1::2], pairs[3]]), "1 of the 41 test pairs shows an image of the training data"),
        ((new[::2], new[1::2]), None),
        (None, None),
    ):
        result = cf.unlearn(make_tiny_clip(), forget, retain, test=test, **QUICK)
        audited = audit_sets.read_sets(audit_sets.open_sets(forget, retain, test))
        for notes in (result.record["notes"], audited.notes):
            found = [note for note in notes if "of the training data, so" in note]
            assert len(found) == (said is not None) and all(note.startswith(said) for note in found)


def test_holdouts_that_are_given_win():
    own = open_source("personas?people=2&train=1&test=1&size=16").test
    sets = open_audit_sets(FORGET, "rest", holdouts={"identity": own})
    assert list(sets.holdouts) == ["identity"] and sets.holdouts["identity"] is own
    assert open_audit_sets(FORGET, "rest", holdouts={}).holdouts == {}


def test_nothing_is_held_out_where_the_retain_pairs_are_named():
    everything = open_sets(FORGET, SPEC, None, UnlearnConfig(overlap="drop"), templates=None)
    source = open_source(SPEC)
    assert everything.holdouts == {}
    assert len(everything.forget) + len(everything.retain) == len(source.train)
    assert sum(map(len, everything.test)) == len(source.test)
    sets = open_audit_sets(FORGET, SPEC)
    assert sets.holdouts == {} and len(sets.forget) + len(sets.retain) == len(source.train)


def test_a_test_split_named_by_its_source_loses_the_holdouts_too(held_out):
    named = open_sets(FORGET, "rest", SPEC, UnlearnConfig(), templates=None)
    assert not set(named.test[1].ids) & set.union(*held_out[1].values())
    audited = open_audit_sets(FORGET, "rest", SPEC)
    assert set(audited.test.ids) == set(named.test[0].ids) | set(named.test[1].ids)


def test_portraits_of_one_person_are_not_negatives_in_a_run(monkeypatch):
    from cliperase_fast.unlearning import batches

    groups = []
    original = batches.BatchLoader._batch

    def recorded(self, number, pixels):
        made = original(self, number, pixels)
        groups.append((made.group_ids.numpy(), self._pairs_of(number)[0], self.pixels.pairs.entities))
        return made

    monkeypatch.setattr(batches.BatchLoader, "_batch", recorded)
    cf.unlearn(
        make_tiny_clip(), FORGET, "rest", **{**QUICK, "epochs": 1, "batch_size": 16, "long_captions": "truncate"}
    )
    assert groups
    for found, rows, entities in groups:
        assert np.array_equal(found, entities[rows])
