from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliperase_fast.evaluation import EncodedPairs, score
from cliperase_fast.evaluation.queries import TIE, wrong_before_right

RECALLS = [f"{direction}_r@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def unit(rows):
    return F.normalize(torch.as_tensor(rows, dtype=torch.float32), dim=-1)


def random_encoded(n=40, captions=30, most=5, classes=6, dim=8, seed=0):
    """Noisy matching pairs with one to `most` captions each, some captions shared by several images."""
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(captions, dim))
    index = [rng.choice(captions, size=rng.integers(1, most + 1), replace=False) for _ in range(n)]
    missing = np.setdiff1d(np.arange(captions), np.concatenate(index))
    index[0] = np.union1d(index[0], missing)  # every caption belongs to an image
    image = np.stack([text[rows].mean(0) for rows in index]) + 0.6 * rng.normal(size=(n, dim))
    labels = rng.integers(0, classes, size=n)
    encoded = EncodedPairs(unit(image), unit(text), index, unit(rng.normal(size=(classes, dim))))
    return encoded, SimpleNamespace(
        class_kinds=None, labels=labels, classes=tuple(f"class {c}" for c in range(classes))
    )


def oracle(encoded, pairs, member):
    """The definitions, one query at a time, in float64."""
    image = encoded.image_features.double().numpy()
    text = encoded.caption_features.double().numpy()
    n, captions = len(image), len(text)
    carriers = [[i for i in range(n) if c in encoded.caption_index[i]] for c in range(captions)]
    scores = {}
    for k in (1, 5, 10):
        hits = []
        for i in np.flatnonzero(member):
            mine = set(encoded.caption_index[i].tolist())
            best = max(image[i] @ text[c] for c in mine)
            hits.append(sum(image[i] @ text[c] >= best for c in range(captions) if c not in mine) < k)
        scores[f"image_to_text_r@{k}"] = np.mean(hits)
        hits = []
        for c in range(captions):
            if not any(member[i] for i in carriers[c]):
                continue
            best = max(image[i] @ text[c] for i in carriers[c])
            hits.append(sum(image[i] @ text[c] >= best for i in range(n) if i not in carriers[c]) < k)
        scores[f"text_to_image_r@{k}"] = np.mean(hits)
    classes = encoded.class_features.double().numpy()
    correct = [
        all(
            image[i] @ classes[pairs.labels[i]] > image[i] @ row
            for c, row in enumerate(classes)
            if c != pairs.labels[i]
        )
        for i in range(n)
    ]
    scores["zero_shot_top1"] = np.mean([correct[i] for i in np.flatnonzero(member)])
    scores["association"] = np.mean(
        [np.mean([image[i] @ text[c] for c in encoded.caption_index[i]]) for i in np.flatnonzero(member)]
    )
    return scores, np.array(correct)


@pytest.mark.parametrize(("seed", "most"), [(0, 5), (1, 1), (2, 3), (3, 5)])
def test_scores_of_both_sets_equal_the_definitions_computed_one_by_one(seed, most):
    encoded, pairs = random_encoded(seed=seed, most=most)
    mask = np.random.default_rng(seed).random(len(encoded)) < 0.3
    scores = score(encoded, pairs, mask)
    for name, member in (("forget", mask), ("retain", ~mask)):
        expected, _ = oracle(encoded, pairs, member)
        assert scores[name]["pairs"] == member.sum()
        for metric, value in expected.items():
            assert scores[name][metric] == pytest.approx(value, abs=1e-6), (name, metric)
    assert 0 < scores["retain"]["image_to_text_r@1"] < 1  # the case distinguishes


def test_without_a_mask_all_pairs_are_one_set():
    encoded, pairs = random_encoded()
    scores = score(encoded, pairs)
    expected, _ = oracle(encoded, pairs, np.ones(len(encoded), dtype=bool))
    assert set(scores) == {"all", "per_class"}
    assert {metric: scores["all"][metric] for metric in expected} == pytest.approx(expected, abs=1e-6)
    assert scores["all"]["gallery_captions"] == 30
    assert scores["all"]["gallery_images"] == 40
    assert scores["all"]["gallery_classes"] == len(pairs.classes)


