from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliperase_fast.data import check_images, open_source, select
from cliperase_fast.errors import InputError

# --- class folders


def test_folders_are_classes_and_underscores_become_spaces(tmp_path: Path, picture) -> None:
    picture(tmp_path / "maple_tree" / "b.jpg")
    picture(tmp_path / "maple_tree" / "deep" / "a.PNG")
    picture(tmp_path / "Apple" / "x.webp")
    (tmp_path / "Apple" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert source.test is None
    assert source.train.classes == ("Apple", "maple tree")
    assert source.train.ids == ["Apple/x.webp", "maple_tree/b.jpg", "maple_tree/deep/a.PNG"]
    assert source.train.captions[2] == ("a photo of a maple tree",)
    assert source.train.image(2).size == (6, 8)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_train_and_test_folders_are_splits(tmp_path: Path, picture, test_name: str) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "train" / "dog" / "1.png")
    picture(tmp_path / test_name / "dog" / "2.png")
    source = open_source(f"folder:{tmp_path}", templates=["a {}", "some {}"])
    assert source.test is not None and source.test.labels is not None
    assert (source.train.ids, source.test.ids) == (
        ["train/cat/1.png", "train/dog/1.png"],
        [f"{test_name}/dog/2.png"],
    )
    assert source.test.labels.tolist() == [1] and source.test.classes == ("cat", "dog")
    assert source.test.captions == [("a dog", "some dog")]


def test_a_class_called_train_is_not_a_split(tmp_path: Path, picture) -> None:
    picture(tmp_path / "train" / "1.png")
    picture(tmp_path / "test" / "1.png")
    assert open_source(f"folder:{tmp_path}").train.classes == ("test", "train")


def test_folder_mistakes_are_named(tmp_path: Path, picture) -> None:
    with pytest.raises(InputError, match="gone is not a directory"):
        open_source(f"folder:{tmp_path}/gone")
    picture(tmp_path / "loose.png")
    with pytest.raises(InputError, match="has no folders; put the images of each class into"):
        open_source(f"folder:{tmp_path}")
    picture(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(InputError, match="dog holds no images"):
        open_source(f"folder:{tmp_path}")
    picture(tmp_path / "train" / "dog" / "1.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="test holds no images"):
        open_source(f"folder:{tmp_path}")
    picture(tmp_path / "test" / "wolf" / "1.png")
    with pytest.raises(InputError, match="test has the class 'wolf'"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "train" / "big_dog").mkdir()
    (tmp_path / "train" / "big dog").mkdir()
    with pytest.raises(InputError, match=r"two folders .* stand for the class 'big dog'"):
        open_source(f"folder:{tmp_path}")


# --- caption tables


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_reads_open_clips_default_format(tmp_path: Path, picture) -> None:
    picture(tmp_path / "images" / "1.png", shade=10)
    absolute = picture(tmp_path / "elsewhere" / "2.png", shade=20)
    table = write(tmp_path / "pairs.tsv", f'filepath\ttitle\nimages/1.png\t"a dog, sitting"\n{absolute}\ta café\n\n')
    source = open_source(f"csv:{table}")
    assert source.test is None
    assert source.train.ids == ["images/1.png", str(absolute)]
    assert source.train.captions == [("a dog, sitting",), ("a café",)]
    assert [source.train.image(i).getpixel((0, 0))[0] for i in range(2)] == [10, 20]
    assert source.train.classes is None


def test_csv_takes_other_separators_and_columns(tmp_path: Path) -> None:
    table = write(tmp_path / "what?.csv", "\ufeffid,text & more,path\n1,a dog,1.png\n2,a cat,2.png\n")
    pairs = open_source(f"csv:{table}?sep=,&img=path&caption=text %26 more").train
    assert pairs.captions == [("a dog",), ("a cat",)] and pairs.ids == ["1.png", "2.png"]
    table = write(tmp_path / "semi.csv", "filepath;title\n1.png;a dog\n")
    assert open_source(f"csv:{table}?sep=semicolon").train.captions == [("a dog",)]


def test_csv_rows_with_one_path_are_one_image(tmp_path: Path) -> None:
    table = write(tmp_path / "t.tsv", "filepath\ttitle\n1.png\ta dog\n2.png\ta cat\n1.png\ta puppy\n1.png\ta dog\n")
    pairs = open_source(f"csv:{table}").train
    assert pairs.captions == [("a dog", "a puppy"), ("a cat",)]


def test_csv_captions_become_classes_when_they_repeat(tmp_path: Path) -> None:
    rows = "".join(f"{n}.png\ta photo of a {'cat' if n % 2 else 'dog'}\n" for n in range(6))
    table = write(tmp_path / "t.tsv", "filepath\ttitle\n" + rows)
    assert open_source(f"csv:{table}").train.classes == ("cat", "dog")
    templated = open_source(f"csv:{table}", templates=["one {}"]).train
    assert templated.prompts == (("one cat",), ("one dog",))
    assert templated.captions[0] == ("a photo of a dog",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "filepath\tcaption\n1.png\tx\n",
            r"no column 'title'; it has 'filepath', 'caption'; .*\?img=COLUMN&caption",
        ),
        ("filepath,title\n1.png,x\n", r"no column 'filepath'; .*add '\?sep=,'"),
        ("", "no column 'filepath'; it has none"),
        ("filepath\ttitle\n", "has no rows"),
        ("filepath\ttitle\n1.png\ta\n2.png\t  \n", "line 3 has no caption for 2.png"),
        ("filepath\ttitle\n1.png\n", "line 2 has no caption for 1.png"),
        ("filepath\ttitle\n\ta dog\n", "line 2 names no image"),
        ('filepath\ttitle\n1.png\t"a dog\n2.png\ta cat\n', r"line 2: quoted text over several lines.*\?quotes=none"),
    ],
)
def test_csv_mistakes_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    table = write(tmp_path / "t.tsv", text)
    with pytest.raises(InputError, match=message):
        open_source(f"csv:{table}")


