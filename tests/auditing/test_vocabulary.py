from types import SimpleNamespace

import numpy as np
import open_clip
import pytest

from cliperase_fast.auditing.vocabulary import TEMPLATES, check_synonyms, fitting, known_synonyms, wordings
from cliperase_fast.data import open_source
from cliperase_fast.data.classes import ClassSpace
from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model


@pytest.fixture(scope="module")
def digits():
    return open_source("demo").test


def test_every_class_of_the_bundled_data_has_synonyms(digits):
    shapes = open_source("shapes?train=1&test=1").test
    for name in (*digits.classes, *shapes.classes, "airplane", "Truck"):
        others = known_synonyms(name)
        assert len(others) >= 3
        assert name not in others
    assert known_synonyms("apple") == ()


def test_synonyms_take_the_place_of_the_name_in_the_class_captions(digits):
    (variant,) = wordings(digits, np.array([7]), {7: ["heptad"]}, [])
    assert (variant.name, variant.concept) == ("seven = heptad", 7)
    assert variant.captions == (
        ("a photo of the digit heptad", "a handwritten heptad", "the number heptad", "a scan of a handwritten heptad"),
    )


def test_a_name_inside_another_word_of_the_caption_stays():
    space = ClassSpace(("ring", "star"), (("a rendering of a ring", "a ring"), ("many stars",)))
    pairs = SimpleNamespace(classes=space.names, prompts=space.prompts, space=space)
    asked = wordings(pairs, np.array([0, 1]), {0: ["hoop"], 1: ["comet"]}, [])
    assert [one.captions[0] for one in asked] == [("a rendering of a hoop", "a hoop"), ("many comets",)]


def test_templates_rename_all_classes(digits):
    first, *_ = wordings(digits, np.array([7]), {}, TEMPLATES)
    assert first.concept is None
    assert [captions[0] for captions in first.captions] == list(digits.classes)


def test_synonyms_of_unknown_classes_are_refused(digits):
    assert check_synonyms({"SEVEN": ["heptad"]}, digits) == {7: ("heptad",)}
    with pytest.raises(InputError, match="'eleven', which is not a class"):
        check_synonyms({"eleven": ["11"]}, digits)
    with pytest.raises(InputError, match="give a list of texts"):
        check_synonyms({"seven": "heptad"}, digits)


def test_wordings_longer_than_the_context_are_set_apart(digits):
    model = open_clip.model.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    )
    asked = wordings(digits, np.array([7]), {7: ("sevens", "a number that follows six")}, TEMPLATES)
    kept, too_long = fitting(asked, load_model(model))
    assert [wording.name for wording in too_long] == [
        "there is a {} in this picture",
        "seven = a number that follows six",
    ]
    assert [wording.name for wording in kept] == [*TEMPLATES[:-1], "seven = sevens"]


def test_data_with_paraphrases_is_asked_under_them_in_place_of_the_built_in_templates():
    people = open_source("personas?people=2&train=1&test=1&size=16").test
    found = list(wordings(people, np.array([2]), {}, TEMPLATES))
    assert [variant.name for variant in found] == ["paraphrase 1", "paraphrase 2"]
    for number, variant in enumerate(found):
        assert variant.concept is None
        assert variant.captions == tuple((of_class[number],) for of_class in people.space.paraphrases)
    assert [variant.name for variant in wordings(people, np.array([2]), {}, ["my {}"])] == ["my {}"]