@pytest.mark.parametrize("chunk", [1, 7, 41, 300])
def test_chunks_do_not_change_a_score(chunk):
    encoded, pairs = random_encoded(seed=4)
    mask = np.arange(len(encoded)) % 3 == 0
    assert score(encoded, pairs, mask, chunk=chunk) == score(encoded, pairs, mask)


def test_collapsed_features_score_zero():
    # Sizes at which a matrix product handles its last rows and columns differently from the others.
    n, captions, classes, dim = 67, 61, 13, 129
    point = unit(np.random.default_rng(0).normal(size=(1, dim)))
    index = [np.array([i % captions]) for i in range(n)]
    encoded = EncodedPairs(point.repeat(n, 1), point.repeat(captions, 1), index, point.repeat(classes, 1))
    pairs = SimpleNamespace(class_kinds=None, labels=np.arange(n) % classes, classes=tuple(map(str, range(classes))))
    scores = score(encoded, pairs)["all"]
    assert scores["zero_shot_top1"] == 0
    assert {scores[name] for name in RECALLS} == {0}
    assert scores["association"] == pytest.approx(1)


@pytest.mark.parametrize(("gap", "hit"), [(0.0, 0.0), (TIE / 4, 0.0), (100 * TIE, 1.0)])
def test_a_tie_is_a_miss_and_a_real_lead_is_a_hit(gap, hit):
    # Two images, each right about its caption by `gap` in the cosine.
    angle = np.arccos(0.5) - gap / np.sin(np.arccos(0.5))
    right = [np.cos(angle), np.sin(angle)]
    wrong = [0.5, -np.sin(np.arccos(0.5))]
    encoded = EncodedPairs(unit([[1, 0]]), unit([right, wrong]), [np.array([0])], unit([right, wrong]))
    pairs = SimpleNamespace(class_kinds=None, labels=np.array([0]), classes=("a", "b"))
    scores = score(encoded, pairs)["all"]
    assert scores["image_to_text_r@1"] == hit
    assert scores["zero_shot_top1"] == hit
    assert scores["image_to_text_r@5"] == 1  # two captions: at most k


def test_an_images_other_captions_are_not_wrong_answers():
    # The five captions of image 0 lie nearest to it, the worst of them still before any other.
    text = unit([[1, 0.1 * step] for step in range(5)] + [[0, 1]])
    encoded = EncodedPairs(unit([[1, 0], [0, 1]]), text, [np.arange(5), np.array([5])], None)
    scores = score(encoded, SimpleNamespace(class_kinds=None, labels=None, classes=None))["all"]
    assert scores["image_to_text_r@1"] == 1
    assert scores["text_to_image_r@1"] == 1


def test_any_image_with_the_caption_is_a_right_answer():
    # The caption's first image is far off, the second one is nearest; a third carries another caption.
    images = unit([[-1, 0], [1, 0], [0.9, 0.5]])
    encoded = EncodedPairs(images, unit([[1, 0], [0.9, 0.5]]), [np.array([0]), np.array([0]), np.array([1])], None)
    pairs = SimpleNamespace(class_kinds=None, labels=None, classes=None)
    assert score(encoded, pairs)["all"]["text_to_image_r@1"] == 1
    # Both sets ask the caption they share, and the image of the other set answers it.
    assert score(encoded, pairs, np.array([True, False, False]))["forget"]["text_to_image_r@1"] == 1


def test_forget_queries_search_the_whole_split():
    # Image 0 (forget) is nearer to the retain caption than to its own.
    encoded = EncodedPairs(unit([[1, 0], [0, 1]]), unit([[0.6, 0.8], [1, 0.1]]), [np.array([0]), np.array([1])], None)
    scores = score(encoded, SimpleNamespace(class_kinds=None, labels=None, classes=None), np.array([True, False]))
    assert scores["forget"]["image_to_text_r@1"] == 0


def test_without_classes_zero_shot_is_none():
    encoded, _ = random_encoded()
    unlabelled = EncodedPairs(encoded.image_features, encoded.caption_features, encoded.caption_index, None)
    scores = score(unlabelled, SimpleNamespace(class_kinds=None, labels=None, classes=None))
    assert scores["all"]["zero_shot_top1"] is None
    assert scores["per_class"] == {}


