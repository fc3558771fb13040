"""`cliperase-fast ledger` and `cliperase-fast apply` on a tiny model and a folder of flat colours."""

import io
import json
import shutil
import tarfile

import pytest
from colours import MODEL
from PIL import Image

from cliperase_fast import Ledger, cli
from cliperase_fast.ledger import Entry
from cliperase_fast.ledger.checking import above_target
from cliperase_fast.ledger.deltas import digest_of, state_of
from cliperase_fast.models import load_model

SETTINGS = ["--steps", "2", "--learning-rate", "1e-3", "--batch-size", "8", "--quiet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the model `base`, pictures in `data`, and `ledger`, in which two requests were made."""
    root = tmp_path_factory.mktemp("ledger")
    load_model(MODEL).save(root / "base")
    for colour in ("red", "green", "blue"):
        for split, count in (("train", 6), ("test", 4)):
            (root / "data" / split / colour).mkdir(parents=True)
            for shift in range(count):
                picture = Image.new("RGB", (8, 8), colour)
                picture.putpixel((shift, 0), (9, 9, 9))
                picture.save(root / "data" / split / colour / f"{shift}.png")
    with tarfile.open(root / "shard.tar", "w") as shard:
        for number, picture in enumerate(sorted((root / "data" / "train" / "blue").iterdir())):
            shard.add(picture, f"{number}.png")
            caption = tarfile.TarInfo(f"{number}.txt")
            caption.size = 1
            shard.addfile(caption, io.BytesIO(b"x"))
    assert cli.main(["ledger", "start", str(root / "ledger"), "--model", f"local-dir:{root / 'base'}"]) == 0
    for colour in ("red", "green"):
        words = ["--data", f"folder:{root / 'data'}", "--forget", f"class:{colour}", "--id", colour, "--by", "Ann"]
        assert cli.main(["ledger", "forget", str(root / "ledger"), *words, *SETTINGS]) in (0, 1)
    return root


def run(*words):
    return cli.main(["ledger", *map(str, words)])


def weights_of(folder):
    return digest_of(state_of(load_model(f"local-dir:{folder}").module))


def test_requests_are_recorded_with_what_was_selected(world):
    ledger = Ledger(world / "ledger")
    assert [entry.id for entry in ledger.entries] == ["base", "red", "green"]
    content = ledger.entries[-1].content
    assert content["selection"]["forget"] == f"folder:{world / 'data'}#class:green" and content["by"] == "Ann"
    assert content["settings"]["method"] == "calibrated" and content["settings"]["steps"] == 2
    assert ledger.entries[-1].audits.keys() == {"red", "green"}  # the pairs were opened again
    assert list(ledger.entries[-1].prepared) == ["red"]


def test_the_list_and_the_head_are_printed(world, capsys):
    assert run("list", world / "ledger") == 0
    told = capsys.readouterr().out
    assert "class:red" in told and told.count("in force") == 2
    assert run("head", world / "ledger") == 0
    assert capsys.readouterr().out == f"{Ledger(world / 'ledger').head()}\n"


def test_the_hashes_are_verified(world, capsys):
    head = Ledger(world / "ledger").head()
    assert run("verify", world / "ledger", "--head", head, "--quiet") == 0
    assert run("verify", world / "ledger", "--head", "0" * 64, "--quiet") == 1
    assert "does not have the head" in capsys.readouterr().err


def test_files_that_no_line_names_are_noted(world, tmp_path, capsys):
    shutil.copytree(world / "ledger", tmp_path / "ledger")
    (tmp_path / "ledger" / "audits" / "0003-blue.json").write_text("{}")
    assert run("verify", tmp_path / "ledger", "--quiet") == 0
    told = capsys.readouterr().out
    assert "all hashes" in told and told.count("note: ") == told.count("names audits/0003-blue.json") == 1


@pytest.mark.parametrize(
    ("entry", "before", "says"),
    [
        (("forget", "red"), None, "request red did not reach its target: its pairs are still known"),
        (("undo", "undo-green"), False, "request red is above its target, as it was before"),
        (("undo", "undo-green"), True, "request red is above its target: its pairs are known again"),
        (("undo", "undo-green"), None, "request red is above its target"),
    ],
)
def test_a_request_above_its_target_is_told_apart_from_one_that_returned(entry, before, says):
    earlier = [
        Entry(0, "", {"kind": "base"}),
        Entry(1, "", {"kind": "forget", "id": "red", "audits": {"red": {"at_target": before}}}),
        Entry(2, "", {"kind": "forget", "id": "green", "audits": {}}),
    ]
    last = Entry(3, "", {"kind": entry[0], "id": entry[1], "audits": {"red": {"at_target": False}}})
    assert above_target([*earlier, last], last, "red") == says


def test_an_undone_ledger_says_that_a_request_never_reached_its_target(world, tmp_path, capsys):
    shutil.copytree(world / "ledger", tmp_path / "ledger")
    assert Ledger(tmp_path / "ledger").entries[1].returned == ["red"]  # two steps forget nothing
    assert run("undo", tmp_path / "ledger", "green", "--progress", "lines") == 1
    told = capsys.readouterr()
    for text in (told.out, told.err):
        assert "request red is above its target, as it was before" in text and "again" not in text


def test_the_current_model_is_saved(world, tmp_path):
    assert run("model", world / "ledger", "--output", tmp_path / "own", "--quiet") == 0
    assert weights_of(tmp_path / "own") == Ledger(world / "ledger").entries[-1].weights
    assert run("model", world / "ledger", "--output", tmp_path / "hf", "--library", "transformers", "--quiet") == 0
    assert (tmp_path / "hf" / "config.json").is_file()


def test_a_patch_is_exported_and_applied_to_its_base_only(world, tmp_path, capsys):
    assert run("export", world / "ledger", "red", "--output", tmp_path / "patch", "--quiet") == 0
    told = json.loads((tmp_path / "patch" / "patch.json").read_text())
    base, other = f"local-dir:{world / 'base'}", f"local-dir:{tmp_path / 'result'}"
    words = ["apply", str(tmp_path / "patch"), "--output"]
    assert cli.main([*words, str(tmp_path / "result"), "--model", base]) == 0
    assert weights_of(tmp_path / "result") == told["weights"] == Ledger(world / "ledger").entries[1].weights
    assert cli.main([*words, str(tmp_path / "again"), "--model", other]) == 2
    assert "is not the base of" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_a_request_is_undone(world, tmp_path, capsys):
    shutil.copytree(world / "ledger", tmp_path / "ledger")
    assert run("undo", tmp_path / "ledger", "green", "--note", "a mistake", "--date", "2026-04-01", "--quiet") in (0, 1)
    assert "undone 2026-04-01" in capsys.readouterr().out
    assert run("report", tmp_path / "ledger") == 0
    assert "a mistake" in (tmp_path / "ledger" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("head", "{tmp}/none"), "is not a ledger; `cliperase-fast ledger start"),
        (("undo", "{world}/ledger", "pink"), "has no request 'pink'"),
        (
            (
                "forget",
                "{world}/ledger",
                "--data",
                "folder:{world}/data",
                "--forget",
                "class:blue",
                "--undoable",
                "pink",
            ),
            "has no request 'pink'",
        ),
        (
            (
                "forget",
                "{world}/ledger",
                "--data",
                "folder:{world}/data",
                "--forget",
                "class:blue",
                "--undoable",
                "red, pink",
                "--quiet",
            ),
            "has no request 'pink'",
        ),
        (
            (
                "forget",
                "{world}/ledger",
                "--data",
                "folder:{world}/data",
                "--forget",
                "class:blue",
                "--retain",
                "stream:{world}/shard.tar",
                "--quiet",
            ),
            "is a stream, whose pairs a ledger cannot know again",
        ),
        (("export", "{world}/ledger", "red", "--output", "{world}/data"), "holds something else"),
        (("model", "{world}/ledger", "--output", "{world}/data"), "is in use: give a new folder"),
        (("verify", "{world}/ledger", "--model", "absent"), "absent"),
        (("start", "{world}/data", "--model", "local-dir:{world}/base"), "is not a ledger and holds other files"),
    ],
)
def test_wrong_input_is_one_line(world, tmp_path, capsys, words, says):
    assert run(*(word.format(world=world, tmp=tmp_path) for word in words)) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
