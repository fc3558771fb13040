"""The feature scores against the definitions, computed once more with NumPy from raw features."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from worlds import caption_world, class_world, unit, view_of

from cliperase_fast.auditing import metrics, scores
from cliperase_fast.auditing.scores import Variant, View, score_features


def raw(features):
    return features.images.double().numpy(), features.concepts.double().numpy()


def class_mean(values, labels):
    return np.mean([np.mean(values[labels == label]) for label in np.unique(labels)])


@pytest.mark.parametrize("seed", [0, 1])
def test_cosine_scores_equal_their_definitions(seed):
    layout, features = world = class_world(seed=seed)
    images, concepts = raw(features)
    cosine, labels, forget = images @ concepts.T, layout.labels, layout.forget
    found = view_of(world)
    own = cosine[np.arange(len(labels)), labels]
    assert scores.association(found).value == pytest.approx(class_mean(own[forget], labels[forget]), abs=1e-6)
    assert scores.retain_association(found).value == pytest.approx(class_mean(own[~forget], labels[~forget]), abs=1e-6)
    image_side = class_mean(cosine[forget][:, [0, 2, 3, 5]].mean(1), labels[forget])
    assert scores.image_side(found).value == pytest.approx(image_side, abs=1e-6)
    text_side = class_mean(cosine[~forget][:, [1, 4]].mean(1), labels[~forget])
    assert scores.text_side(found).value == pytest.approx(text_side, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_rank_scores_equal_their_definitions(seed):
    layout, features = world = class_world(seed=seed)
    images, concepts = raw(features)
    cosine, labels, forget = images @ concepts.T, layout.labels, layout.forget
    found = scores.mrr(view_of(world))
    ranks = np.array([(cosine[i] >= cosine[i, labels[i]]).sum() for i in range(len(labels))])
    forward = class_mean(1 / ranks[forget], labels[forget])
    reverse = np.mean([1 / (1 + (cosine[labels != c, c] >= cosine[labels == c, c].max()).sum()) for c in (1, 4)])
    assert found["mrr_image_to_text"].value == pytest.approx(forward)
    assert found["mrr_text_to_image"].value == pytest.approx(reverse)
    assert found["mrr"].value == pytest.approx((forward + reverse) / 2)
    assert 0 < forward < 1
    view = view_of(world)
    assert scores.zero_shot_top1(view).value == pytest.approx(class_mean(ranks[forget] == 1, labels[forget]))
    assert scores.retain_top1(view).value == pytest.approx(class_mean(ranks[~forget] == 1, labels[~forget]))


def test_resampled_ranks_of_the_whole_gallery_are_the_ranks():
    layout, features = class_world(seed=3)
    queries, matches = features.concepts[:3], layout.labels == np.arange(3)[:, None]
    ranks = metrics.wrong_before_right(queries, features.images, *np.nonzero(matches))
    found = metrics.first_right(queries, features.images, matches, np.ones((2, len(layout.labels))))
    assert np.allclose(found, 1 / (1 + ranks[:, None]))
    without = np.where(matches[0], 0.0, 1.0)[None]  # a resample that holds no image of the first class
    assert metrics.first_right(queries, features.images, matches, without)[0, 0] == 0


def test_worst_class_drop_names_the_class_that_lost_most():
    layout, features = class_world(noise=0.05)
    damaged = features.images.clone()
    lost = np.flatnonzero(layout.labels == 3)
    damaged[lost] = features.concepts[[0]]
    after = dataclasses.replace(features, images=damaged)
    found = scores.worst_class_drop(View(layout, after, features))
    assert (found.value, found.notes) == (1.0, {"class": "class 3"})
    assert scores.worst_class_drop(View(layout, features, features)).value == 0


def test_a_forgotten_class_is_not_the_one_that_lost_most():
    layout, features = class_world(noise=0.05)
    forgotten = features.images.clone()
    forgotten[layout.forget_images] = features.concepts[[0]]
    found = scores.worst_class_drop(View(layout, dataclasses.replace(features, images=forgotten), features))
    assert found.value == 0 and found.notes["class"] not in ("class 1", "class 4")


def test_retain_images_of_a_forget_class_are_no_other_images():
    layout, features = class_world()
    layout = dataclasses.replace(layout, forget=layout.forget & (np.arange(len(layout.forget)) % 2 == 0))
    rest = np.flatnonzero(~np.isin(layout.labels, layout.forget_concepts))
    assert len(rest) < len(layout.retain_images)
    cosines = (features.images[rest] @ features.concepts[layout.forget_concepts].T).numpy().mean(1)
    by_class = [cosines[layout.labels[rest] == label].mean() for label in np.unique(layout.labels[rest])]
    assert scores.text_side(view_of((layout, features))).value == pytest.approx(np.mean(by_class), abs=1e-6)


def test_neighbours_are_the_classes_nearest_in_the_original():
    layout, features = world = class_world(noise=0.1)
    similarity = (features.concepts @ features.concepts.T).numpy()
    others = [0, 2, 3, 5]
    nearest = sorted(others, key=lambda c: -max(similarity[c, 1], similarity[c, 4]))[:3]
    found = scores.neighbours_top1(view_of(world))
    assert found.notes["classes"] == [f"class {c}" for c in nearest]
    after = dataclasses.replace(features, concepts=features.concepts.flip(0))
    assert scores.neighbours_top1(View(layout, after, features)).notes == found.notes


def test_without_classes_every_caption_is_a_concept():
    layout, features = world = caption_world()
    images, captions = raw(features)
    cosine = images @ captions.T
    found = score_features(view_of(world))
    own = [cosine[i, layout.concept_of[layout.image_of == i]].mean() for i in range(5)]
    assert found["forgetting"]["association"].value == pytest.approx(np.mean(own), abs=1e-6)
    others = layout.concept_of[layout.image_of >= 5]
    assert found["collateral"]["image_side"].value == pytest.approx(cosine[:5][:, others].mean(), abs=1e-6)
    assert found["forgetting"]["zero_shot_top1"].value is None
    assert found["forgetting"]["zero_shot_top1"].notes == {"reason": "the data has no classes"}
    hits = [cosine[i].argmax() in layout.concept_of[layout.image_of == i] for i in range(20)]
    assert found["collateral"]["retain_top1"].value == pytest.approx(np.mean(hits[5:]))
    assert found["forgetting"]["image_to_text_r@1"].value == pytest.approx(np.mean(hits[:5]))


def test_paraphrases_show_a_caption_that_still_answers():
    layout, features = world = class_world(noise=0.1)
    silent = features.concepts.clone()
    silent[[1, 4]] = -silent[[1, 4]]
    variants = (
        Variant("common", None, silent),
        Variant("rare", None, features.concepts),
        Variant("class 1 = one", 1, features.concepts[[1]]),
    )
    after = dataclasses.replace(features, concepts=silent, variants=variants)
    found = scores.paraphrase_top1(View(layout, after, features))
    assert scores.zero_shot_top1(View(layout, after, features)).value == 0
    assert found["paraphrase_top1"].value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["paraphrase_top1"].notes["variants"] == {"common": 0, "rare": 1, "class 1 = one": 1}
    assert (found["paraphrase_top1_max"].value, found["paraphrase_top1_max"].notes) == (1, {"variant": "rare"})
    assert scores.paraphrase_top1(view_of(world))["paraphrase_top1"].value is None
    of_one = dataclasses.replace(after, variants=variants[2:])  # the images of class 4 are not asked for
    assert scores.paraphrase_top1(View(layout, of_one, features))["paraphrase_top1"].value == 1


def test_other_data_and_holdouts_are_scored():
    layout, features = class_world()
    images, classes = unit(np.eye(4, 8)), unit(np.eye(4, 8)[[1, 0, 2, 3]])
    pairs = np.arange(4)
    features = dataclasses.replace(
        features,
        other={"elsewhere": (images, classes, pairs)},
        holdouts={"association": (images, classes, pairs, pairs), "identity": (images, images, pairs, pairs)},
    )
    found = score_features(View(layout, features, features))
    assert found["collateral"]["other"].value == found["collateral"]["other:elsewhere"].value == 0.5
    assert found["collateral"]["intra_identity"].value == 0.5
    assert found["collateral"]["inter_identity"].value == 1


def test_membership_and_unusual_are_areas_under_the_curve():
    rng = np.random.default_rng(0)
    layout, features = class_world(dim=16)
    training, test = rng.normal(0.4, 1, 40), rng.normal(0, 1, 30)
    stranger = unit(rng.normal(size=(25, 16)))
    features = dataclasses.replace(
        features,
        training_cosines=training,
        test_cosines=test,
        other={"strange": (stranger, features.concepts, np.arange(25) % 6)},
    )
    view = View(layout, features, features)
    found = scores.membership(view)
    truth = np.r_[np.ones(40), np.zeros(30)]
    assert found["membership"].value == pytest.approx(roc_auc_score(truth, np.r_[training, test]))
    assert found["membership_tpr@1%"].value is None
    low, high = found["membership"].interval
    assert low < found["membership"].value < high
    mine = (features.images[layout.forget] @ features.concepts.T).amax(1).numpy()
    theirs = (stranger @ features.concepts.T).amax(1).numpy()
    expected = roc_auc_score(np.r_[np.ones(len(mine)), np.zeros(25)], -np.r_[mine, theirs])
    assert scores.unusual(view).value == pytest.approx(expected)


def test_the_true_positive_rate_needs_a_thousand_negatives():
    layout, features = class_world()
    training, test = np.linspace(0, 1, 100), np.linspace(0, 1, 1000)
    view = view_of((layout, dataclasses.replace(features, training_cosines=training, test_cosines=test)))
    assert scores.membership(view)["membership_tpr@1%"].value == pytest.approx(0.01)
    assert metrics.true_positive_rate(np.array([2.0, 0.5]), test, 0.01) == 0.5


def test_separability_tells_true_from_shuffled_pairs():
    rng = np.random.default_rng(0)
    assert metrics.separability(rng.normal(5, 1, 200), rng.normal(0, 1, 200)) > 0.97
    assert abs(metrics.separability(rng.normal(0, 1, 2000), rng.normal(0, 1, 2000)) - 0.5) < 0.05
    assert metrics.separability(np.ones(1), np.zeros(5)) is None
    layout, features = caption_world()
    together = dataclasses.replace(features, images=features.captions[np.searchsorted(layout.image_of, np.arange(20))])
    assert scores.association_separability(view_of((layout, together))).value > 0.6
    same = dataclasses.replace(layout, caption_of=np.zeros(len(layout.caption_of), dtype=int))
    assert scores.association_separability(view_of((same, features))).value is None


@pytest.mark.parametrize("block", [1, 7, 50])
def test_blocks_do_not_change_a_rank_or_a_cosine(block):
    layout, features = class_world(seed=5)
    pairs = (features.images, features.concepts, layout.image_of, layout.concept_of)
    assert (metrics.wrong_before_right(*pairs, block=block) == metrics.wrong_before_right(*pairs)).all()
    near = metrics.largest_cosines(features.images, features.concepts, block=block)
    assert np.allclose(near, (features.images @ features.concepts.T).amax(1))


def test_features_that_collapsed_to_a_point_score_nothing():
    layout, features = class_world()
    point = torch.ones_like(features.images) / features.images.shape[1] ** 0.5
    collapsed = dataclasses.replace(features, images=point, concepts=point[:6], captions=point[:6])
    found = score_features(View(layout, collapsed, features))
    assert found["collateral"]["retain_top1"].value == 0
    assert found["forgetting"]["zero_shot_top1"].value == 0
    assert found["forgetting"]["mrr_image_to_text"].value == pytest.approx(1 / 6)
    assert found["forgetting"]["association"].value == pytest.approx(1, abs=1e-6)