def test_class_features_can_be_given():
    encoded, pairs = random_encoded()
    given = unit(np.random.default_rng(9).normal(size=(6, 8)))
    expected = score(
        EncodedPairs(encoded.image_features, encoded.caption_features, encoded.caption_index, given), pairs
    )
    assert score(encoded, pairs, class_features=given) == expected
    assert expected["all"]["zero_shot_top1"] != score(encoded, pairs)["all"]["zero_shot_top1"]


@pytest.mark.parametrize("mask", [np.zeros(40, dtype=bool), np.ones(40, dtype=bool)])
def test_an_empty_set_has_no_scores_and_no_nan(mask):
    encoded, pairs = random_encoded()
    scores = score(encoded, pairs, mask)
    empty = scores["retain" if mask.all() else "forget"]
    assert empty["pairs"] == 0
    assert all(empty[name] is None for name in [*RECALLS, "zero_shot_top1", "association"])
    json.dumps(scores, allow_nan=False)


def test_nan_features_never_hit_and_give_no_nan_scores():
    encoded, pairs = random_encoded()
    nan = EncodedPairs(
        torch.full_like(encoded.image_features, torch.nan),
        encoded.caption_features,
        encoded.caption_index,
        encoded.class_features,
    )
    scores = score(nan, pairs)["all"]
    assert scores["zero_shot_top1"] == 0
    assert {scores[name] for name in RECALLS} == {0}
    assert scores["association"] is None
    json.dumps(scores, allow_nan=False)


def test_per_class_counts_each_class_and_names_its_set():
    encoded, pairs = random_encoded(classes=4)
    pairs.labels = np.arange(40) % 3  # the fourth class has no pairs
    mask = (pairs.labels == 0) | (np.arange(40) == 1)
    _, correct = oracle(encoded, pairs, np.ones(40, dtype=bool))
    table = score(encoded, pairs, mask)["per_class"]
    assert list(table) == ["class 0", "class 1", "class 2"]
    assert [row["set"] for row in table.values()] == ["forget", "mixed", "retain"]
    for label, row in enumerate(table.values()):
        member = pairs.labels == label
        assert row["pairs"] == member.sum()
        assert row["accuracy"] == pytest.approx(correct[member].mean())
    assert {row["set"] for row in score(encoded, pairs)["per_class"].values()} == {"all"}


def test_scores_hold_plain_numbers_only():
    encoded, pairs = random_encoded()
    scores = score(encoded, pairs, np.arange(40) < 10)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_zero_shot_compares_classes_of_the_kind_of_the_label():
    encoded, pairs = random_encoded(n=60, classes=7)
    kinds = np.array([2, 0, 2, 0, 0, 2, 1])
    pairs.class_kinds = kinds
    cosines = (encoded.image_features @ encoded.class_features.T).numpy()
    expected = [
        all(row[label] > row[other] for other in np.flatnonzero(kinds == kinds[label]) if other != label)
        for row, label in zip(cosines, pairs.labels, strict=True)
    ]
    assert score(encoded, pairs)["all"]["zero_shot_top1"] == pytest.approx(np.mean(expected))
    everywhere = cosines.argmax(1) == pairs.labels
    assert np.mean(everywhere) < np.mean(expected) < 1
    assert score(encoded, pairs, chunk=1)["all"] == score(encoded, pairs)["all"]
    by_kind = score(encoded, pairs, kinds[pairs.labels] == 1)
    assert (by_kind["forget"]["gallery_classes"], by_kind["retain"]["gallery_classes"]) == (1, 3)


def test_ranks_count_items_of_the_kind_of_the_match():
    rng = np.random.default_rng(1)
    queries, gallery = unit(rng.normal(size=(30, 4))), unit(rng.normal(size=(12, 4)))
    kinds, match = np.arange(12) % 3, rng.integers(0, 12, 30)
    expected = []
    for query, own in zip(queries.numpy(), match, strict=True):
        rivals = [item for item in np.flatnonzero(kinds == kinds[own]) if item != own]
        expected.append(sum(query @ gallery[item].numpy() >= query @ gallery[own].numpy() for item in rivals))
    for chunk in (1, 50, 10_000):
        ranks = wrong_before_right(queries, gallery, np.arange(30), match, chunk, kinds)
        assert ranks.tolist() == expected
