"""Tables and Flickr30k's files: every row is a pair, an error that names its line, or counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cliperase_fast.data import check_images, open_source
from cliperase_fast.errors import InputError

Captions = list[tuple[str, ...]]


def table(tmp_path: Path, text: str | bytes, options: str = "?sep=,", on_error: str = "raise"):
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(f"csv:{file}{options}", on_error=on_error).train


HEAD = "filepath,title\n"


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        (HEAD + '1.png,"a dog, sitting"\n', [("a dog, sitting",)]),
        (HEAD + '1.png,"a ""big"" dog"\n', [('a "big" dog',)]),
        (HEAD + '1.png,a "big" dog\n', [('a "big" dog',)]),
        (HEAD.replace("\n", "\r\n") + "1.png,a dog\r\n\r\n2.png,a cat\r\n", [("a dog",), ("a cat",)]),
        (HEAD.replace("\n", "\r") + "1.png,a dog\r2.png,a cat\r", [("a dog",), ("a cat",)]),
        ("\ufefffilepath, title\n1.png,a dog", [("a dog",)]),
        (HEAD + "1.png,a dog,,\n\n  \n2.png,a cat\n", [("a dog",), ("a cat",)]),
        (HEAD + "1.png,a\u2028dog\x0bof\x1cours\n", [("a\u2028dog\x0bof\x1cours",)]),
        (HEAD + "1.png,\"['a dog', 'it\\'s \"\"ours\"\"']\"\n", [("a dog", 'it\'s "ours"')]),
        (HEAD + '1.png,"[""a dog"", ""caf\\u00e9""]"\n', [("a dog", "café")]),
        (HEAD + "1.png,[blurred] a dog [left]\n", [("[blurred] a dog [left]",)]),
        (HEAD + "1.png,[a dog]\n", [("[a dog]",)]),
        (HEAD + f"1.png,{'[' * 60_000}{']' * 60_000}\n", [("[" * 60_000 + "]" * 60_000,)]),
        ("\ufeffsep=,\r\n" + HEAD + "1.png,a dog\r\n", [("a dog",)]),
        ('"SEP=,"\n' + HEAD + "1.png,a dog\nsep=,a cat\n", [("a dog",), ("a cat",)]),
        (HEAD + '1.png,"a dog, sitting\n"\n', [("a dog, sitting",)]),
        (HEAD + '1.png,"a cat\n on  grass\r\n\r\nasleep"\n2.png,x\n', [("a cat on grass asleep",), ("x",)]),
        (HEAD + '1.png,"a\u2028dog, x"\n', [("a\u2028dog, x",)]),
    ],
)  # fmt: skip
def test_captions_are_read_completely(tmp_path: Path, text: str, captions: Captions) -> None:
    assert table(tmp_path, text).captions == captions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "1.png,a dog\n2.png,a red apple, a pear and a knife\n", "line 3 has 3 cells .* has 2; .*double quo"),
        (HEAD + "1.png,a, b, c\n", "line 2 has 4 cells"),
        ("id,filepath,title,split\n1,1.png,a dog\n", "line 2 has 3 cells and the header has 4; complete or remove"),
        ("title,filepath\na dog\n", "line 2 has 1 cells and the header has 2"),
        (HEAD + '1.png,"a dog\n2.png,a cat\n3.png,"a pig"\n', r"line 2: quoted text over several lines.*\?quotes=none"),
        (HEAD + '1.png,a dog\n2.png,"a cat', "line 3: .*is a quote not closed|line 3: bad quotes"),
        (HEAD + '1.png,"hello" he said\n', r"line 2: bad quotes .*\?quotes=none"),
        (HEAD + '1.png,"' + "a dog " * 30_000 + '"\n', "line 2: a cell is longer than 131072 characters"),
        ("filepath,title,title\n1.png,a,b\n", "has 2 columns 'title'"),
        ("1.png,a dog\n2.png,a cat\n", r"no column 'filepath'; it has '1\.png', 'a dog'; its first line must name"),
        (HEAD + "1.png,a\0dog\n", r"NUL .*save it as UTF-8 \(line 2\)"),
        (HEAD.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (HEAD.encode("utf-16-le"), "NUL characters; if it is UTF-16"),
        (HEAD.encode() + b"1.png,a dog\n2.png,caf\xe9\n", r"not UTF-8 text; save it as UTF-8 \(line 3\)"),
        (HEAD + "1.png," + "x" * (1 << 20), "more than 1048576 characters"),
        (HEAD + "https://host/1.png,a dog\n", "line 2 names https://host/1.png, which is not a local file"),
        (HEAD + "1.png,\"['a dog' 'a cat']\"\n", "line 2 holds a list of texts without commas"),
        (HEAD + "1.png,\"['a dog', '']\"\n", "line 2 holds a list in which a caption is empty"),
        (HEAD + "1.png,\"['a dog', None]\"\n", "line 2 holds a list in which a caption is a NoneType"),
        (HEAD + "1.png,[]\n", "line 2 holds a list in which a caption is empty"),
        (HEAD + '1.png,"[""a"", ""\\ud800""]"\n', "contains half a character"),
        (HEAD + ",,\n", "line 2 names no image"),
        ("sep=,\n" + HEAD + ",,\n", "line 3 names no image"),
        (HEAD + '1.png,"a dog\n2.png,a cat\n3.png,6"\n', "line 2: quoted text over several lines"),
        (HEAD + '1.png,"a cat,\nasleep"\n', "line 2: quoted text over several lines.* separator on one line"),
        (HEAD + "1.png,\"['a dog'\n 'a cat']\"\n", "line 2 holds a list of texts without commas"),
        (HEAD + "1.png,\u200b\u200d \ufeff\n", r"line 2 has a caption that is empty, for 1\.png"),
        ('{"images": [{"file_name": "1.png"}]}', "no column 'filepath'.*this is JSON; write .* as a table"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"t\.csv.*{message}"):
        table(tmp_path, text)


def test_quotes_can_be_part_of_the_text(tmp_path: Path) -> None:
    text = 'filepath\ttitle\n1.png\t"hello" he said\n2.png\tan 8" pipe\n3.png\t"open\n'
    captions = [('"hello" he said',), ('an 8" pipe',), ('"open',)]
    assert table(tmp_path, text, "?quotes=none").captions == captions
    with pytest.raises(InputError, match="quotes='single' is not one of double, none"):
        table(tmp_path, text, "?quotes=single")


def test_rows_left_out_are_counted_with_their_line(tmp_path: Path) -> None:
    text = HEAD + "1.png,a dog\n2.png,a, b\n3.png\n,a cat\n4.png, \n5.png,x, y\n1.png,a dog\n6.png,a pig\n"
    pairs = table(tmp_path, text, on_error="skip")
    assert pairs.captions == [("a dog",), ("a pig",)]
    assert {reason: row["count"] for reason, row in pairs.intake.skipped.to_dict().items()} == {
        "row with too many cells": 2,
        "row with too few cells": 1,
        "row without an image": 1,
        "empty caption": 1,
    }
    assert "t.csv line 3 has 3 cells" in pairs.intake.skipped.examples["row with too many cells"]
    assert pairs.intake.ignored.counts == {"repeated row": 1}
    with pytest.raises(InputError, match=r"has no row that can be used: all 1 were left out .*line 2"):
        table(tmp_path, HEAD + "1.png,a, b\n", on_error="skip")


def test_paths_count_from_the_root_that_is_given(tmp_path: Path, picture) -> None:
    picture(tmp_path / "far" / "1.png", shade=7)
    text = HEAD + "1.png,a dog\n"
    with pytest.raises(InputError, match=r"1\.png does not exist; .*add '\?root=DIR'"):
        check_images(table(tmp_path, text))
    image = table(tmp_path, text, f"?sep=,&root={tmp_path / 'far'}").image(0)
    assert image.getpixel((0, 0))[0] == 7
    with pytest.raises(InputError, match=r"root='/gone' is not a directory"):
        table(tmp_path, text, "?sep=,&root=/gone")


def test_paths_may_be_written_as_urls_from_home_or_for_windows(
    tmp_path: Path, picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    picture(tmp_path / "home" / "1.png", shade=1)
    picture(tmp_path / "a b" / "2.png", shade=2)
    picture(tmp_path / "a b" / "3\\3.png", shade=3)  # a name that holds a backslash stays what it is
    rows = ["~/1.png", f"file://{tmp_path}/a%20b/2.png", f"FILE://localhost{tmp_path}/a b/2.png", "a b\\2.png"]
    rows += ["a b/3\\3.png"]
    pairs = table(tmp_path, HEAD + "".join(f"{path},a dog {number}\n" for number, path in enumerate(rows)))
    assert [pairs.image(index).getpixel((0, 0))[0] for index in range(5)] == [1, 2, 2, 2, 3]
    with pytest.raises(InputError, match=r"a b\\4\.png does not exist"):
        check_images(table(tmp_path, HEAD + "a b\\4.png,a dog\n"))


# --- Flickr30k


@pytest.fixture
def flickr(tmp_path: Path, picture):
    for number in range(3):
        picture(tmp_path / "Images" / f"{number}.jpg")

    def write(name: str, text: str, on_error: str = "raise"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return open_source(f"flickr30k:{tmp_path}", on_error=on_error)

    return write


def test_kaggles_captions_are_read_with_their_commas(flickr) -> None:
    text = 'image,caption\n0.jpg,A dog , a cat .\n0.jpg,"Two dogs, one ""big"" ."\n1.jpg,"Hi" he said .\n'
    pairs = flickr("captions.txt", text).train
    assert pairs.captions == [("A dog , a cat .", 'Two dogs, one "big" .'), ('"Hi" he said .',)]
    assert pairs.image(0).size == (6, 8)
    assert pairs.intake.ignored.counts == {"image without a caption for training or testing": 1}
    three = "image_name,comment_number,comment\n0.jpg,0,A dog, a cat\n"
    assert flickr("captions.txt", three).train.captions == [("A dog, a cat",)]


def test_token_files_are_read(flickr) -> None:
    text = "0.jpg#0\tA dog # one\n0.jpg#1\tA pet\n1.jpg#0\tA cat\twith a tab\n"
    pairs = flickr("results_20130124.token", text).train
    assert pairs.captions == [("A dog # one", "A pet"), ("A cat\twith a tab",)]
    with pytest.raises(InputError, match=r"\.token line 2 is not 'image\.jpg#0<tab>caption'"):
        flickr("results_20130124.token", "0.jpg#0\tA dog\n1.jpg A cat\n")
    pairs = flickr("results_20130124.token", "0.jpg#0\tA dog\n1.jpg A cat\n", "skip").train
    assert len(pairs) == 1 and pairs.intake.skipped.counts == {"line of another form": 1}


def test_captions_as_a_list_in_one_cell_are_read_with_their_splits(flickr) -> None:
    rows = "".join(
        f'"{json.dumps([f"caption {k} of {n}" for k in range(5)]).replace(chr(34), chr(34) * 2)}",{split},{n}.jpg\n'
        for n, split in enumerate(["train", "test", "val"])
    )
    source = flickr("flickr_annotations_30k.csv", "raw,split,filename\n" + rows)
    assert source.test is not None
    assert source.train.captions == [tuple(f"caption {k} of 0" for k in range(5))]
    assert source.test.ids == ["1.jpg"]
    assert source.train.intake.ignored.counts["image of the split 'val', which is not used"] == 1


def karpathy(*images: tuple[str, str, list[str]]) -> str:
    return json.dumps(
        {
            "images": [
                {"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]}
                for name, split, texts in images
            ]
        }
    )


def test_karpathys_faults_are_named_or_counted(flickr) -> None:
    good = ("0.jpg", "train", ["a dog"])
    for bad, message in [
        (("0.jpg", "test", ["again"]), r"names the image 0\.jpg twice"),
        (("1.jpg", "dev", ["a cat"]), r"image 1\.jpg, has the split 'dev', which is not one of train"),
        (("1.jpg", "train", ["a cat", " "]), r"empty caption or none for 1\.jpg"),
        (("1.jpg", "train", ["\ud800"]), r"unusable caption \(caption is not Unicode\) for 1\.jpg"),
    ]:
        with pytest.raises(InputError, match=message):
            flickr("dataset_flickr30k.json", karpathy(good, bad))
        pairs = flickr("dataset_flickr30k.json", karpathy(good, bad), "skip").train
        assert pairs.captions == [("a dog",)] and len(pairs.intake.skipped) == 1
    with pytest.raises(InputError, match=r"not Karpathy's format.*RecursionError"):
        flickr("dataset_flickr30k.json", "[" * 200_000)


def test_the_folder_with_most_images_is_taken_and_other_files_are_counted(tmp_path: Path, flickr, picture) -> None:
    picture(tmp_path / "0.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\n0.jpg,x\n")
    pairs = flickr("results.csv", "0.jpg| 0| a\n1.jpg| 0| b\n2.jpg| 0| c\n").train
    assert check_images(pairs)[0].tolist() == [0, 1, 2]
    assert pairs.intake.ignored.counts["caption file that is not used"] == 1


@pytest.mark.parametrize("name", ["dataset_coco.json", "dataset_flickr30k.json"])
def test_karpathys_subfolders_are_part_of_the_path(tmp_path: Path, flickr, picture, name: str) -> None:
    picture(tmp_path / "val2014" / "0.jpg", shade=40)
    images = [
        {"filepath": "val2014", "filename": "0.jpg", "split": "train", "sentences": [{"raw": "a dog"}]},
        {"filepath": "Images", "filename": "0.jpg", "split": "restval", "sentences": [{"raw": "a cat"}]},
    ]
    pairs = flickr(name, json.dumps({"images": images})).train
    assert pairs.ids == ["val2014/0.jpg", "Images/0.jpg"]
    assert len(check_images(pairs)[0]) == 2


def test_cocos_own_captions_are_refused_with_what_is_read(flickr) -> None:
    with pytest.raises(InputError, match=r"Karpathy's dataset_coco\.json; use csv:FILE"):
        flickr("captions_val2014.json", "{}")
