"""Looking at data before anything is trained: `inspect_data()` and the command `inspect`."""

import json
import shutil
import tarfile

import pytest
from models.tiny_models import picture

import cliperase_fast as cf
from cliperase_fast import cli
from cliperase_fast.errors import InputError
from cliperase_fast.report import class_table


@pytest.fixture
def folder(tmp_path):
    """12 pictures in three classes and two splits; one is damaged, one occurs twice, one is in both splits."""
    root = tmp_path / "data"
    for number in range(12):
        name = ("cat", "dog", "owl")[number % 3]
        path = root / ("test" if number > 8 else "train") / name / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (root / "train" / "dog" / "04.png").write_bytes(b"not an image")
    shutil.copy(root / "train" / "owl" / "02.png", root / "train" / "owl" / "copy.png")
    shutil.copy(root / "train" / "cat" / "00.png", root / "test" / "cat" / "again.png")
    return root


def test_sets_classes_duplicates_and_unreadable_images_are_counted(folder):
    found = cf.inspect_data(f"folder:{folder}", "class:cat")
    content = found.content
    assert {name: row["pairs"] for name, row in content["sets"].items()} == {
        "forget": 3, "retain": 7, "forget test": 2, "retain test": 2
    }  # fmt: skip
    assert content["classes"]["owl"] == {"forget": 0, "retain": 4, "forget test": 0, "retain test": 1}
    assert content["unreadable"]["count"] == 1 and "04.png" in content["unreadable"]["examples"][0]
    assert sorted(map(sorted, content["duplicates"]["examples"])) == [
        ["test/cat/again.png (forget test)", "train/cat/00.png (forget)"],
        ["train/owl/02.png (retain)", "train/owl/copy.png (retain)"],
    ]
    assert "1 image is in forget and in forget test" in content["notes"]
    assert content["longest"][0]["caption"] == "a photo of a cat"
    assert content["read"] == content["images"] == 14
    text = found.text()
    assert "04.png" in text and "train/owl/copy.png" in text and "owl" in text


def test_of_many_equal_images_the_first_are_named(tmp_path):
    for number in range(9):
        path = tmp_path / "train" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(path)
    found = cf.inspect_data(f"folder:{tmp_path}")
    assert [len(group) for group in found.content["duplicates"]["examples"]] == [9]
    (line,) = [line for line in found.text().splitlines() if "the same" in line]
    assert line.count(".png") == 6 and line.endswith(" = 3 more")
    assert "= 3 more" in found.sheet()


def test_names_cannot_break_lines_or_colour_the_terminal(tmp_path):
    (tmp_path / "table.csv").write_text('filepath\ttitle\na.png\t"a \x1b[31mcat\nand more"\nb.png\ta dog\n')
    for name in "ab":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    text = cf.inspect_data(f"csv:{tmp_path / 'table.csv'}").text()
    assert "a.png: a \\x1b[31mcat" in text and "\x1b" not in text and "and more" in text
    assert len([line for line in text.splitlines() if " characters " in line]) == 2
    table = class_table({"a \x1b[31mcat": {"set": "all", "pairs": 1, "accuracy": 1.0}})
    assert "\\x1b[31mcat" in table and "\x1b" not in table


def test_without_a_forget_set_the_splits_are_shown_and_few_images_suffice(folder):
    found = cf.inspect_data(f"folder:{folder}", images=2)
    assert {name: row["pairs"] for name, row in found.content["sets"].items()} == {"train": 10, "test": 4}
    assert found.content["read"] == 4 < found.content["images"]


def test_pairs_in_both_sets_are_counted(tmp_path):
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    picture(2).save(tmp_path / "2.png")
    (tmp_path / "t.csv").write_text("filepath\ttitle\n0.png\ta red car\n1.png\ta dog\n1.png\ta red dog\n2.png\ta hat\n")
    found = cf.inspect_data(f"csv:{tmp_path}/t.csv", "caption:car", retain="caption:red,dog,car")
    assert found.content["overlap"] == 1
    assert found.content["classes"] == {} and "no classes" in found.text()


def test_the_command_prints_json_and_writes_a_page_without_training(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    words = ["inspect", "--data", f"folder:{folder}", "--forget", "class:owl", "--quiet"]
    assert cli.main([*words, "--json", "--output", str(page)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["sets"]["forget"]["pairs"] == 4
    text = page.read_text()
    assert text.count("data:image/jpeg") == 13 and "04.png cannot be read" in text and "a photo of a owl" in text
    assert cli.main([*words[:4], "class:zebra"]) == 2
    assert "no class 'zebra'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["images", "seed"])
def test_a_negative_number_is_refused(name):
    with pytest.raises(InputError, match=f"{name}=-1"):
        cf.inspect_data("demo", **{name: -1})


def test_a_source_with_a_selector_is_refused():
    with pytest.raises(InputError, match="data='demo#class:one' has a selector"):
        cf.inspect_data("demo#class:one")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"forget": ["class:seven"]}, "forget is a list; give a string such as"),
        ({"forget": "class:seven", "retain": None}, "retain is a NoneType; give a string such as"),
    ],
)
def test_arguments_of_other_types_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        cf.inspect_data("demo", **wrong)


def test_pairs_in_place_of_a_source_are_refused():
    with pytest.raises(InputError, match="data is a list; name a source by a string such as 'folder:DIR'"):
        cf.inspect_data([(None, "a cat")])


def test_of_a_stream_the_head_is_shown_and_called_so(folder, tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(12):
            picture(number + 20).save(tmp_path / "image.png")
            (tmp_path / "caption").write_text(f"a picture {number}")
            tar.add(tmp_path / "image.png", f"{number:02d}.png")
            tar.add(tmp_path / "caption", f"{number:02d}.txt")
    stream = f"stream:{tmp_path}/0.tar?head=10"
    words = ["inspect", "--data", f"folder:{folder}", "--forget", "class:cat", "--retain", stream]
    for shown in (words, ["inspect", "--data", stream]):
        assert cli.main(shown) == 0
        assert f"only the head of {stream} was looked at: 10 pairs" in capsys.readouterr().out
