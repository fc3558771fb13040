from __future__ import annotations

import pytest

from cliperase_fast.data.classes import class_names, readable
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
def test_a_class_is_called_by_what_tells_its_caption_apart(captions: list[str], names: tuple[str, ...]) -> None:
    assert class_names(captions) == names


def test_underscores_read_as_spaces() -> None:
    assert readable("maple_tree") == "maple tree"


@pytest.mark.parametrize("templates", [[], ["no place"], ["{} and {}"], [3]])
def test_templates_without_one_place_for_the_name_are_refused(templates: list[str]) -> None:
    with pytest.raises(InputError, match="template"):
        open_source("demo", templates=templates)


def test_one_template_may_be_given_as_text() -> None:
    assert open_source("demo", templates="digit {}!").train.captions[0] == ("digit zero!",)
