from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cliperase_fast.data import PairDataset, as_pairs, open_source, parse_reference, select
from cliperase_fast.data.shapes import COLOURS
from cliperase_fast.errors import InputError

CAPTIONS: list[str | list[str]] = [
    "An apple on a table",
    "a pineapple",
    ["a fruit bowl", "two Apples, and a pear"],
    "an apple-pie",
    "a big  dog in the snow",
    "a hot dog",
    "STRASSE im Café",
    "learning C++ fast",
]


@pytest.fixture
def pairs() -> PairDataset:
    return as_pairs([(Image.new("RGB", (2, 2)), caption) for caption in CAPTIONS], "things")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("apple", [0, 3]),
        ("APPLE", [0, 3]),
        ("apple,apples", [0, 2, 3]),
        (" apples , pineapple,", [1, 2]),
        ("dog", [4, 5]),
        ("hot dog", [5]),
        ("big dog", [4]),
        ("pear", [2]),
        ("straße", [6]),
        (unicodedata.normalize("NFD", "café"), [6]),
        ("C++", [7]),
        ("an apple", [0, 3]),
        ("a.*", None),
        ("fru", None),
    ],
)
def test_captions_match_by_whole_words(pairs: PairDataset, words: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match=r"matches none of the 8 pairs of things.*whole words"):
            select(pairs, f"caption:{words}")
    else:
        assert np.flatnonzero(select(pairs, f"caption:{words}")).tolist() == expected


@pytest.mark.parametrize(
    ("captions", "words", "expected"),
    [
        (["कम पानी", "कमी है", "किताब"], "कम", [0]),  # for Unicode, the vowel sign of the second word is not a letter
        (["कम पानी", "कमी है", "किताब"], "ताब,कमी", [1]),
        (["一只狗在草地上", "狗，草地", "一只dog", "a 狗x", "猫"], "狗", [0, 1, 3]),
        (["一只狗在草地上", "狗，草地", "一只dog", "dogs", "猫"], "dog", [2]),
        (["a dog\u2019s bowl", "a dog's bowl", "a dog"], "dog's", [0, 1]),
        (["a t\u2011shirt", "a t-shirt", "shirts"], "T-shirt", [0, 1]),
        (["I \u2764\ufe0f it", "\u2764", "love"], "\u2764", [0, 1]),
    ],
)
def test_words_end_where_those_of_their_script_end(captions: list[str], words: str, expected: list[int]) -> None:
    pairs = as_pairs([(Image.new("RGB", (2, 2)), caption) for caption in captions], "things")
    assert np.flatnonzero(select(pairs, f"caption:{words}")).tolist() == expected


def test_a_pattern_among_words_is_refused(pairs: PairDataset) -> None:
    with pytest.raises(InputError, match=r"no caption of things contains 'pea\*': '\*' .* of classes only.*dog,dogs"):
        select(pairs, "caption:apple, pea*")


def test_a_selector_that_matches_everything_is_refused(pairs: PairDataset) -> None:
    with pytest.raises(InputError, match="matches all 8 pairs of things"):
        select(pairs, "caption:an,a,c++,im")


def test_classes_are_found_by_name_case_underscore_or_caption() -> None:
    test = open_source("shapes?train=1&test=1").train
    for text in ("red circle", "Red_Circle", "a red circle", "A RED CIRCLE"):
        assert np.flatnonzero(select(test, f"class:{text}")).tolist() == [0]
    assert np.flatnonzero(select(test, "class:red circle, red triangle")).tolist() == [0, 2]


