"""Class folders: each entry is read once, counted or refused, and their names are words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cliperase_fast.data import check_images, folders, open_source
from cliperase_fast.errors import InputError


def test_every_suffix_that_pillow_reads_is_an_image(tmp_path: Path, picture) -> None:
    suffixes = ["jpe", "jfif", "bmp", "tif", "TIFF", "gif", "webp", "ppm", "avif", "JPG", "jp2", "tga", "ico", "dib"]
    for suffix in suffixes:
        picture(tmp_path / "c" / f"{suffix}.{suffix}")
    pairs = open_source(f"folder:{tmp_path}").train
    assert len(pairs) == len(suffixes)
    assert len(check_images(pairs)[0]) == len(suffixes)


def test_images_of_other_formats_are_refused_or_counted(tmp_path: Path, picture) -> None:
    picture(tmp_path / "c" / "x.png")
    (tmp_path / "c" / "y.HEIC").write_bytes(b"?")
    with pytest.raises(InputError, match=r"y\.HEIC is an image that Pillow does not read here; convert it"):
        open_source(f"folder:{tmp_path}")
    pairs = open_source(f"folder:{tmp_path}", on_error="skip").train
    assert len(pairs) == 1 and pairs.intake.skipped.counts == {".heic images are not read": 1}


def test_everything_beside_the_images_is_counted(tmp_path: Path, picture) -> None:
    for name in ("x.png", "deep/er/y.png", ".z.png", ".git/z.png", "__MACOSX/z.png", "__MACOSX/._x.png"):
        picture(tmp_path / "c" / name)
    for name in ("c/Thumbs.db", "c/.DS_Store", "c/notes.txt", "c/noname", "list.csv"):
        (tmp_path / name).write_text("?")
    picture(tmp_path / "__MACOSX" / "c" / "z.png")
    pairs = open_source(f"folder:{tmp_path}").train
    assert pairs.ids == ["c/deep/er/y.png", "c/x.png"] and pairs.classes == ("c",)
    assert pairs.intake.ignored.counts == {
        "hidden or system file": 6,
        "file outside of the class folders": 1,
        "not an image by its suffix (.txt)": 1,
        "not an image by its suffix (none)": 1,
    }


@pytest.mark.parametrize("run", ["run", "c/run"])
def test_a_run_directory_is_not_a_class(tmp_path: Path, picture, run: str) -> None:
    picture(tmp_path / "c" / "x.png")
    picture(tmp_path / run / "plots" / "losses.png")
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / run / name).write_text("{}")
    pairs = open_source(f"folder:{tmp_path}").train
    assert pairs.ids == ["c/x.png"] and pairs.intake.ignored.counts == {"run directory": 1}


def test_links_back_and_loops_give_no_image_twice(tmp_path: Path, picture) -> None:
    picture(tmp_path / "root" / "cat" / "1.png")
    picture(tmp_path / "root" / "dog" / "2.png")
    picture(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "root" / "cat" / "loop").symlink_to(tmp_path / "root" / "cat")
    (tmp_path / "root" / "cat" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "cat" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "cat" / "again").symlink_to(tmp_path / "elsewhere")
    pairs = open_source(f"folder:{tmp_path}/root").train
    assert [os.path.basename(name) for name in pairs.ids] == ["1.png", "3.png", "2.png"]
    assert pairs.intake.ignored.counts == {"link to a folder that is read already": 3}


@pytest.mark.parametrize("target", ["turning.png", "gone.png"])
def test_a_link_that_leads_nowhere_is_an_image_that_can_be_left_out(tmp_path: Path, picture, target: str) -> None:
    picture(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "turning.png").symlink_to(target)
    (tmp_path / "nowhere").symlink_to("nowhere")
    pairs = open_source(f"folder:{tmp_path}").train
    with pytest.raises(InputError, match=r"turning\.png"):
        check_images(pairs)
    good, bad = check_images(pairs, on_error="skip")
    assert [pairs.ids[index] for index in good] == ["cat/1.png"] and len(bad) == 1
    assert pairs.intake.ignored.counts == {"file outside of the class folders": 1}


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, picture, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "c" / "x.png")
    picture(tmp_path / "c" / "locked" / "y.png")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot list the folder .*locked: Permission denied"):
        open_source(f"folder:{tmp_path}")


def test_folders_nested_beyond_the_longest_path_are_named(tmp_path: Path, picture) -> None:
    picture(tmp_path / "c" / "x.png")
    here = os.getcwd()
    try:
        os.chdir(tmp_path / "c")
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    with pytest.raises(InputError, match="File name too long"):
        open_source(f"folder:{tmp_path}")


def test_wordnet_ids_need_class_names(tmp_path: Path, picture) -> None:
    for name in ("n01440764", "n01443537"):
        picture(tmp_path / "data" / name / "x.png")
    spec = f"folder:{tmp_path / 'data'}"
    with pytest.raises(InputError, match=r"'n01440764' in .* WordNet id, .*\?classnames=FILE"):
        open_source(spec)
    files = {
        "names.txt": "n01440764 tench\nn01443537\tgold fish\n\nn09999999 other\n",
        "names.json": json.dumps({"n01440764": "tench", "n01443537": "gold_fish"}),
        "index.json": json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "gold_fish"]}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        train = open_source(f"{spec}?classnames={tmp_path / name}").train
        assert train.classes == ("tench", "gold fish") and train.captions[1] == ("a photo of a gold fish",)
    for text, message in [
        ("n01440764 tench\n", "has no line for the folder 'n01443537'"),
        ("n01440764 tench\nn01443537 tench\n", "two folders in .* stand for the class 'tench'"),
        ("n01440764 tench\nn01440764 crane\n", "names the folder 'n01440764' twice"),
        ("n01440764\n", "has the line 'n01440764'; write 'FOLDER NAME'"),
    ]:
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            open_source(f"{spec}?classnames={tmp_path / 'names.txt'}")
    (tmp_path / "names.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"not JSON \{folder: name\}"):
        open_source(f"{spec}?classnames={tmp_path / 'names.json'}")


def test_empty_class_folders_are_refused_or_counted(tmp_path: Path, picture) -> None:
    picture(tmp_path / "cat" / "x.png")
    (tmp_path / "dog" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="dog holds no images"):
        open_source(f"folder:{tmp_path}")
    pairs = open_source(f"folder:{tmp_path}", on_error="skip").train
    assert pairs.classes == ("cat",)
    assert pairs.intake.skipped.counts == {"class folder without images": 1}


def test_a_locale_without_utf_8_is_named_and_not_the_folder(tmp_path: Path, monkeypatch) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9/x.png")
    monkeypatch.setattr(folders.sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(InputError, match="cannot be read as ascii, the encoding of the locale; set PYTHONUTF8=1"):
        open_source(f"folder:{tmp_path}")


def test_folder_names_must_be_utf_8_and_say_something(tmp_path: Path, picture) -> None:
    picture(tmp_path / "a" / "cat" / "x.png")
    os.makedirs(os.fsencode(tmp_path / "a") + b"/caf\xe9")
    with pytest.raises(InputError, match=r"name of the folder 'caf\\\\udce9' in .* is not UTF-8; rename it"):
        open_source(f"folder:{tmp_path}/a")
    picture(tmp_path / "b" / "_" / "x.png")
    with pytest.raises(InputError, match=r"the folder '_' in .* has no class name"):
        open_source(f"folder:{tmp_path}/b")


def test_file_names_that_are_not_utf_8_are_read_under_an_escaped_id(tmp_path: Path, picture) -> None:
    made = picture(tmp_path / "cat" / "x.png", shade=5)
    os.rename(os.fsencode(made), os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    pairs = open_source(f"folder:{tmp_path}").train
    assert pairs.ids == ["cat/caf\\udce9.png"]
    assert pairs.image(0).getpixel((0, 0))[0] == 5


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("Training", "Testing"), ("train", "valid"), ("TRAIN", "validation")]
)
def test_folders_of_splits_go_by_several_names(tmp_path: Path, picture, train: str, test: str) -> None:
    for path in (f"{train}/dog/1.png", f"{train}/cat/1.png", f"{test}/dog/2.png"):
        picture(tmp_path / path)
    source = open_source(f"folder:{tmp_path}")
    assert source.train.classes == ("cat", "dog") and source.test is not None
    assert source.train.ids == [f"{train}/cat/1.png", f"{train}/dog/1.png"] and source.test.ids == [f"{test}/dog/2.png"]


@pytest.mark.parametrize(
    ("above", "named"),
    [("val", "split 'val' but none called 'train'"), ("Test", "split 'Test'"), ("data", "the single folder 'data'")],
)
def test_a_folder_above_the_classes_is_refused_with_the_right_one(
    tmp_path: Path, picture, above: str, named: str
) -> None:
    for name in ("dog", "cat"):
        picture(tmp_path / above / name / "1.png")
    (tmp_path / ".DS_Store").write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"{named}.* name the folder with the class folders, (folder:.*/{above})$"
    ) as caught:
        open_source(f"folder:{tmp_path}")
    advice = str(caught.value).rpartition(", ")[2]
    assert open_source(advice).train.classes == ("cat", "dog")


def test_classes_may_be_called_like_splits(tmp_path: Path, picture) -> None:
    for path in ("train/1.png", "test/1.png", "bus/1.png"):
        picture(tmp_path / path)
    assert open_source(f"folder:{tmp_path}").train.classes == ("bus", "test", "train")
