"""Classes of several kinds: an image is asked about the kind of its label, and an entity about its portraits."""

import dataclasses

import numpy as np
import pytest
import torch
from worlds import class_world, view_of

from cliperase_fast.auditing import scores
from cliperase_fast.auditing.attacks import ForgetTest

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
