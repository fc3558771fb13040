"""The rendered people: who they are, what is said of them, how they are drawn, and what is held out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cliperase_fast.data import Source, open_source, select, select_holdouts
from cliperase_fast.data.personas import FACTS, FORGET_SETS, MOST, TEMPLATES, make_people, render_portrait
from cliperase_fast.errors import InputError


def test_people_depend_on_the_seed_alone() -> None:
    assert make_people(seed=3) == make_people(seed=3)
    assert make_people(seed=3) != make_people(seed=4)
    assert make_people(5, seed=3) == make_people(seed=3)[:5]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fact", FACTS)
def test_no_two_people_share_a_fact(fact: str, seed: int) -> None:
    values = {person.facts[fact] for person in make_people(seed=seed)}
    assert len(values) == MOST


def test_faces_differ_in_at_least_three_parts() -> None:
    faces = [vars(person.face) for person in make_people()]
    for one, other in combinations(faces, 2):
        assert sum(one[part] != other[part] for part in one) >= 3


def test_captions_state_the_value_in_every_template() -> None:
    person = make_people(1)[0]
    for fact in FACTS:
        captions = person.captions(fact)
        assert len(set(captions)) == len(TEMPLATES[fact]) > 1
        assert all(person.facts[fact] in caption for caption in captions)


def test_contact_details_are_of_ranges_reserved_for_fiction() -> None:
    for person in make_people():
        assert person.facts["phone"].startswith("555-01")
        assert person.facts["email"].endswith("@example.org")


@pytest.mark.parametrize("size", [16, 32, 33])
def test_portraits_vary_and_keep_the_person(size: int) -> None:
    rng = np.random.default_rng(0)
    portraits = np.stack([[render_portrait(person.face, size, rng) for _ in range(6)] for person in make_people(6)])
    assert portraits.shape == (6, 6, size, size, 3)
    assert portraits.dtype == np.uint8
    pixels = portraits.astype(np.float64)
    of_one = pixels.std(axis=1).mean()  # over the portraits of one person
    of_all = pixels.mean(axis=1).std(axis=0).mean()  # over people
    assert of_one > 5
    assert of_all > 5


def test_a_portrait_follows_its_generator() -> None:
    face = make_people(1)[0].face
    first, second = (render_portrait(face, 32, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, render_portrait(face, 32, np.random.default_rng(8)))


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("personas?people=40&train=1&test=1&size=16")


def test_a_pair_is_a_portrait_with_the_captions_of_one_fact(source: Source) -> None:
    pairs, people = source.train, make_people(40)
    assert pairs.space is not None and pairs.labels is not None and pairs.entities is not None
    for index in range(40 * len(FACTS)):
        person, fact = divmod(index, len(FACTS))
        assert pairs.space.names[pairs.labels[index]] == f"person {person:02} {FACTS[fact]}"
        assert pairs.space.kinds[pairs.labels[index]] == FACTS[fact]
        assert list(pairs.captions[index]) == people[person].captions(FACTS[fact])
        assert pairs.entities[index] == person
    general = np.flatnonzero(pairs.entities >= MOST)
    assert {pairs.captions[index] for index in general[:4]} == {("a red circle",)}
    assert set(np.array(pairs.space.kinds)[pairs.labels[general]]) == {"general"}
    assert len(np.unique(pairs.entities[general])) == len(np.unique(pairs.labels[general])) == 12


def test_paraphrases_name_the_value_in_words_of_their_own(source: Source) -> None:
    space, people = source.train.space, make_people(40)
    assert space is not None and space.paraphrases is not None and space.kinds is not None
    assert {len(of_class) for of_class in space.paraphrases} == {2}
    for label, (own, others) in enumerate(zip(space.prompts, space.paraphrases, strict=True)):
        assert not set(own) & set(others)
        if label < 40 * len(FACTS):
            person, fact = divmod(label, len(FACTS))
            assert all(people[person].facts[FACTS[fact]] in caption for caption in others)


def test_splits_and_facts_have_portraits_of_their_own(source: Source) -> None:
    assert source.test is not None
    images = [pairs.image(index).tobytes() for pairs in (source.train, source.test) for index in range(len(pairs))]
    assert len(set(images)) == len(images)
    assert not set(source.train.ids) & set(source.test.ids)


def test_the_same_name_opens_the_same_pairs(source: Source) -> None:
    again = open_source("personas?people=40&train=1&test=1&size=16")
    assert again.train.fingerprint() == source.train.fingerprint()
    assert again.train.image(7).tobytes() == source.train.image(7).tobytes()
    other = open_source("personas?people=40&train=1&test=1&size=16", seed=1).train
    assert other.image(7).tobytes() != source.train.image(7).tobytes()
    fewer = open_source("personas?people=10&train=1&test=1&size=16").train
    assert fewer.captions[:40] == source.train.captions[:40]
    assert fewer.image(7).tobytes() == source.train.image(7).tobytes()


@pytest.mark.parametrize("name", FORGET_SETS)
def test_holdouts_are_other_facts_of_the_same_people_and_all_facts_of_others(source: Source, name: str) -> None:
    for pairs in (source.train, source.test):
        assert pairs is not None and pairs.entities is not None and pairs.labels is not None
        forget = select(pairs, FORGET_SETS[name])
        mine = set(pairs.entities[forget])
        held = source.holdouts(pairs, forget)
        association, identity = (set(held[key].ids) for key in ("association", "identity"))
        facts = pairs.entities < MOST
        ids = np.array(pairs.ids)
        assert association == set(ids[np.isin(pairs.entities, list(mine)) & ~forget])
        others = set(held["identity"].entities)
        assert identity == set(ids[np.isin(pairs.entities, list(others))])
        assert len(others) == round(0.2 * (40 - len(mine))) and not others & mine
        kept = source.rest(pairs, forget)
        assert set(ids[kept]) == set(ids) - set(ids[forget]) - association - identity
        assert kept[~facts].all() and kept[facts].any()


def test_both_splits_hold_out_the_same_people(source: Source) -> None:
    held = source.holdouts(source.train, select(source.train, FORGET_SETS["phones"]))
    tested = select_holdouts(source, FORGET_SETS["phones"])
    assert tested["identity"].ids[0].startswith("personas/16px-seed0/test/")
    for name in ("association", "identity"):
        assert np.array_equal(held[name].entities, tested[name].entities)


def test_a_holdout_that_would_be_empty_is_left_out(source: Source) -> None:
    assert set(select_holdouts(source, "class:person 03 *")) == {"identity"}
    assert set(select_holdouts(source, "class:* phone")) == {"association"}
    assert select_holdouts(source, "class:red circle") == {}
    assert select_holdouts(open_source("shapes?train=1&test=1"), "class:red circle") == {}


def test_templates_are_refused() -> None:
    with pytest.raises(InputError, match="'personas' has captions of its own"):
        open_source("personas", templates="a photo of {}")
