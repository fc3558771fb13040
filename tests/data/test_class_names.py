from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cliperase_fast.data.classes import ClassSpace, class_names, derive_classes, readable
from cliperase_fast.data.sources import open_source
from cliperase_fast.errors import InputError


@pytest.mark.parametrize(
    ("captions", "names"),
    [
        (["a photo of a cat", "a photo of a polar bear"], ("cat", "polar bear")),
        (["a photo of a dog.", "A photo of an owl."], ("dog", "owl")),
        (["a red circle", "a red ring", "a blue circle"], ("red circle", "red ring", "blue circle")),
        (["a T-shirt on a table", "a sweat-shirt on a table"], ("T-shirt", "sweat-shirt")),
        (["an apple", "pears"], ("apple", "pears")),
        (["cat", "dog"], ("cat", "dog")),
        (["the thing", "thing"], ("the thing", "thing")),  # the same name twice would be wrong
        (["a photo", "a photo of a dog"], ("photo", "photo of a dog")),
        (["a photo of a dog"], ("a photo of a dog",)),
        (["...", "!"], ("...", "!")),
        (["eine Straße", "eine Brücke"], ("Straße", "Brücke")),
    ],
)
def test_a_class_is_named_by_the_words_only_its_caption_has(captions: list[str], names: tuple[str, ...]) -> None:
    assert class_names(captions) == names


def test_underscores_read_as_spaces() -> None:
    assert readable("maple_tree") == "maple tree"


@pytest.mark.parametrize("templates", [[], ["no place"], ["{} and {}"], [3]])
def test_templates_without_one_place_for_the_name_are_refused(templates: list[str]) -> None:
    with pytest.raises(InputError, match="template"):
        open_source("demo", templates=templates)


def test_one_template_may_be_given_as_text() -> None:
    assert open_source("demo", templates="digit {}!").train.captions[0] == ("digit zero!",)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["cat", "cat", "dog"], "2 classes are called 'cat'"),
        (["cat", "", "dog"], "class 1 of 3 has an empty name"),
        (["cat", " \t", "dog"], "class 1 of 3 has an empty name"),
        (["cat", "Cat", "CAT", "dog"], "3 classes are called 'cat' and 'Cat' and 'CAT'"),
        (["polar bear", "polar_bear"], "2 classes are called 'polar bear' and 'polar_bear'"),
        (["polar  bear", "polar bear "], "2 classes are called"),
        (["caf\u00e9", "cafe\u0301"], "2 classes are called"),  # one accent, encoded in two ways
    ],
)
def test_class_names_that_a_selector_cannot_distinguish_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ClassSpace.from_templates(names, ("a photo of a {}",))
    with pytest.raises(InputError, match=says):
        ClassSpace(tuple(names), tuple((name,) for name in names))


def test_captions_that_differ_in_case_are_classes_of_their_own() -> None:
    found = derive_classes([("a Cat",), ("a cat",), ("a dog",)] * 3)
    assert found is not None
    assert len(found[1].names) == 3


@pytest.mark.parametrize("names", [["cat"] * 10, ["cat", "Cat", *"abcdefgh"], ["cat", "", *"abcdefgh"]], ids=str)
def test_cifar_files_with_such_names_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        content = {"labels": [0, 1], "data": np.zeros((2, 3072), dtype=np.uint8)}
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    with pytest.raises(InputError, match=r"classes called|classes are called|empty name"):
        open_source(f"cifar10:{tmp_path}")


def test_class_folders_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "Cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match="'Cat' and 'cat'"):
        open_source(f"folder:{tmp_path}")
