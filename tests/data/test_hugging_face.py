"""The sources `hf` and `parquet`."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cliperase_fast.data import arrow_tables, open_source, overlap
from cliperase_fast.errors import InputError

WRITTEN = Path(__file__).parent / "written_by_datasets"


def colours(pairs) -> list[int]:
    """The numbers of the pictures, as README.md there says."""
    found = []
    for index in range(len(pairs)):
        image = pairs.image(index)
        assert image.size == (6, 8)
        red, green, blue = image.getpixel((3, 3))
        assert (green, blue) == (255 - red, 40) and red % 40 == 0
        found.append(red // 40)
    return found


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), (40 * number, 255 - 40 * number, 40), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return f"parquet:{path}"


def test_a_saved_dict_of_splits_has_train_and_test_pairs_with_the_named_classes() -> None:
    source = open_source(f"hf:{WRITTEN / 'dict'}")
    train, test = source.train, source.test
    assert train.classes == test.classes == ("sea lion", "owl")
    assert (train.ids, test.ids) == (["train/0", "train/1", "train/2", "train/3"], ["test/0", "test/1"])
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    assert train.captions[:2] == [("a photo of a sea lion",), ("a photo of a owl",)]
    assert (colours(train), colours(test)) == ([0, 1, 2, 3], [4, 5])
    only = open_source(f"hf:{WRITTEN / 'dict'}?split=test", templates="the {}")
    assert (only.test, colours(only.train), only.train.captions[0]) == (None, [4, 5], ("the sea lion",))


@pytest.mark.parametrize(
    ("folder", "numbers"), [("one", [2, 0]), ("hub", [0, 1, 2]), ("hub/data", [0, 1, 2]), ("cache", [0, 1, 2])]
)
def test_every_form_that_datasets_writes_is_read(folder: str, numbers: list[int]) -> None:
    pairs = open_source(f"hf:{WRITTEN / folder}?id=id").train
    texts = ["a red thing", "a blue thing", "an owl"]
    assert colours(pairs) == numbers
    assert pairs.captions == [(texts[number],) for number in numbers]
    assert pairs.ids == ["abc"[number] for number in numbers]


def test_a_store_is_pickled_for_loader_processes_and_knows_the_same_images() -> None:
    pairs = open_source(f"parquet:{WRITTEN / 'hub' / 'data'}/*.parquet").train
    colours(pairs)  # with open files
    assert colours(pickle.loads(pickle.dumps(pairs))) == [0, 1, 2]
    again = open_source(f"hf:{WRITTEN / 'hub'}").train
    assert overlap(pairs, again).tolist() == [0, 1, 2]


def test_columns_are_named_and_lists_of_captions_belong_to_one_image(tmp_path: Path) -> None:
    texts = [["a dog", " a pet "], ["a cat"], ["a cow", "a cow"]]
    spec = write(tmp_path / "x.parquet", raw=[png(1), png(2), png(3)], sentences=texts, key=["u", "v", "w"])
    pairs = open_source(f"{spec}?img=raw&caption=sentences&id=key").train
    assert pairs.captions == [("a dog", "a pet"), ("a cat",), ("a cow",)]
    assert (colours(pairs), pairs.ids) == ([1, 2, 3], ["u", "v", "w"])


def test_rows_are_read_across_files_and_row_groups_within_bounded_memory(tmp_path: Path, monkeypatch) -> None:
    for part, numbers in enumerate(([0, 1, 2, 3, 4], [5, 6])):
        write(tmp_path / f"{part}.parquet", image=[png(n) for n in numbers], text=[f"number {n}" for n in numbers])
    monkeypatch.setattr(arrow_tables, "_MOST_HELD", 1)
    pairs = open_source(f"parquet:{tmp_path}/*.parquet").train
    assert colours(pairs.subset([6, 0, 5, 3, 4, 0])) == [6, 0, 5, 3, 4, 0]
    assert len(pairs.store._groups) == 1


def test_a_column_of_paths_starts_at_the_root(tmp_path: Path, picture) -> None:
    for number in (1, 2):
        picture(tmp_path / "images" / f"{number}.png", shade=40 * number)
    spec = write(tmp_path / "x.parquet", file_name=["1.png", "2.png"], text=["a", "b"])
    assert colours(open_source(f"{spec}?root={tmp_path / 'images'}").train) == [1, 2]
    with pytest.raises(InputError, match=r"1\.png.*add '\?root=DIR' to the source"):
        open_source(spec).train.image(0)


def test_string_labels_have_the_same_numbers_in_both_splits_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", image=[png(1), png(2), png(3)], label=["cow", "ape", "cow"])
    write(tmp_path / "val-0.parquet", image=[png(4)], label=["cow"])
    source = open_source(f"hf:{tmp_path}")
    assert source.train.classes == ("ape", "cow")
    assert (source.train.labels.tolist(), source.test.labels.tolist()) == ([1, 0, 1], [1])
    write(tmp_path / "val-0.parquet", image=[png(4), png(5)], label=["cow", "emu"])
    with pytest.raises(InputError, match=r"row 1 of .* validation has the class 'emu'"):
        open_source(f"hf:{tmp_path}")
    source = open_source(f"hf:{tmp_path}", on_error="skip")
    assert (len(source.test), source.test.intake.skipped.counts) == (1, {"row of an unknown class": 1})


@pytest.mark.parametrize(
    ("labels", "name", "text"),
    [
        ([1, 0], "names.txt", "sea lion\nbarn owl\n"),
        ([1, 0], "names.txt", "1 barn owl\n0 sea lion\n"),
        ([1, 0], "names.txt", "n01440764 sea lion\nn01443537\tbarn owl\n"),
        ([1, 0], "names.json", '["sea lion", "barn owl", "emu"]'),
        ([1, 0], "names.json", '{"0": ["n01440764", "sea lion"], "1": ["n01443537", "barn_owl"]}'),
        (["n01443537", "n01440764"], "names.txt", "n01440764 sea lion\nn01443537 barn owl\n"),
        (["n01443537", "n01440764"], "names.json", '{"n01440764": "sea lion", "n01443537": "barn owl"}'),
    ],
)
def test_classes_are_named_by_a_file(tmp_path: Path, labels, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    spec = write(tmp_path / "x.parquet", image=[png(1), png(2)], label=labels)
    pairs = open_source(f"{spec}?classnames={name}").train
    assert pairs.classes == ("sea lion", "barn owl")
    assert pairs.captions == [("a photo of a barn owl",), ("a photo of a sea lion",)]


@pytest.mark.parametrize(
    ("labels", "text", "says"),
    [
        ([0, 2], "cat\ndog\n", "names 2 classes and the column 'label' has 3"),
        ([0, 1], "1 cat\n2 dog\n", "begin with numbers other than 0 to 1 .*'1 cat'.*number them from 0"),
        ([0, 1], "0: cat\n1: dog\n", "'0: cat'"),
        (["n01443537"], "n01440764 tench\n", "has no line for 'n01443537'"),
        (["n01443537"], None, "WordNet ids, which would appear in the captions"),
    ],
)
def test_classes_that_a_file_does_not_name_are_refused(tmp_path: Path, labels, text, says: str) -> None:
    spec = write(tmp_path / "x.parquet", image=[png(1)] * len(labels), label=labels)
    if text is not None:
        (tmp_path / "names.txt").write_text(text)
        spec += "?classnames=names.txt"
    with pytest.raises(InputError, match=says):
        open_source(spec)


def test_unusable_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    spec = write(tmp_path / "x.parquet", image=[png(1), png(2), None, png(3)], text=["a", " ", "c", None])
    with pytest.raises(InputError, match=r"row 1 of .* has a caption that is empty"):
        open_source(spec)
    pairs = open_source(spec, on_error="skip").train
    assert pairs.intake.skipped.counts == {"empty caption": 1, "caption is missing": 1}
    assert pairs.ids == ["0", "2"]
    with pytest.raises(InputError, match=r"row 2 of .* has no image; remove the row"):
        pairs.image(1)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"a": [b""], "text": ["x"]}, "", "has no column of images; it has 'a', 'text'; name one with"),
        ({"image": [b""]}, "", "has neither captions nor classes; it has 'image'; name"),
        ({"image": [b""], "text": ["x"]}, "?caption=title", "has no column 'title'; it has 'image', 'text'"),
        ({"image": [3], "text": ["x"]}, "", "'image' of .* is of type int64; a column of images holds"),
        ({"image": [b"", b""], "text": ["x", "y"], "k": ["1", "1"]}, "?id=k", "the id '1' occurs several times"),
        ({"image": [b""], "text": ["x"]}, "?root=gone", "root='gone' is not a directory"),
        ({"image": [b""], "label": [[0, 1]]}, "", "'label' of .* is of type list<.*; a column of classes holds whole"),
        ({"image": [b""], "label": [{"a": 1}]}, "", "is of type struct<.*; a column of classes holds whole numbers"),
        ({"image": [b""], "label": [1.0]}, "", "is of type double; a column of classes holds whole numbers or texts"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path: Path, columns, options: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_source(write(tmp_path / "x.parquet", **columns) + options)


@pytest.mark.parametrize("double", ["image", "text"])
def test_a_column_that_occurs_twice_is_refused(tmp_path: Path, double: str) -> None:
    table = pa.table([[b""], ["x"], [b""]], names=["image", "text", double])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=f"has several columns '{double}'; rename all but one"):
        open_source(f"parquet:{tmp_path}/x.parquet")


def test_large_numbers_are_names_of_classes(tmp_path: Path) -> None:
    spec = write(tmp_path / "x.parquet", image=[png(1), png(2), png(3)], label=[10**15, 7, 10**15])
    pairs = open_source(spec).train
    assert pairs.classes == ("1000000000000000", "7") and pairs.labels.tolist() == [0, 1, 0]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    spec = write(tmp_path / "x.parquet", image=[png(1)], text=["a"])
    whole = (tmp_path / "x.parquet").read_bytes()
    for content, says in (
        (whole[:-20], "x.parquet as a Parquet or Arrow file"),
        (b"not data", "x.parquet as a Parquet or Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(InputError, match=says):
            open_source(spec)
    with pytest.raises(InputError, match="names no file; for a folder use hf:"):
        open_source(f"parquet:{tmp_path}")


def test_feather_files_are_read(tmp_path: Path) -> None:
    table = pa.table({"image": [png(1), png(2)], "text": ["a", "b"]})
    feather.write_feather(table, str(tmp_path / "x.arrow"), compression="uncompressed")
    assert colours(open_source(f"hf:{tmp_path}").train) == [1, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {**state, "_data_files": [{"filename": "../dict/train/x.arrow"}]}, "outside of its folder"),
        (lambda state: {**state, "_data_files": [{"filename": "y.arrow"}]}, "names the file 'y.arrow', which is miss"),
        (lambda state: {**state, "_indices_data_files": [{"filename": "i.arrow"}]}, "of an old version of datasets"),
        (lambda state: {}, "lists no files"),
    ],
)
def test_a_saved_folder_that_does_not_fit_is_explained(tmp_path: Path, change, says: str) -> None:
    folder = tmp_path / "one"
    shutil.copytree(WRITTEN / "one", folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(change(state)))
    with pytest.raises(InputError, match=says):
        open_source(f"hf:{folder}")


def test_a_folder_without_a_training_split_must_name_one(tmp_path: Path) -> None:
    for split in ("test", "dev"):
        write(tmp_path / f"{split}.parquet", image=[png(1)], text=["a"])
    with pytest.raises(InputError, match=r"no split 'train' but 'validation', 'test'; name the one to use"):
        open_source(f"hf:{tmp_path}")
    with pytest.raises(InputError, match="split='all' is not in"):
        open_source(f"hf:{tmp_path}?split=all")
    assert len(open_source(f"hf:{tmp_path}?split=validation").train) == 1
