"""Background levels of classes that share words with retained ones, against their formulas in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.evaluation import Background, EncodedPairs
from cliperase_fast.unlearning import preparation, teacher
from cliperase_fast.unlearning.methods import make_method
from cliperase_fast.unlearning.methods.calibrated import RELATED, pair_terms
from cliperase_fast.unlearning.objective import BatchFeatures, RelatedImages
from cliperase_fast.unlearning.preflight import check_forgettable
from cliperase_fast.unlearning.related import (
    MOST,
    SHARE,
    PairFeatures,
    concepts_of,
    level_of,
    related_classes,
    related_note,
    related_pairs,
    relatives_of,
    with_levels_of_relatives,
    with_most_similar,
    with_related_levels,
)
from cliperase_fast.unlearning.selection import Candidate

ALONE = ("seven", "three", "one", "nine", "two")  # no two share a word
NAMES = ("red circle", "red square", "blue circle", "blue square", "the moon")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["red circle", "red square", "Blue_Circle", "moon"], [1, 2]),
        (["tall red house", "red house", "house", "tall red tree"], [1, 3]),  # two words each
        (["seven", "three", "one"], []),
        (["bird of prey", "king of spades", "jay"], []),  # "of" says nothing
        (["seven", "seventeen"], []),
        (["digit seven", "digit three", "digit one"], []),  # all classes have the word
        (["red dot", "red bar", "red tree", "blue dot"], [1, 2, 3]),
        (["McDonald's burger", "Levi's jeans", "McDonald\u2019s fries"], [2]),
        (["l'eau douce", "l'air", "eau de mer"], [2]),
        (["t-shirt", "t-rex", "T\u2011Shirt", "shirt"], [2]),
        (["red-circle", "blue-circle", "red_square", "moon"], [1, 2]),
        (["red k", "blue k", "green b"], [1]),
        (["pe\u0302che", "pe\u0301dalo", "p\u00eache melba"], [2]),  # the first two with separate accents
        (
            ["\u0932\u093e\u0932", "\u0928\u0940\u0932\u093e", "\u0932\u093e\u0932 \u0918\u0930"],
            [2],
        ),  # Hindi
        (["pomme de terre", "coucher de soleil", "mois"], []),
        (["of the", "of the moon", "the"], []),
    ],
)
def test_related_classes_share_the_most_words(names, expected):
    assert related_classes(names, 0, range(1, len(names))) == expected


class Pairs(SimpleNamespace):
    def __len__(self):
        return len(self.labels)


def split(labels, n_forget, names=NAMES, entities=None):
    pairs = Pairs(labels=labels, classes=names, entities=entities)
    return SimpleNamespace(pairs=pairs, n_forget=n_forget)


LABELS = np.array([0] * 6 + [1] * 5 + [2] * 4 + [3] * 7 + [4] * 3)


def test_only_classes_that_are_forgotten_whole_have_relatives():
    assert relatives_of(split(LABELS, 6)) == {0: [1, 2]}
    assert relatives_of(split(LABELS, 11)) == {0: [2], 1: [3]}
    assert relatives_of(split(LABELS, 5)) == {}, "a red circle is retained"
    assert relatives_of(split(LABELS, 6, entities=LABELS)) == {}
    assert relatives_of(split(None, 6)) == {}


def features(like=0.0):
    """Unit rows of images, of captions and the captions of each image. like: how much class 0 is like 1 and 2."""
    rng = np.random.default_rng(0)
    common, centres = rng.normal(size=12), rng.normal(size=(5, 12))
    centres[0] += like * common
    centres[1:3] += abs(like) * common
    rows = [centres[LABELS] + 0.3 * rng.normal(size=(len(LABELS), 12)), centres[[0, 0, 1, 2, 3, 4]]]
    image, text = (torch.nn.functional.normalize(torch.as_tensor(of), dim=-1) for of in rows)
    captions_of = {0: [0, 1], 1: [2], 2: [3], 3: [4], 4: [5]}
    return image, text, [np.array(captions_of[label]) for label in LABELS]


def levels(like):
    image, text, index = features(like)
    retained = list(range(6, len(LABELS)))
    plain = Background.of_rows([image[retained]], text, [index[row] for row in retained])
    train = split(LABELS, 6)
    relatives = relatives_of(train)
    pairs = related_pairs(train, relatives, None, 0)
    return plain, with_related_levels(plain, relatives, pairs, pair_features(image, text, index))


def pair_features(image, text, index):
    return PairFeatures(lambda rows: image[rows], text, lambda rows: [index[row] for row in rows])


@pytest.mark.parametrize("like", [0.5, 6.0])
def test_levels_lie_between_those_of_all_pairs_and_of_the_related_classes(like):
    image, text, index = features(like)
    plain, found = levels(like)
    assert found.own.concepts.tolist() == [0]
    rows_of = [np.flatnonzero(np.equal(LABELS, label)) for label in (1, 2)]
    means = [torch.stack([text[index[row]].mean(0) for row in rows]).mean(0) for rows in rows_of]
    images = [image[torch.as_tensor(rows)].mean(0) for rows in rows_of]
    related = Background(sum(images) / 2, sum(means) / 2)
    assert found.own.related_weights.tolist() == [[0.5, 0.5]]
    assert torch.allclose(found.own.related_images, torch.stack(images), atol=1e-12)
    rows = range(6)
    of = {
        name: np.mean([
            float(image[row] @ by.text_mean) + float(by.image_mean @ text[index[row]].mean(0)) for row in rows
        ]) / 2 for name, by in (("plain", plain), ("related", related))
    }  # fmt: skip
    own = np.mean([float(image[row] @ text[index[row]].mean(0)) for row in rows])
    share = min(SHARE, MOST * (own - of["plain"]) / (of["related"] - of["plain"]))
    assert bool(share < SHARE) == (like == 6.0)
    expected = of["plain"] + share * (of["related"] - of["plain"])
    encoded = EncodedPairs(image, text, index, None)
    forget = np.arange(len(LABELS)) < 6
    assert found.association(encoded, forget, LABELS) == pytest.approx(expected, abs=1e-12)
    assert found.association(encoded, forget) == pytest.approx(of["plain"], abs=1e-12)
    assert expected <= of["plain"] + MOST * (own - of["plain"]) + 1e-12


def test_levels_of_other_pairs_are_those_of_all_pairs():
    image, text, _ = features(0.5)
    plain, found = levels(0.5)
    concepts = torch.as_tensor(LABELS)
    of_images = found.of_images(image, concepts)
    assert torch.equal(of_images[6:], plain.of_images(image)[6:])
    assert not torch.isclose(of_images[:6], plain.of_images(image)[:6]).any()
    of_captions = found.of_captions(text, torch.tensor([0, 0, 1, 2, 3, 4]))
    assert (
        torch.equal(of_captions[2:], plain.of_captions(text)[2:])
        and (of_captions[:2] > plain.of_captions(text)[:2]).all()
    )


def test_relatives_that_the_model_finds_less_similar_than_other_pairs_do_not_count():
    plain, found = levels(-3.0)
    assert found.own is None and torch.equal(found.text_mean, plain.text_mean)
    assert related_note(split(LABELS, 6), found, "auto", True) is None


def test_classes_of_another_split_are_found_by_name():
    other = split(np.array([0, 1, 1, 2]), 1, names=("blue square", "red circle", "a comet"))
    assert concepts_of(other, split(LABELS, 6)).tolist() == [3, 0, 0, -1]
    assert concepts_of(split(None, 1), split(LABELS, 6)) is None


def test_the_note_names_the_classes():
    note = related_note(split(LABELS, 6), levels(0.5)[1], "auto", True)
    assert "'red circle' shares words with retained classes ('red square', " in note


@pytest.mark.parametrize(
    ("train", "masked", "why"),
    [
        (split(LABELS, 6, entities=["a"] * 25), True, "the pairs name entities"),
        (split(None, 6), True, "the pairs have no classes"),
        (split(LABELS, 6), False, "leave false_negatives at 'auto'"),
        (split(LABELS, 5), True, "no class is to be forgotten as a whole"),
        (split(np.array([4] * 6 + [1] * 5), 6), True, "no class to forget shares words"),
    ],
)
def test_the_note_says_why_asking_for_related_levels_makes_no_difference(train, masked, why):
    plain = levels(-1.0)[0]
    assert why in related_note(train, plain, "related", masked)
    assert related_note(train, plain, "auto", masked) is None


def test_a_run_without_a_target_says_that_the_level_makes_no_difference():
    given = [("cliperase", "related"), ("calibrated", "related"), ("cliperase", "unrelated")]
    found = [run(method=method, forget_level=level) for method, level in given]
    notes = ["makes no difference: the run has no target" in " ".join(one.record["notes"]) for one in found]
    assert notes == [True, False, False]


@pytest.mark.parametrize(("level", "names"), [("related", NAMES), ("similar", ALONE)])
def test_forgetting_again_what_is_forgotten_is_an_error(level, names):
    """It is at the level of the related classes, which is above that of unrelated pairs."""
    image, text, index = features(6.0)
    part, encoded = split(LABELS, 6, names=names), EncodedPairs(image, text, index, None)
    part.forget_mask = np.arange(len(LABELS)) < 6
    plain, bounded = levels(6.0) if level == "related" else similar(6.0)[2:]
    free = with_levels_of_relatives(plain, part, encoded, level)
    there = free.association(encoded, part.forget_mask, LABELS)
    assert there > bounded.association(encoded, part.forget_mask, LABELS) + 0.05, "without a bound"
    before = Candidate(0, 0, forget=0.0, retain=1.0, forget_similarity=there)
    baseline = SimpleNamespace(validation=before, validation_encoded=encoded)
    with pytest.raises(InputError, match="not above that of a model that never saw them, by the classes related"):
        check_forgettable(True, level, part, baseline, 1.0)
    assert "better than by chance" in " ".join(check_forgettable(True, "unrelated", part, baseline, 1.0))


def run(**changes):
    return call(**{**QUICK, "method": "calibrated", "epochs": 1, **changes})


def call(**settings):
    pairs = [(image, caption.replace("green square", "green dot")) for image, caption in make_pairs()]
    forget, retain = split_pairs(pairs, "red")  # squares, as the blue ones
    return cf.unlearn(make_tiny_clip(), forget, retain, **settings)


def test_levels_are_the_same_on_the_training_device():
    image, text, _ = features(0.5)
    _, found = levels(0.5)
    moved, concepts = found.to(image.float()), torch.as_tensor(LABELS)
    assert moved.own.related_images.dtype == moved.text_mean.dtype == torch.float32
    for name, rows, ids in (("of_images", image, concepts), ("of_captions", text, torch.tensor([0, 0, 1, 2, 3, 4]))):
        assert getattr(moved, name)(rows.float(), ids).tolist() == pytest.approx(
            getattr(found, name)(rows, ids).tolist(), abs=1e-6
        )


def test_a_sample_holds_pairs_of_each_class():
    labels = np.repeat([0, 1, 2, 3, 4], [30, 50, 9, 40, 20])
    train = split(labels, 30)
    relatives = relatives_of(train)
    whole = related_pairs(train, relatives, None, 0)
    assert list(whole) == [0, 1, 2] and all((labels[of] == label).all() for label, of in whole.items())
    assert [len(of) for of in whole.values()] == [30, 50, 9]
    drawn = related_pairs(train, relatives, 36, 0)
    assert [len(of) for of in drawn.values()] == [12, 12, 9]
    for label, of in drawn.items():
        assert set(of) <= set(whole[label]) and (np.diff(of) > 0).all()
    assert [len(of) for of in related_pairs(train, relatives, 3, 0).values()] == [8, 8, 8]
    assert all(np.array_equal(of, related_pairs(train, relatives, 36, 0)[label]) for label, of in drawn.items())
    assert not np.array_equal(drawn[1], related_pairs(train, relatives, 36, 1)[1])


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_captions_keep_their_cosines_with_the_related_classes():
    torch.manual_seed(0)
    image, text, own, old = unit(9, 5), unit(9, 5), unit(9, 5), unit(9, 5)
    means, weights = torch.randn(3, 5, dtype=torch.float64), torch.zeros(9, 3, dtype=torch.float64)
    weights[0, :2], weights[2, 2], weights[7, 0] = 0.5, 1.0, 1.0  # the last one is retained
    levels = {"background_image": torch.zeros(9), "background_text": torch.zeros(9)}
    given = BatchFeatures(image, text, torch.tensor(20.0), 4, teacher_image=own, teacher_text=old, **levels)
    with_related = BatchFeatures(**{**vars(given), "related": RelatedImages(means, weights)})
    added = pair_terms(with_related)[0] - pair_terms(given)[0]
    changes = ((text - old) @ means.T).square()
    expected = RELATED * (changes[0, :2].mean() + changes[2, 2]) / 4
    assert added.item() == pytest.approx(expected.item(), rel=1e-4)
    other = {name: pair_terms(one, own_teacher=False)[0] for name, one in (("with", with_related), ("without", given))}
    assert other["with"] == other["without"]


def watch_losses(monkeypatch):
    seen = []
    own = cf.functional.calibrated_loss

    def watched(*given, **options):
        seen.append(options)
        return own(*given, **options)

    monkeypatch.setattr("cliperase_fast.losses.calibrated_loss", watched)
    return seen


def test_a_run_takes_them_for_its_loss_unless_told_otherwise(monkeypatch):
    seen = watch_losses(monkeypatch)
    plain = run(forget_level="unrelated")
    related = run()
    first, second = seen[0], seen[len(seen) // 2]
    mask = first["forget_mask"]
    assert torch.equal(mask, second["forget_mask"])
    for name in ("background_image", "background_text"):
        assert torch.equal(first[name][~mask], second[name][~mask])
        assert not torch.isclose(first[name][mask], second[name][mask]).any()
    assert any("shares words with" in note for note in related.record["notes"])
    assert not any("shares words with" in note for note in plain.record["notes"])
    held = [[line["held"] for line in result.history if "held" in line] for result in (plain, related)]
    assert held[0][0] == held[1][0] == pytest.approx(0, abs=1e-10) and held[0][1:] != held[1][1:]


def test_a_run_gives_its_loss_the_related_classes_of_each_pair(monkeypatch):
    seen = []

    def watched(features, *options):
        seen.append(features)
        return pair_terms(features, *options)

    monkeypatch.setattr("cliperase_fast.unlearning.methods.calibrated.pair_terms", watched)
    run()
    for features in seen:
        images, weights = features.related
        assert images.shape == (1, features.image.shape[1]) and images.norm() > 0.1
        assert weights[:, 0].tolist() == [1.0] * features.n_forget + [0.0] * len(features.retain_image)
    seen.clear()
    run(forget_level="unrelated")
    assert seen and all(features.related is None for features in seen)


def test_a_run_with_many_retain_pairs_takes_a_sample_of_each_class(monkeypatch):
    seen = watch_losses(monkeypatch)
    run()
    monkeypatch.setattr(teacher, "BACKGROUND_WHOLE", 5)
    monkeypatch.setattr(teacher, "BACKGROUND_SAMPLE", 12)
    sampled = run()
    assert any("shares words with" in note for note in sampled.record["notes"])
    mask = seen[0]["forget_mask"]
    for name in ("background_image", "background_text"):
        assert torch.allclose(seen[0][name][mask], seen[-1][name][mask], atol=0.1)
        assert not torch.equal(seen[0][name][mask], seen[-1][name][mask])


@pytest.mark.parametrize("changes", [{"false_negatives": "caption"}, {"false_negatives": "none"}])
def test_a_run_without_classes_has_the_levels_of_all_pairs(changes):
    found = run(**changes)
    assert not any("shares words with" in note for note in found.record["notes"])
    plain = run(forget_level="unrelated", **changes)
    assert [line.get("total") for line in found.history] == [line.get("total") for line in plain.history]


def test_other_words_for_the_level_are_refused():
    with pytest.raises(InputError, match="forget_level='near' is not one of auto, similar, related, unrelated"):
        run(forget_level="near")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "auto"),
        ({"forget_level": "related"}, "related"),
        ({"forget_level": "similar"}, "similar"),
        ({"forget_level": "unrelated"}, "unrelated"),
        ({"method_options": {"lambda_hidden": 1.0}}, "unrelated"),
        ({"method_options": {"lambda_hidden": 1.0}, "forget_level": "related"}, "related"),
        ({"method": "cliperase"}, "auto"),
        ({"method": "text_projection", "forget_level": "unrelated"}, "unrelated"),
    ],
)
def test_the_model_decides_about_the_levels_unless_hidden_states_are_held(settings, expected):
    method, _ = make_method(cf.UnlearnConfig(**settings))
    assert method.forget_level == expected


@pytest.mark.parametrize("method", ["calibrated", "cliperase", "retain_finetune", "text_projection"])
def test_every_method_is_judged_by_the_level_of_related_classes(method):
    levels = {}
    for level in ("auto", "related", "unrelated"):
        numbers = {} if method == "text_projection" else {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3}
        found = call(method=method, select="divergence", forget_level=level, progress=False, report=False, **numbers)
        levels[level] = found.record["selection"]["background"]
        told = any("shares words with" in note for note in found.record["notes"])
        assert told == (level != "unrelated")
    assert levels["auto"] == levels["related"]
    assert abs(levels["related"] - levels["unrelated"]) > 1e-3


def similar(like, n_forget=6, names=ALONE):
    """The relatives of the classes of the first pairs, those of each, and the levels."""
    image, text, index = features(like)
    train, retained = split(LABELS, n_forget, names=names), np.arange(n_forget, len(LABELS))
    found = pair_features(image, text, index)
    relatives = relatives_of(train, alone=True)
    pairs = related_pairs(train, relatives, None, 0)
    plain = found.means(retained)
    relatives, pairs = with_most_similar(relatives, train, retained, pairs, found)
    return relatives, pairs, plain, with_related_levels(plain, relatives, pairs, found)


def test_a_class_without_shared_words_is_related_to_the_one_whose_captions_its_images_are_most_similar_to():
    image, text, index = features(0.5)
    cosines = {}
    for label in range(1, 5):
        captions = torch.stack([text[index[row]].mean(0) for row in np.flatnonzero(np.equal(LABELS, label))])
        cosines[label] = float((image[:6] @ captions.T).mean())
    relatives, pairs, plain, levels = similar(0.5)
    nearest = max(cosines, key=cosines.get)
    assert relatives == {0: [nearest]} and cosines[nearest] > 1.1 * sorted(cosines.values())[-2]
    assert pairs[nearest].tolist() == np.flatnonzero(np.equal(LABELS, nearest)).tolist()
    assert levels.own.concepts.tolist() == [0] and levels.own.related.tolist() == [nearest]
    forget, encoded = np.arange(len(LABELS)) < 6, EncodedPairs(image, text, index, None)
    assert levels.association(encoded, forget, LABELS) > plain.association(encoded, forget) + 0.05


def test_a_class_that_shares_words_keeps_the_classes_that_share_them():
    assert similar(0.5, names=NAMES)[0] == {0: [1, 2]}
    both = similar(0.5, n_forget=11, names=("red circle", "seven", "blue circle", "blue square", "the moon"))[0]
    assert both[0] == [2] and both[1] in ([2], [3], [4])


def test_mean_captions_of_classes_count_every_pair_once():
    image, text, index = features()
    rows = np.arange(3, len(LABELS))
    found = pair_features(image, text, index).caption_means(rows, LABELS[rows], 6)
    for label in range(5):
        of = [text[index[row]].mean(0) for row in rows if LABELS[row] == label]
        assert torch.allclose(found[label], torch.stack(of).mean(0), atol=1e-14)
    assert not found[5].any()


def test_the_note_names_the_most_similar_class():
    relatives, _, _, levels = similar(0.5)
    note = related_note(split(LABELS, 6, names=ALONE), levels, "similar", True)
    assert f"'seven' looks most like the retained class '{ALONE[relatives[0][0]]}'. A model" in note
    without = related_note(split(LABELS, 6, names=ALONE), levels_of_all(), "similar", True)
    assert "forget_level='similar' makes no difference: no class to forget is more similar" in without


def levels_of_all():
    image, text, index = features()
    return pair_features(image, text, index).means(np.arange(6, len(LABELS)))


def unnamed(**settings):
    """Forget "red", as no class shares a word with another."""
    pairs = [(image, caption.replace(" square", "")) for image, caption in make_pairs()]
    forget, retain = split_pairs(pairs, "red")
    numbers = {"epochs": 1, "batch_size": 6, "learning_rate": 1e-3, "select": "divergence", **settings}
    return cf.unlearn(make_tiny_clip(), forget, retain, progress=False, report=False, **numbers)


@pytest.mark.parametrize(
    ("names", "n_forget", "knows", "expected"),
    [
        (ALONE, 6, True, "similar"),
        (ALONE, 6, False, "related"),
        (NAMES, 6, True, "related"),  # all classes to forget share words with retained ones
        (ALONE, 2, True, "related"),  # no class is to be forgotten as a whole
    ],
)
def test_levels_of_similar_classes_are_for_text_towers_that_know_words_from_elsewhere(names, n_forget, knows, expected):
    train = split(LABELS, n_forget, names=names)
    assert level_of("auto", train, lambda: knows) == expected
    for level in ("similar", "related", "unrelated"):
        assert level_of(level, train, lambda: knows) == level


def test_a_run_asks_the_teacher_for_the_words_only_where_it_matters(monkeypatch):
    asked = []
    monkeypatch.setattr(preparation, "knows_words", lambda adapter: asked.append(adapter.module) or True)
    found, teacher_ = unnamed(), make_tiny_clip(seed=3)
    assert len(asked) == 1 and "looks most like" in " ".join(found.record["notes"])
    similar = unnamed(forget_level="similar")
    assert found.record["selection"]["background"] == similar.record["selection"]["background"]
    unnamed(forget_level="unrelated")
    unnamed(false_negatives="caption")
    unnamed(method="cliperase", select="floor")  # has no target
    unnamed(method_options={"lambda_hidden": 1.0})
    assert len(asked) == 1
    unnamed(teacher=teacher_)
    assert asked[1:] == [teacher_]


@pytest.mark.parametrize("whole", [True, False])
def test_only_asking_for_similar_levels_raises_those_of_classes_without_shared_words(monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(teacher, "BACKGROUND_WHOLE", 5)
        monkeypatch.setattr(teacher, "BACKGROUND_SAMPLE", 12)
    found = {level: unnamed(forget_level=level) for level in ("auto", "similar", "unrelated")}
    background = {level: one.record["selection"]["background"] for level, one in found.items()}
    assert background["auto"] == background["unrelated"] < background["similar"] - 1e-3
    told = {level: "looks most like" in " ".join(one.record["notes"]) for level, one in found.items()}
    assert told == {"auto": False, "similar": True, "unrelated": False}
