"""The source `coco`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliperase_fast.data import open_source, select
from cliperase_fast.errors import InputError

IMAGE = {"license": 3, "coco_url": "http://images.cocodataset.org/x.jpg", "height": 8, "width": 6}


def write(file: Path, images: dict[int, str], captions: list[tuple[int, str]]) -> Path:
    """Write a file with the fields that the published ones have."""
    content = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [{**IMAGE, "id": number, "file_name": name} for number, name in images.items()],
        "annotations": [
            {"image_id": number, "id": 100 + place, "caption": text} for place, (number, text) in enumerate(captions)
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_the_published_layout_has_train_and_test_pairs(tmp_path: Path, picture) -> None:
    for split, numbers in (("train2017", (9, 25)), ("val2017", (139,))):
        names = {number: f"{number:012}.jpg" for number in numbers}
        texts = [(number, f"A dog {number} .\n") for number in numbers for _ in range(2)]
        write(tmp_path / "annotations" / f"captions_{split}.json", names, [*texts, (numbers[0], "A cat")])
        for name in names.values():
            picture(tmp_path / split / name)
    source = open_source(f"coco:{tmp_path}")
    assert source.train.ids == ["000000000009.jpg", "000000000025.jpg"]
    assert source.train.captions == [("A dog 9 .", "A cat"), ("A dog 25 .",)]
    assert source.test.ids == ["000000000139.jpg"]
    assert source.train.image(1).size == (6, 8)
    assert select(source.train, "caption:cat").tolist() == [True, False]
    one = open_source(f"coco:{tmp_path}/annotations/captions_val2017.json")
    assert (one.test, len(one.train)) == (None, 1)


@pytest.mark.parametrize("folder", ["images", "images/train2014", ".", "elsewhere"])
def test_images_are_found_or_named(tmp_path: Path, picture, folder: str) -> None:
    file = write(tmp_path / "captions_train2014.json", {1: "a.jpg"}, [(1, "x")])
    picture(tmp_path / folder / "a.jpg")
    if folder == "elsewhere":
        with pytest.raises(InputError, match=r"looked for a\.jpg\); name their folder with '\?root=DIR'"):
            open_source(f"coco:{file}")
    options = f"?root={tmp_path / folder}" if folder == "elsewhere" else ""
    assert open_source(f"coco:{file}{options}").train.image(0).size == (6, 8)


def test_unusable_captions_are_counted(tmp_path: Path, picture) -> None:
    captions = [(1, "x"), (1, " "), (7, "y"), (1, "x")]
    file = write(tmp_path / "captions.json", {1: "a.jpg", 2: "b.jpg"}, captions)
    picture(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"annotation 101 in .* has a caption that is empty"):
        open_source(f"coco:{file}")
    pairs = open_source(f"coco:{file}", on_error="skip").train
    assert pairs.captions == [("x",)]
    assert pairs.intake.skipped.counts == {"empty caption": 1, "caption of an unknown image": 1}
    assert pairs.intake.ignored.counts == {"repeated caption": 1, "image without a caption": 1}


def test_an_id_of_several_images_is_refused_or_left_out(tmp_path: Path, picture) -> None:
    file = write(tmp_path / "captions.json", {1: "a.jpg", 2: "b.jpg", 3: "c.jpg"}, [(1, "x"), (2, "y"), (3, "z")])
    file.write_text(file.read_text().replace('"id": 3, "file', '"id": 1, "file'))
    for name in "ab":
        picture(tmp_path / f"{name}.jpg")
    with pytest.raises(InputError, match=r"gives the id 1 to a\.jpg and to c\.jpg; number them"):
        open_source(f"coco:{file}")
    pairs = open_source(f"coco:{file}", on_error="skip").train
    assert pairs.ids == ["b.jpg"] and pairs.captions == [("y",)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "does not have the form"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}', "has objects"),
        ('{"images": [{"id": 1, "file_name": "a"}]}', "Karpathy's format"),
        ('{"images": [{"id": 1, "file_name": 3}], "annotations": []}', "a file_name is 3"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "has no caption that can be used"),
        ("{", "does not have the form"),
    ],
)
def test_other_json_is_explained(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=says):
        open_source(f"coco:{tmp_path / 'x.json'}")


def test_a_folder_must_have_one_file_for_a_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no annotations/captions_train"):
        open_source(f"coco:{tmp_path}")
    for year in (2014, 2017):
        write(tmp_path / "annotations" / f"captions_train{year}.json", {1: "a.jpg"}, [(1, "x")])
    with pytest.raises(InputError, match=r"captions_train2014\.json and captions_train2017\.json; name the file"):
        open_source(f"coco:{tmp_path}")
