"""`cliperase-fast audit` on tiny models and a folder of flat colours."""

import json

import pytest
from PIL import Image
from small import make_model, without_red

from cliperase_fast import auditing, cli
from cliperase_fast.models import load_model

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the models `before`, `after` and `oracle`, and `data`."""
    root = tmp_path_factory.mktemp("audit")
    for name, model in (("before", make_model()), ("after", without_red()), ("oracle", without_red(1))):
        load_model(model).save(root / name)
    for split, count in (("train", 6), ("test", 4)):
        for colour in COLOURS:
            (root / "data" / split / colour).mkdir(parents=True)
            for shift in range(count):
                picture = Image.new("RGB", (8, 8), colour)
                picture.putpixel((shift, 0), (9, 9, 9))
                picture.save(root / "data" / split / colour / f"{shift}.png")
    return root


def words(world, **changes):
    flags = {
        "before": f"local-dir:{world / 'before'}", "after": f"local-dir:{world / 'after'}",
        "data": f"folder:{world / 'data'}", "forget": "class:red", **changes,
    }  # fmt: skip
    return ["audit", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), "--quiet"]


@pytest.mark.filterwarnings("ignore:oracle 1 seems to know")  # a plain red answers to its name in any small model
def test_an_audit_prints_its_verdicts_and_scores_and_where_the_files_are(world, tmp_path, capsys):
    output = tmp_path / "audit"
    oracle = f"local-dir:{world / 'oracle'}"
    assert cli.main(words(world, oracle=oracle, output=output)) == 0
    told = capsys.readouterr().out
    content = json.loads((output / "audit.json").read_text())
    assert all(verdict in told for verdict in content["verdicts"].values())
    assert {"before", "after", "oracle", "oracle 1"} == set(content["scores"])
    assert f"audit    {output / 'audit.json'}" in told.splitlines()
    assert len(list(output.iterdir())) == told.count(str(output)), "every file is named"

    assert cli.main([*words(world, oracle=oracle, output=output), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((output / "audit.json").read_text()) == content


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"before": "absent-model"}, "absent-model"),
        ({"forget": "class:rd"}, "red"),
        ({"data": "folder:absent-data"}, "absent-data"),
        ({"output": "{tmp}/file"}, "--output={tmp}/file is a file"),
        ({"output": "{tmp}/used"}, "--output={tmp}/used holds other files"),
        ({"output": "{tmp}/file/below"}, "--output={tmp}/file/below"),
        ({"holdout": "association"}, "--holdout='association' is not NAME=SOURCE"),
        ({"holdout": "facts=demo"}, "'facts'"),
        ({"other": "=demo"}, "--other='=demo' is not NAME=SOURCE"),
        ({"synonyms": "{tmp}/synonyms.yaml"}, "'rouge', which is not a class"),
        ({"synonyms": "{tmp}/empty.yaml"}, "synonyms['red'] is ''; give a list of texts"),
        ({"synonyms": "{tmp}/null.json"}, "synonyms['red'] is None; give a list of texts"),
        ({"synonyms": "{tmp}/absent.yaml"}, "the synonyms file {tmp}/absent.yaml"),
        ({"template": "a photo"}, "a photo"),
        ({"batch-size": 0}, "--batch-size 0"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_input_is_one_line_and_leaves_the_disk_as_it_was(world, tmp_path, capsys, changes, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "synonyms.yaml").write_text("rouge: [crimson]\n")
    (tmp_path / "empty.yaml").write_text("red:\n")
    (tmp_path / "null.json").write_text('{"red": null}')
    before = sorted(tmp_path.rglob("*"))
    changes = {name: str(value).replace("{tmp}", str(tmp_path)) for name, value in changes.items()}
    assert cli.main(words(world, **{"output": tmp_path / "new", **changes})) == 2
    told = capsys.readouterr()
    assert says.replace("{tmp}", str(tmp_path)) in told.err
    assert told.err.startswith("cliperase-fast: ") and told.err.count("\n") == 1
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_two_sources_under_one_name_are_refused(world, capsys):
    assert cli.main([*words(world, other="digits=demo"), "--other", "digits=shapes"]) == 2
    assert "--other names 'digits' twice" in capsys.readouterr().err


class Recorded:
    """Stands in for `audit()` and keeps its arguments."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(auditing, "audit", self)

    def __call__(self, *models_and_sets, **options):
        self.given, self.options = models_and_sets, options
        return self

    def summary(self):
        return "done"


def test_the_flags_are_the_arguments_of_audit(world, tmp_path, monkeypatch):
    recorded = Recorded(monkeypatch)
    (tmp_path / "names.yaml").write_text("red: [crimson, 7, 07, no, 12:30]\n")
    more = ["--retain", "class:green,blue", "--oracle", "a", "--oracle", "b", "--other", "digits=demo?x=1"]
    more += ["--holdout", "association=demo#class:one", "--holdout", "identity=demo#class:two", "--depth"]
    more += ["--template", "a {}", "--template", "the {}", "--test-data", "shapes", "--seed", "3", "--batch-size", "7"]
    more += ["--test-fraction", "0.4"]
    more += ["--on-error", "skip", "--long-captions", "truncate"]
    assert cli.main([*words(world, synonyms=tmp_path / "names.yaml"), *more]) == 0
    data = f"folder:{world / 'data'}"
    assert recorded.given[2:] == (f"{data}#class:red", f"{data}#class:green,blue")
    assert recorded.options == {
        "oracle": ["a", "b"], "test": "shapes", "synonyms": {"red": ["crimson", "7", "07", "no", "12:30"]},
        "other": {"digits": "demo?x=1"},
        "holdouts": {"association": "demo#class:one", "identity": "demo#class:two"}, "templates": ["a {}", "the {}"],
        "test_fraction": 0.4,
        "depth": True, "output_dir": None, "seed": 3, "long_captions": "truncate", "on_error": "skip",
        "batch_size": 7, "device": "auto", "precision": "fp32",
        "progress": False,
    }  # fmt: skip
    assert cli.main([*words(world), "--depth", "full"]) == 0
    assert recorded.given[3] == "rest"
    assert recorded.options["depth"] == "full"
    assert recorded.options["synonyms"] is recorded.options["other"] is recorded.options["oracle"] is None


@pytest.mark.parametrize("file", ["audit.json", "checkpoints/step-00000001/state.json"])
def test_the_folder_of_an_earlier_audit_or_of_a_run_is_accepted(world, tmp_path, monkeypatch, file):
    recorded = Recorded(monkeypatch)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert cli.main(words(world, output=tmp_path)) == 0
    assert recorded.options["output_dir"] == tmp_path
