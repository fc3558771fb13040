"""Items of a dataset of the caller's own that cannot be used: refused by name, or left out and counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cliperase_fast.data import as_pairs, concat
from cliperase_fast.errors import InputError

PICTURE = Image.new("RGB", (4, 4))


class Items:
    """A dataset that raises what it is given instead of returning it."""

    def __init__(self, items: list[Any], length: Any = None) -> None:
        self.items, self.length = items, len(items) if length is None else length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


@pytest.mark.parametrize("length", [-1, 1.5, "3", None, 2**70, ValueError("no length")])
def test_a_length_that_is_none_is_refused(length: Any) -> None:
    class Odd:
        def __len__(self) -> Any:
            if isinstance(length, Exception):
                raise length
            return length

        def __getitem__(self, index: int) -> Any:
            return PICTURE, "x"

    with pytest.raises(InputError, match=r"the length of mine is unknown: len.. raised .*whole number of at least 0"):
        as_pairs(Odd(), "mine")


@pytest.mark.parametrize(
    ("item", "message", "reason"),
    [
        (KeyError("gone"), "item 1 of mine cannot be read: KeyError: 'gone'", "the dataset raised an error"),
        (InputError("bad file x"), "bad file x", "the dataset raised an error"),
        ((PICTURE, ""), "caption of item 1 of mine is empty", "empty caption"),
        ((PICTURE, " \t\n"), "caption of item 1 of mine is empty", "empty caption"),
        ((PICTURE, []), "is an empty list", "empty caption"),
        ((PICTURE, ["a dog", ""]), "is empty", "empty caption"),
        ((PICTURE, None), "is a NoneType; give a str", "caption is not text"),
        ((PICTURE, float("nan")), "is NaN, .* give a str", "caption is missing"),
        ((PICTURE, b"a dog"), "is a bytes; give a str", "caption is not text"),
        ((PICTURE, ["a dog", None]), "is a NoneType", "caption is not text"),
        ((PICTURE, {"text": "a dog"}), "is a dict", "caption is not text"),
        ((PICTURE, "half \ud83d"), "contains half a character", "caption is not Unicode"),
        ((PICTURE, "x" * (2 << 20)), "has 2097152 characters", "caption too long"),
    ],
)
def test_an_item_is_refused_by_name_or_left_out(item: Any, message: str, reason: str) -> None:
    items = Items([(PICTURE, "a dog"), item, (PICTURE, "a cat")])
    with pytest.raises(InputError, match=message):
        as_pairs(items, "mine")
    pairs = as_pairs(items, "mine", on_error="skip")
    assert pairs.ids == ["0", "2"] and pairs.captions == [("a dog",), ("a cat",)]
    assert pairs.intake.skipped.counts == {reason: 1}
    (example,) = pairs.intake.skipped.examples.values()
    assert "item 1 of mine" in example
    with pytest.raises(
        InputError, match=r"mine has no item that can be used: all 2 were left out \(the first: .*item 0"
    ):
        as_pairs(Items([item, item]), "mine", on_error="skip")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, dtype=torch.long, device="meta"), "is a meta tensor; token ids must be"),
        (torch.ones(4, dtype=torch.long).to_sparse(), "is a sparse tensor; token ids must be"),
        (np.array([1.0, 2.0]), "is a float64 array"),
        (torch.tensor([1, -2]), "has the token id -2; ids must be at least 0"),
        (torch.tensor(3, device="meta"), "is the number, a class label"),
    ],
)
def test_token_ids_that_cannot_be_used_are_named(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"caption of item 0 of mine {message}"):
        as_pairs([(PICTURE, tokens)], "mine")


def test_arrays_of_texts_are_captions() -> None:
    items = [(PICTURE, np.array(["a dog", "a pet"])), (PICTURE, np.array("a cat")), (PICTURE, np.str_("a pig"))]
    assert as_pairs(items, "mine").captions == [("a dog", "a pet"), ("a cat",), ("a pig",)]


def test_a_dataset_that_shrinks_is_named() -> None:
    items = [(PICTURE, "a dog"), (PICTURE, "a cat")]
    pairs = as_pairs(items, "mine")
    items.pop()
    with pytest.raises(InputError, match="cannot read image 1 of mine: IndexError"):
        pairs.image(1)


def test_counts_of_parts_are_added_once() -> None:
    items = Items([(PICTURE, "a dog"), (PICTURE, ""), (PICTURE, "a cat")])
    first, second = (as_pairs(items, "mine", on_error="skip") for _ in range(2))
    assert concat([first, first.subset([0])]).intake.skipped.counts == {"empty caption": 1}
    assert concat([first, second]).intake.skipped.counts == {"empty caption": 2}
