"""Classes of several kinds: an image is asked about the kind of its label, and an entity about its portraits."""

import dataclasses

import numpy as np
import pytest
import torch
from worlds import class_world, unit, view_of

from cliperase_fast.auditing import scores
from cliperase_fast.auditing.attacks import ForgetTest
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.scores import Features

KINDS = np.array([0, 0, 1, 1, 0, 1])


def world_of_kinds(seed=0):
    layout, features = class_world(noise=1.0, seed=seed)
    return dataclasses.replace(layout, kinds=KINDS), features


def class_mean(values, labels):
    return np.mean([np.mean(values[labels == label]) for label in np.unique(labels)])


@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_count_concepts_and_images_of_one_kind(seed):
    layout, features = world = world_of_kinds(seed)
    cosine = features.images.double().numpy() @ features.concepts.double().numpy().T
    labels, forget = layout.labels, layout.forget
    rivals = KINDS[labels][:, None] == KINDS
    ranks = np.array([(cosine[i, rivals[i]] >= cosine[i, labels[i]]).sum() for i in range(len(labels))])
    view = view_of(world)
    assert view.correct.tolist() == (ranks == 1).tolist()
    assert scores.zero_shot_top1(view).value == pytest.approx(class_mean(ranks[forget] == 1, labels[forget]))
    assert scores.retain_top1(view).value == pytest.approx(class_mean(ranks[~forget] == 1, labels[~forget]))
    found = scores.mrr(view)
    assert found["mrr_image_to_text"].value == pytest.approx(class_mean(1 / ranks[forget], labels[forget]))
    reverse = []
    for concept in (1, 4):
        wrong = (KINDS[labels] == KINDS[concept]) & (labels != concept)
        reverse.append(1 / (1 + (cosine[wrong, concept] >= cosine[labels == concept, concept].max()).sum()))
    assert found["mrr_text_to_image"].value == pytest.approx(np.mean(reverse))
    low, high = found["mrr_text_to_image"].interval
    assert low <= np.mean(reverse) <= high
    everywhere = scores.mrr(view_of(class_world(noise=1.0, seed=seed)))
    assert everywhere["mrr_image_to_text"].value < found["mrr_image_to_text"].value


def test_one_kind_scores_like_none():
    plain = class_world(noise=1.0)
    same = dataclasses.replace(plain[0], kinds=np.zeros(6, dtype=np.int64)), plain[1]
    first, second = (scores.score_features(view_of(world)) for world in (plain, same))
    for group, of in first.items():
        for name, estimate in of.items():
            assert second[group][name].to_dict() == estimate.to_dict()


def test_chance_is_that_of_the_kinds_of_the_forget_concepts():
    layout, _ = world_of_kinds()
    assert layout.chance == pytest.approx(1 / 3)
    assert dataclasses.replace(layout, kinds=np.array([0, 1, 2, 2, 2, 2])).chance == pytest.approx((1 + 1 / 4) / 2)
    assert dataclasses.replace(layout, kinds=None).chance == pytest.approx(1 / 6)


def test_attacks_name_images_among_concepts_of_their_kind():
    layout, features = world_of_kinds()
    mine = layout.forget_images
    image_of, concept_of = layout.pairs_among(mine)
    test = ForgetTest(mine, torch.zeros(len(mine), 3, 2, 2), ((),) * 6, image_of, concept_of, layout.kinds)
    named = test._first(features.images[mine], features.concepts)
    assert named.tolist() == view_of((layout, features)).correct[mine].tolist()
    added = test.among_rivals(torch.tensor([1, 3]))
    assert added.tolist() == [[0 if KINDS[k] == KINDS[c] else -np.inf for k in range(6)] for c in (1, 3)]
    assert dataclasses.replace(test, kinds=None).among_rivals(torch.tensor([1])).tolist() == 0