def test_csv_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*gone\.tsv: No such file"):
        open_source(f"csv:{tmp_path}/gone.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"filepath\ttitle\n1.png\tcaf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.tsv: not UTF-8"):
        open_source(f"csv:{tmp_path}/latin.tsv")
    with pytest.raises(InputError, match="sep='ab'"):
        open_source(f"csv:{tmp_path}/latin.tsv?sep=ab")


def test_an_image_missing_from_a_table_is_found_by_the_check(tmp_path: Path, picture) -> None:
    picture(tmp_path / "1.png")
    table = write(tmp_path / "t.tsv", "filepath\ttitle\n1.png\ta dog\ngone.png\ta cat\n")
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        check_images(open_source(f"csv:{table}").train)


# --- Flickr30k

RESULTS = """image_name| comment_number| comment
1.jpg| 0| Two young guys with shaggy hair look at their hands .
1.jpg| 1| Two men | one "tall" .
1.jpg| 2|   Men outside .
1.jpg| 3| Friends enjoy time together .
1.jpg| 4   A dog runs across the grass .
2.jpg| 0| A cat .
2.jpg| 1| A small cat .
2.jpg| 2| A grey cat .
2.jpg| 3| A cat sits .
2.jpg| 4| An animal .
"""


@pytest.mark.parametrize("images", ["flickr30k_images", "flickr30k-images", ".", "flickr30k_images/flickr30k_images"])
def test_flickr_results_give_five_captions_an_image(tmp_path: Path, picture, images: str) -> None:
    write(tmp_path / "results.csv", RESULTS)
    for name in ("1.jpg", "2.jpg"):
        picture(tmp_path / images / name)
    source = open_source(f"flickr30k:{tmp_path}")
    assert source.test is None and source.train.ids == ["1.jpg", "2.jpg"]
    assert source.train.captions[0] == (
        "Two young guys with shaggy hair look at their hands .",
        'Two men | one "tall" .',
        "Men outside .",
        "Friends enjoy time together .",
        "A dog runs across the grass .",  # the row of the published file that lacks a separator
    )
    assert source.train.classes is None
    assert source.train.image(1).size == (6, 8)


def test_flickr_results_may_lie_beside_the_images(tmp_path: Path, picture) -> None:
    picture(tmp_path / "flickr30k_images" / "1.jpg")
    write(tmp_path / "flickr30k_images" / "results.csv", RESULTS)
    assert len(open_source(f"flickr30k:{tmp_path}").train) == 2


def test_a_flickr_image_is_selected_when_any_caption_matches(tmp_path: Path, picture) -> None:
    picture(tmp_path / "1.jpg")
    write(tmp_path / "results.csv", RESULTS)
    pairs = open_source(f"flickr30k:{tmp_path}").train
    assert select(pairs, "caption:dog").tolist() == [True, False]
    assert select(pairs, "caption:kitten,animal").tolist() == [False, True]


def karpathy(tmp_path: Path, picture) -> dict:
    images = []
    for number, part in enumerate(["train", "val", "restval", "test"]):
        picture(tmp_path / "flickr30k-images" / f"{number}.jpg")
        sentences = [{"raw": f" Caption {k} of {number} .", "tokens": []} for k in range(5)]
        images.append({"filename": f"{number}.jpg", "split": part, "sentences": sentences, "imgid": number})
    return {"images": images, "dataset": "flickr30k"}


def test_karpathys_splits_are_kept(tmp_path: Path, picture) -> None:
    write(tmp_path / "dataset_flickr30k.json", json.dumps(karpathy(tmp_path, picture)))
    write(tmp_path / "results.csv", RESULTS)
    source = open_source(f"flickr30k:{tmp_path}")
    assert source.test is not None
    assert source.train.ids == ["0.jpg", "2.jpg"] and source.test.ids == ["3.jpg"]
    assert source.train.captions[1] == tuple(f"Caption {k} of 2 ." for k in range(5))
    assert source.test.image(0).size == (6, 8)


def test_karpathys_file_may_have_no_test_split(tmp_path: Path, picture) -> None:
    content = karpathy(tmp_path, picture)
    content["images"].pop()
    write(tmp_path / "dataset_flickr30k.json", json.dumps(content))
    assert open_source(f"flickr30k:{tmp_path}").test is None


def test_flickr_mistakes_are_named(tmp_path: Path, picture) -> None:
    with pytest.raises(InputError, match="gone is not a directory"):
        open_source(f"flickr30k:{tmp_path}/gone")
    with pytest.raises(InputError, match=r"neither dataset_flickr30k\.json nor results\.csv"):
        open_source(f"flickr30k:{tmp_path}")
    write(tmp_path / "results.csv", RESULTS)
    with pytest.raises(InputError, match=r"images of flickr30k:.* are neither in .*looked for 1\.jpg"):
        open_source(f"flickr30k:{tmp_path}")
    picture(tmp_path / "1.jpg")
    write(tmp_path / "results.csv", "1.jpg| 0| fine\n1.jpg| what is this\n")
    with pytest.raises(InputError, match=r"results\.csv line 2 is not 'image_name\| comment_number"):
        open_source(f"flickr30k:{tmp_path}")
    write(tmp_path / "results.csv", "1.jpg| 0| fine\n1.jpg| 1| \n")
    with pytest.raises(InputError, match="line 2 has no caption"):
        open_source(f"flickr30k:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not Karpathy's format.*JSONDecodeError"),
        ('{"annotations": []}', "not Karpathy's format.*KeyError: 'images'"),
        ('{"images": [{"split": "val"}]}', "no images in the split 'train'"),
        (
            '{"images": [{"split": "train", "filename": "1.jpg", "sentences": []}]}',
            r"empty caption or none for 1\.jpg",
        ),
    ],
)
def test_mistakes_in_karpathys_file_are_named(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "dataset_flickr30k.json", content)
    with pytest.raises(InputError, match=message):
        open_source(f"flickr30k:{tmp_path}")
