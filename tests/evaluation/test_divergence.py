"""Background levels and divergences, against their definitions written out one image at a time in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cliperase_fast.evaluation import Background, DivergenceMeter, EncodedPairs
from cliperase_fast.evaluation.divergence import CAPTIONS, LEAST_SCALE

RETAIN = np.arange(40) >= 10


def unit(rows):
    return F.normalize(torch.as_tensor(rows, dtype=torch.float32), dim=-1)


def encoded_pairs(seed, captions=30, n=40, classes=6, dim=8, labelled=True):
    rng, drawn = np.random.default_rng(seed), np.random.default_rng(0)
    index = [drawn.choice(captions, size=drawn.integers(1, 4), replace=False) for _ in range(n)]
    features = [unit(rng.normal(size=(rows, dim))) for rows in (n, captions, classes)]
    return EncodedPairs(features[0], features[1], index, features[2] if labelled else None)


PAIRS = SimpleNamespace(labels=np.arange(40) % 5, classes=tuple(f"class {c}" for c in range(6)), class_kinds=None)
UNLABELLED = SimpleNamespace(labels=None, classes=None, class_kinds=None)


def kl(before, after, scale_before, scale_after, captions_before, captions_after):
    """KL of one image; features in float64."""
    logits = [scale_before * captions_before @ before, scale_after * captions_after @ after]
    p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in logits)
    return float((p * np.log(p / q)).sum())


def retained_share(image, scale, captions, columns, forgotten):
    weights = np.exp(scale * captions @ image)
    return weights[columns].sum() / (weights[columns].sum() + weights[forgotten].sum())


def by_hand(before, after, scales, columns, features, forgotten=()):
    rows, forgotten = np.flatnonzero(RETAIN), list(forgotten)
    images = [one.image_features.double().numpy() for one in (before, after)]
    captions = [getattr(one, features).double().numpy() for one in (before, after)]
    found = []
    for i in rows:
        shares = [retained_share(images[k][i], scales[k], captions[k], columns, forgotten) for k in (0, 1)]
        moved = max(0.0, np.log(shares[0] / shares[1]))
        found.append(moved + kl(images[0][i], images[1][i], *scales, *(rows[columns] for rows in captions)))
    return np.array(found)


def test_an_image_is_compared_over_classes_of_its_own_kind():
    before, after, kinds = encoded_pairs(1), encoded_pairs(2), np.array([0, 0, 1, 1, 1, 0])
    pairs = SimpleNamespace(labels=PAIRS.labels, classes=PAIRS.classes, class_kinds=kinds)
    found = DivergenceMeter(before, 20.0, pairs, RETAIN, classes=np.arange(5)).values(after, 13.0)
    of_kind = [by_hand(before, after, (20.0, 13.0), columns, "class_features") for columns in ([0, 1], [2, 3, 4])]
    expected = np.where(kinds[PAIRS.labels[RETAIN]] == 0, *of_kind)
    assert found == pytest.approx(expected, rel=1e-9)


def test_divergence_is_the_kl_over_the_retained_classes():
    before, after = encoded_pairs(1), encoded_pairs(2)
    meter = DivergenceMeter(before, 20.0, PAIRS, RETAIN, classes=np.array([0, 1, 2, 4]))
    expected = by_hand(before, after, (20.0, 13.0), [0, 1, 2, 4], "class_features", [3])
    assert meter.values(after, 13.0) == pytest.approx(expected, rel=1e-9)
    found = meter(after, 13.0)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-9)
    assert found.error == pytest.approx(expected.std(ddof=1) / np.sqrt(30), rel=1e-9)
    labels = PAIRS.labels[RETAIN]
    means, errors = np.array([_mean(expected[labels == c]) for c in range(5)]).T
    worst = int(np.argmax(means - errors))
    assert found.worst_class == f"class {worst}"
    assert (found.worst_mean, found.worst_pairs) == (pytest.approx(means[worst], rel=1e-9), 6)
    assert found.worst_error == pytest.approx(errors[worst], rel=1e-9)


def _mean(values):
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def test_a_class_whose_mean_is_uncertain_is_not_the_worst():
    values = {"sure": [0.5, 0.5, 0.5, 0.6], "unsure": [2.0, 0.0, 0.0, 0.1]}
    meter = SimpleNamespace(_by_class=lambda found: {name: np.array(of) for name, of in values.items()},
                            values=lambda encoded, scale: np.zeros(8), labels=0, names=0)  # fmt: skip
    found = DivergenceMeter.__call__(meter, None, 1.0)
    assert (found.worst_class, found.worst_mean) == ("sure", pytest.approx(0.525))


def test_classes_of_few_pairs_are_judged_together():
    before, after = encoded_pairs(1), encoded_pairs(2)
    labels = np.array([*[5] * 10, *[0] * 20, *[1] * 3, *[2] * 3, *[3] * 4])
    pairs = SimpleNamespace(labels=labels, classes=PAIRS.classes, class_kinds=None)
    meter = DivergenceMeter(before, 20.0, pairs, RETAIN)
    values = np.concatenate([np.full(20, 0.1), np.full(6, 0.4), np.full(4, 0.3)])
    found = meter._by_class(values)
    assert {name: len(of) for name, of in found.items()} == {
        "class 0": 20, "class 3": 4, "2 classes of fewer than 4 pairs": 6,
    }  # fmt: skip
    assert meter(after, 13.0).pairs == 30


def test_small_scales_are_raised_so_that_changes_of_the_cosines_show():
    before, after = encoded_pairs(1), encoded_pairs(2)
    scales = (0.5, LEAST_SCALE)
    flat, sharp = (DivergenceMeter(before, scale, PAIRS, RETAIN).values(after, 2 * scale) for scale in scales)
    assert flat == pytest.approx(sharp) and flat.mean() > 1


def test_divergence_is_zero_for_the_original_itself():
    before = encoded_pairs(1)
    found = DivergenceMeter(before, 100.0, PAIRS, RETAIN)(before, 100.0)
    assert found.mean == found.worst_mean == 0.0


def test_an_image_that_moves_to_a_forgotten_caption_diverges():
    """With two retained classes far apart, the distribution over them alone would not show it."""
    classes = unit(torch.eye(3))
    images = unit([[0.0, 1.0, 0.0]] * 4)
    index = [np.array([0])] + [np.array([1])] * 3
    pairs = SimpleNamespace(labels=np.array([0, 1, 1, 2]), classes=("red", "green", "blue"), class_kinds=None)
    retain = np.array([False, True, True, True])
    before = EncodedPairs(images, classes, index, classes)
    meter = DivergenceMeter(before, 50.0, pairs, retain)
    turned = EncodedPairs(unit([[1.0, 0.9, 0.0]] * 4), classes, index, classes)
    assert meter(turned, 50.0).mean > 3
    assert DivergenceMeter(turned, 50.0, pairs, retain)(before, 50.0).mean < 1e-3  # the other way round


def test_without_classes_the_captions_of_retain_pairs_are_compared():
    before, after = encoded_pairs(1, labelled=False), encoded_pairs(2, labelled=False)
    columns = np.unique(np.concatenate(before.caption_index[10:]))
    before.caption_index[0][0] = 29  # of a forget pair alone
    columns = np.setdiff1d(columns, [29])
    for rows in before.caption_index[10:]:
        rows[rows == 29] = columns[0]
    found = DivergenceMeter(before, 20.0, UNLABELLED, RETAIN)(after, 20.0)
    others = np.setdiff1d(np.concatenate(before.caption_index[:10]), columns)
    assert 29 in others
    expected = by_hand(before, after, (20.0, 20.0), columns, "caption_features", others)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-9)
    assert found.worst_class is None


def test_a_fixed_sample_stands_for_many_captions():
    before = encoded_pairs(1, captions=900, labelled=False)
    before.caption_index[20] = np.arange(300, 900)
    meters = [DivergenceMeter(before, 20.0, UNLABELLED, RETAIN, seed=seed) for seed in (3, 3, 4)]
    samples = [meter.columns.tolist() for meter in meters]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == CAPTIONS
    assert set(samples[0]) <= set(np.concatenate(before.caption_index[10:]).tolist())


def test_chunks_give_the_same_divergence(monkeypatch):
    before, after = encoded_pairs(1), encoded_pairs(2)
    whole = DivergenceMeter(before, 20.0, PAIRS, RETAIN).values(after, 13.0)
    monkeypatch.setattr("cliperase_fast.evaluation.divergence.CHUNK", 17)
    assert DivergenceMeter(before, 20.0, PAIRS, RETAIN).values(after, 13.0) == pytest.approx(whole, rel=1e-12)


def test_background_levels_are_mean_cosines_with_the_retain_pairs():
    encoded = encoded_pairs(1)
    background = Background.of(encoded, RETAIN)
    image, text = encoded.image_features.double().numpy(), encoded.caption_features.double().numpy()
    retained = np.flatnonzero(RETAIN)
    of_image = [np.mean([np.mean(text[encoded.caption_index[r]] @ image[i]) for r in retained]) for i in range(40)]
    of_caption = [np.mean(image[retained] @ row) for row in text]
    assert background.of_images(encoded.image_features.double()).numpy() == pytest.approx(of_image, abs=1e-12)
    assert background.of_captions(encoded.caption_features.double()).numpy() == pytest.approx(of_caption, abs=1e-12)
    expected = np.mean([of_image[i] + np.mean(np.take(of_caption, encoded.caption_index[i])) for i in range(10)]) / 2
    assert background.association(encoded, ~RETAIN) == pytest.approx(expected, abs=1e-12)
    assert background.of_images(encoded.image_features).dtype == torch.float32