def test_classes_read_off_captions_are_found_by_short_name_and_full_caption() -> None:
    items = [(None, f"a photo of a {name}") for name in ("dog", "cat, black", "owl") * 2]
    pairs = as_pairs(items, "pets")
    assert np.flatnonzero(select(pairs, "class:dog")).tolist() == [0, 3]
    assert np.flatnonzero(select(pairs, "class:a photo of a owl")).tolist() == [2, 5]
    assert np.flatnonzero(select(pairs, "class:cat, black")).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("class:sevn", "demo train has no class 'sevn'; did you mean 'seven'"),
        ("class:seven,dog", r"no class 'dog'; there are 'zero', 'one', .*'nine'"),
        ("class:", "is empty; use class:NAME,NAME"),
        ("caption: , ", "is empty"),
        ("seven", "is not a selector; use class:NAME,NAME, caption:WORD,SYNONYM, ids:FILE"),
        ("label:seven", "is not a selector"),
        ("class:zero,one,two,three,four,five,six,seven,eight,nine", "matches all"),
    ],
)
def test_selectors_that_mean_nothing_are_explained(selector: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(open_source("demo").train, selector)


def test_an_ambiguous_class_is_refused() -> None:
    pairs = as_pairs([(None, caption) for caption in ("Turkey", "turkey", "goose") * 2], "x")
    assert select(pairs, "class:turkey").tolist() == [False, True, False] * 2
    with pytest.raises(InputError, match="'TURKEY' could be any of the classes 'Turkey', 'turkey'"):
        select(pairs, "class:TURKEY")


def test_a_caption_of_several_classes_is_refused_as_the_name_of_one() -> None:
    pairs = as_pairs([(None, [name, "Animal"]) for name in ("cat", "dog") * 2] + [(None, "car")] * 2, "x")
    with pytest.raises(InputError, match="'animal' could be any of the classes 'cat', 'dog'"):
        select(pairs, "class:animal")
    assert select(pairs, "caption:animal").tolist() == [True] * 4 + [False] * 2


def test_classes_need_classes_and_words_need_words(pairs: PairDataset) -> None:
    with pytest.raises(InputError, match=r"things has no classes.*use 'caption:apple'"):
        select(pairs, "class:apple")
    tokens = as_pairs([(None, torch.tensor([1, 2]))] * 3, "tokens")
    with pytest.raises(InputError, match="captions of tokens are token ids"):
        select(tokens, "caption:apple")


def test_ids_come_from_a_file(tmp_path: Path, pairs: PairDataset) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("\ufeff3\n\n 5 \n3\n", encoding="utf-8")
    assert np.flatnonzero(select(pairs, f"ids:{file}")).tolist() == [3, 5]


def test_mistakes_in_a_file_of_ids_are_named(tmp_path: Path, pairs: PairDataset) -> None:
    file = tmp_path / "ids.txt"
    with pytest.raises(InputError, match=r"cannot read the file of ids .*ids\.txt: No such file"):
        select(pairs, f"ids:{file}")
    file.write_text("\n  \n")
    with pytest.raises(InputError, match=r"ids\.txt is empty"):
        select(pairs, f"ids:{file}")
    file.write_text("3\nx.png\ny.png\n")
    with pytest.raises(InputError, match=r"2 of the 3 ids in .* are not in things: 'x\.png', 'y\.png'; .*like '0'"):
        select(pairs, f"ids:{file}")
    file.write_text("\n".join(pairs.ids))
    with pytest.raises(InputError, match="matches all"):
        select(pairs, f"ids:{file}")


def test_a_file_of_ids_may_hold_those_of_the_other_split(tmp_path: Path) -> None:
    source = open_source("shapes?train=1&test=1")
    assert source.test is not None
    file = tmp_path / "ids.txt"
    file.write_text(f"{source.train.ids[4]}\n{source.test.ids[7]}\n")
    assert np.flatnonzero(select(source.train, f"ids:{file}", other=source.test)).tolist() == [4]
    assert np.flatnonzero(select(source.test, f"ids:{file}", other=source.train)).tolist() == [7]
    with pytest.raises(InputError, match="1 of the 2 ids"):
        select(source.train, f"ids:{file}")


def test_an_id_of_two_images_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "t.tsv").write_text("filepath\ttitle\n1.png\ta dog\n2.png\ta cat\n")
    file = tmp_path / "ids.txt"
    file.write_text("2.png\n")
    train, again, test = (open_source(f"csv:{tmp_path}/{split}/t.tsv").train for split in ("train", "train", "test"))
    assert select(train, f"ids:{file}", other=again).tolist() == [False, True]
    with pytest.raises(InputError, match=r"'2\.png' in .*ids\.txt names an image of .*test/t\.tsv and another one of"):
        select(test, f"ids:{file}", other=train)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("red c*", ["red circle", "red cross", "red crescent"]),
        ("RED_c*s*", ["red cross", "red crescent"]),
        ("[rg]?e* arrow, pink ring", ["green arrow", "pink ring"]),
        ("* circle,red circle", [f"{colour} circle" for colour in COLOURS]),
    ],
)
def test_wildcards_stand_for_parts_of_class_names(pattern: str, expected: list[str]) -> None:
    train = open_source("shapes?train=1&test=1").train
    assert train.classes is not None
    found = [train.classes[i] for i in np.flatnonzero(select(train, f"class:{pattern}"))]
    assert sorted(found) == sorted(expected)


def test_a_class_that_is_called_like_a_pattern_is_meant_literally() -> None:
    pairs = as_pairs([(None, f"a {name}") for name in ("c*", "cat", "c?") * 2], "odd")
    assert np.flatnonzero(select(pairs, "class:c*")).tolist() == [0, 3]
    assert np.flatnonzero(select(pairs, "class:?a*")).tolist() == [1, 4]
    with pytest.raises(InputError, match=r"has no class 'd\*'"):
        select(pairs, "class:d*")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("demo#class:seven", ("demo", "class:seven")),
        ("demo", ("demo", None)),
        ("csv:/a#b/c.tsv?sep=,#caption:hot dog,c#", ("csv:/a#b/c.tsv?sep=,", "caption:hot dog,c#")),
        ("folder:/a#b", ("folder:/a#b", None)),
        ("wds:/x/{0..3}.tar#ids:/tmp/a#b.txt", ("wds:/x/{0..3}.tar", "ids:/tmp/a#b.txt")),
        ("csv:x#caption:a#class:b", ("csv:x", "caption:a#class:b")),
    ],
)
def test_references_split_into_source_and_selector(reference: str, parts: tuple[str, str | None]) -> None:
    assert parse_reference(reference) == parts


def test_a_reference_with_an_unknown_selector_is_explained() -> None:
    with pytest.raises(InputError, match=r"unknown selector 'klass' in 'demo#klass:seven'; use class:NAME"):
        parse_reference("demo#klass:seven")