def world_of_people():
    """Ten people with two facts each and two portraits per fact, four general classes; facts of three are forgotten.

    Returns the layout and features, and the raw cosines of images with class captions.
    """
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(24), 2)
    entities = np.where(labels < 20, labels // 2, 1000 + labels)
    people = rng.normal(size=(14, 8))[np.where(entities < 1000, entities, entities - 1010)]
    concepts = rng.normal(size=(24, 8))
    images = people + concepts[labels] + 1.3 * rng.normal(size=people.shape)
    rows = np.arange(48)
    layout = Layout(np.isin(labels, [0, 1, 2, 4]), tuple(f"class {c}" for c in range(24)), rows, labels, rows, labels,
                    labels, np.where(np.arange(24) < 20, np.arange(24) % 2, 2), labels >= 20, entities)  # fmt: skip
    return layout, Features(unit(images), unit(concepts), unit(concepts))


def test_visual_identity_is_the_share_of_portraits_nearest_to_one_of_the_same_person():
    layout, features = world_of_people()
    rng = np.random.default_rng(6)
    held = unit(rng.normal(size=(7, 8)))
    held_entities = np.array([0, 3, 50, 50, 60, 1, 1])  # 60 has a single portrait
    features = dataclasses.replace(features, holdouts={"identity": (held, held, np.arange(7), np.arange(7))})
    layout = dataclasses.replace(layout, holdout_entities={"identity": held_entities})
    images = np.concatenate([features.images.numpy()[:40], held.numpy()]).astype(np.float64)
    entities = np.concatenate([layout.entities[:40], held_entities])
    cosine = images @ images.T
    np.fill_diagonal(cosine, -2)
    right = entities[cosine.argmax(1)] == entities
    expected = np.mean([right[entities == person].mean() for person in np.unique(entities) if person != 60])
    found = scores.visual_identity(view_of((layout, features)))["visual_identity"]
    assert found.value == pytest.approx(expected)
    assert 0.1 < expected < 0.9
    assert scores.visual_identity(view_of(class_world())) == {}


def test_portraits_that_collapsed_to_a_point_do_not_find_each_other():
    layout, features = world_of_people()
    same = dataclasses.replace(features, images=features.images[:1].expand(48, -1))
    assert scores.visual_identity(view_of((layout, same)))["visual_identity"].value == 0
    alone = dataclasses.replace(layout, entities=np.arange(48))
    assert scores.visual_identity(view_of((alone, features)))["visual_identity"].value is None


def test_general_is_the_zero_shot_accuracy_on_general_pairs():
    layout, features = world_of_people()
    cosine = (features.images @ features.concepts.T).double().numpy()[40:, 20:]
    expected = (cosine.argmax(1) == layout.labels[40:] - 20).mean()
    assert scores.general(view_of((layout, features)))["general"].value == pytest.approx(expected)
    forgotten = dataclasses.replace(layout, forget=layout.labels == 20)
    own = (cosine.argmax(1) == layout.labels[40:] - 20)[2:].mean()
    assert scores.general(view_of((forgotten, features)))["general"].value == pytest.approx(own)
    assert scores.general(view_of(class_world())) == {}


def test_a_shuffled_pair_is_about_another_entity(monkeypatch):
    """A portrait of person 0 matches the captions of both of its facts, so neither can be a wrong caption of it."""
    layout, features = world_of_people()
    taken = {}
    monkeypatch.setattr(scores.metrics, "separability", lambda true, shuffled: taken.update(wrong=shuffled) or 1.0)
    scores.association_separability(view_of((layout, features)))
    cosine = (features.images @ features.captions.T).double().numpy()
    allowed = {
        round(cosine[image, caption], 5)
        for image in np.flatnonzero(layout.forget)
        for caption in (0, 1, 2, 4)
        if caption // 2 != layout.entities[image]
    }
    assert len(taken["wrong"]) == 8
    assert {round(value, 5) for value in taken["wrong"]} <= allowed


@pytest.mark.parametrize("name", ["association", "identity"])
def test_held_out_pairs_are_scored_by_the_cosine_with_their_own_captions(name):
    layout, features = world_of_people()
    rng = np.random.default_rng(7)
    images, captions = unit(rng.normal(size=(5, 8))), unit(rng.normal(size=(6, 8)))
    image_of, caption_of = np.array([0, 0, 1, 2, 3, 4, 4, 4]), np.array([0, 1, 1, 2, 5, 3, 4, 5])
    held = dataclasses.replace(features, holdouts={name: (images, captions, image_of, caption_of)})
    cosine = (images @ captions.T).double().numpy()
    expected = np.mean([cosine[i, caption_of[image_of == i]].mean() for i in range(5)])
    score = {"association": "intra_identity", "identity": "inter_identity"}[name]
    found = scores.held_out(view_of((layout, held)))
    assert list(found) == [score]
    assert found[score].value == pytest.approx(expected, abs=1e-6)
