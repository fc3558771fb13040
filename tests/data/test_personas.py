"""The rendered people: who they are, what is said of them, and how they are drawn."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cliperase_fast.data.personas import FACTS, MOST, TEMPLATES, make_people, render_portrait


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
