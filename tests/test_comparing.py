"""`compare()`: several methods on the same model and pairs."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import torch

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError, cli, comparing
from cliperase_fast.unlearning.methods import ClosedFormMethod, TrainingMethod, registry

sys.path.append(str(Path(__file__).parent / "auditing"))
from small import make_model, training_and_test, without_red

FORGET, RETAIN, TESTS = training_and_test()
SETTINGS = {"epochs": 1, "batch_size": 12, "learning_rate": 1e-3, "report": False, "progress": False}


class Shift(ClosedFormMethod):
    """Changes two numbers of one tensor."""

    name, summary, source = "shift", "change two numbers", "a test"

    def edit(self, run, evaluate):
        dict(run.student.module.named_parameters())["text_projection"][0, :2] += 1.0


class Broken(TrainingMethod):
    name, summary, source = "broken", "fails in its first step", "a test"

    def objective(self, run):
        raise RuntimeError("this method is broken")


@pytest.fixture(autouse=True, scope="module")
def two_more_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_METHODS", {**registry._METHODS, "shift": Shift, "broken": Broken})
        yield


def compare(folder, methods=("shift", "retain_finetune"), **changes):
    return cf.compare(
        make_model(), FORGET, RETAIN, test=TESTS, methods=methods, output_dir=folder, **{**SETTINGS, **changes}
    )


@pytest.fixture(scope="module")
def compared(two_more_methods, tmp_path_factory):
    """A comparison of three methods, one of which is broken, with two oracles."""
    oracles = [without_red(1), without_red(2)]
    methods = ["broken", "shift", "retain_finetune"]
    return compare(tmp_path_factory.mktemp("compared") / "runs", methods, oracle=oracles, oracle_seconds=3.0)


def test_every_method_gets_a_run_an_audit_and_an_entry(compared):
    for name in ("shift", "retain_finetune"):
        entry, audit = compared.methods[name], cf.Audit.load(compared.folder / name)
        for score in ("association", "zero_shot_top1"):
            assert entry["scores"][score] == audit.scores["after"]["forgetting"][score]
        assert entry["gap"] == audit.gap["mean"] and entry["seconds"] > 0
        of_oracles = compared.content["models"]["oracle"]["association"]
        assert of_oracles == audit.scores["oracle"]["forgetting"]["association"]
    saved = json.loads((compared.folder / "compare.json").read_text())
    assert saved == compared.content
    assert "shift" in (compared.folder / "compare.html").read_text()
    assert all(name in compared.summary() for name in ("shift", "retain_finetune", "2 oracles, mean"))


def test_the_size_of_the_change_is_that_of_the_numbers_that_differ(compared):
    entry = compared.methods["shift"]
    assert entry["changed_mib"] == pytest.approx(2 * 4 / 2**20)
    assert entry["peak_mib"] is None or entry["peak_mib"] >= 0


def test_a_failed_method_is_listed_and_the_others_go_on(compared):
    assert compared.failed == {"broken": "RuntimeError: this method is broken"}
    assert "scores" in compared.methods["shift"]
    assert "broken has no result" in compared.summary()
    assert "this method is broken" in (compared.folder / "compare.html").read_text()


def test_a_setting_that_a_method_does_not_use_is_left_out_for_it(compared):
    assert {"learning_rate", "epochs", "batch_size"} <= set(compared.methods["shift"]["left_out"])
    assert not set(compared.methods["retain_finetune"]["left_out"]) & {"learning_rate", "epochs", "batch_size"}
    config = json.loads((compared.folder / "retain_finetune" / "config.json").read_text())
    assert config["learning_rate"] == SETTINGS["learning_rate"]


@pytest.fixture
def recipe_of_shift(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "shift.yaml").write_text("method: shift\nselect: divergence\nretain_floor: 0.5\n")
    monkeypatch.setattr(cf.config, "RECIPES", tmp_path / "recipes")


def test_methods_start_from_their_recipes_and_settings_win(recipe_of_shift, tmp_path, monkeypatch):
    used = []

    def stop(*_, config, **__):
        used.append(config)
        raise InputError("enough")

    monkeypatch.setattr(comparing, "unlearn", stop)
    for number, changes in enumerate(({}, {"retain_floor": 0.1}, {"recipes": False})):
        found = compare(tmp_path / f"runs{number}", ["shift"], **changes)
    assert (found.content["inputs"]["recipes"], found.content["inputs"]["oracle"]) == (False, None)
    recipe = {"method": "shift", "select": "divergence", "retain_floor": 0.5}
    audited = {"audit": True, "report": False}
    assert used == [{**recipe, **audited}, {**recipe, "retain_floor": 0.1, **audited}, {"method": "shift", **audited}]
    with pytest.raises(InputError, match="was made with recipes=False, not True"):
        compare(tmp_path / "runs2", ["shift"])


def test_the_same_call_continues_and_repeats_what_failed(tmp_path, monkeypatch):
    first = compare(tmp_path / "runs", ["broken", "shift"])
    called = []
    own = comparing.unlearn

    def watched(*arguments, **options):
        called.append(options["config"]["method"])
        return own(*arguments, **options)

    monkeypatch.setattr(comparing, "unlearn", watched)
    monkeypatch.setattr(Broken, "objective", registry._METHODS["retain_finetune"].objective)
    second = compare(tmp_path / "runs", ["broken", "shift"])
    assert called == ["broken"]
    assert not second.failed and second.methods["shift"] == first.methods["shift"]


def test_the_same_call_continues_after_an_interruption_in_the_first_method(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shift, "edit", interrupted)
        compare(tmp_path / "runs", ["shift"])
    assert "scores" in compare(tmp_path / "runs", ["shift"]).methods["shift"]


@pytest.mark.parametrize("file", ["compare.json", "compare.html"])
def test_a_full_disk_is_one_line_and_the_same_call_goes_on(tmp_path, monkeypatch, file):
    write = comparing.write_text_atomically

    def full(path, text):
        if path.name == file and path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    compare(tmp_path / "runs", ["broken"])
    kept = (tmp_path / "runs" / file).read_text()
    monkeypatch.setattr(comparing, "write_text_atomically", full)
    with pytest.raises(UnlearningError, match=f"cannot write .*{file}.*; the same call continues"):
        compare(tmp_path / "runs", ["shift"])
    assert (tmp_path / "runs" / file).read_text() == kept
    monkeypatch.setattr(comparing, "write_text_atomically", write)
    assert "scores" in compare(tmp_path / "runs", ["shift"]).methods["shift"]
    assert "shift" in (tmp_path / "runs" / file).read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"methods": ["shift", "shfit"]}, "methods='shfit' is not one of .*did you mean 'shift'"),
        ({"methods": [3]}, "methods holds 3: give names"),
        ({"methods": []}, "methods is empty"),
        ({"methods": 3}, "methods is a int; give a list of names, or 'all'"),
        ({"config": {"method": "slug"}}, "config is for the method 'slug', which is not compared: add it to methods="),
        (
            {"config": {"method": "slug", "method_options": {"evaluations": 3}}},
            "config sets options of the method 'slug'",
        ),
        ({"config": 3}, "config is a int; pass a mapping, an UnlearnConfig or a file"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"audit": False}, "audit= is not for compare"),
        ({"method_options": {}}, "method_options= is not for compare"),
        ({"depth": "deep"}, "depth='deep' must be"),
        ({"oracle_seconds": 0.0}, "oracle_seconds=0.0 must be positive"),
        ({"oracle_seconds": float("inf")}, "oracle_seconds=inf must be positive"),
        ({"oracle_seconds": "3 s"}, "oracle_seconds=3 s must be positive"),
        ({"oracle": [torch.nn.Linear(2, 2)]}, "oracle 1: "),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_wrong_input_is_an_error_before_work(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        compare(tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="compare runs in one process"):
        compare(tmp_path / "runs")


def test_a_folder_of_other_files_or_of_another_comparison_is_refused(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        compare(folder)
    (folder / "notes.txt").unlink()
    compare(folder, ["shift"])
    with pytest.raises(InputError, match=r"was made with settings=.*continue"):
        compare(folder, ["shift"], seed=5)
    (folder / "compare.json").write_text("[]")
    with pytest.raises(InputError, match="is not a comparison"):
        compare(folder, ["shift"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": without_red}, "other weights of the model"),
        ({"oracle": [lambda: without_red(2)]}, "other weights of the oracle 1"),
        ({"retain": RETAIN[1:]}, "other pairs"),
    ],
)
def test_a_comparison_is_not_continued_with_another_model_or_other_pairs(tmp_path, changed, says):
    given = {"model": make_model, "oracle": [lambda: without_red(1)], "retain": RETAIN}

    def again(methods, **changes):
        now = {**given, **changes}
        oracles = [make() for make in now["oracle"]]
        return cf.compare(
            now["model"](), FORGET, now["retain"], test=TESTS, methods=methods, output_dir=tmp_path / "runs",
            oracle=oracles, **SETTINGS,
        )  # fmt: skip

    again(["shift"])
    saved = (tmp_path / "runs" / "compare.json").read_bytes()
    with pytest.raises(InputError, match=f"compare.json was made with {says}, which have changed since"):
        again(["shift", "retain_finetune"], **changed)
    assert (tmp_path / "runs" / "compare.json").read_bytes() == saved
    assert set(again(["shift", "retain_finetune"]).methods) == {"shift", "retain_finetune"}


def test_a_comparison_of_a_version_without_digests_is_continued(tmp_path):
    compare(tmp_path / "runs", ["shift"])
    file = tmp_path / "runs" / "compare.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "digests"})
    )
    assert set(compare(tmp_path / "runs", ["shift", "broken"]).methods) == {"shift", "broken"}


def test_a_folder_that_another_process_uses_is_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    with comparing.lock(tmp_path / "runs" / ".lock"), pytest.raises(InputError, match="is in use by"):
        compare(tmp_path / "runs")


def call(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture
def passed(monkeypatch):
    """What the command passes on. The comparison has one failed method and, unless told, one result."""
    found = {"methods": {"shift": {"error": "no"}}}

    def fake(*arguments, **options):
        found.update(arguments=arguments, options=options)
        content = {"methods": found["methods"], "models": {}, "notes": []}
        return comparing.Comparison(content, Path(options["output_dir"]))

    monkeypatch.setattr(comparing, "compare", fake)
    return found


def test_the_command_passes_its_arguments_on(tmp_path, passed, capsys):
    words = ["--model", "base", "--data", "demo", "--forget", "class:seven", "--output", tmp_path]
    assert call("compare", *words, "--methods", "shift, cliperase", "--oracle", "a", "--oracle", "b", "--depth",
                "--oracle-seconds", 5, "--seed", 3) == 1  # no method has a result  # fmt: skip
    assert passed["arguments"] == ("base", "demo#class:seven", "rest")
    options = passed["options"]
    assert options["methods"] == ["shift", "cliperase"] and options["oracle"] == ["a", "b"]
    assert options["depth"] is True and options["oracle_seconds"] == 5.0
    assert options["config"]["seed"] in (3, "3")
    assert "shift has no result: no" in capsys.readouterr().out


def test_the_command_succeeds_if_a_method_has_a_result(tmp_path, passed, capsys):
    entry = {"scores": {"association": {"value": 0.1}}, "seconds": 1.0, "peak_mib": None, "changed_mib": 0.5}
    passed["methods"]["cliperase"] = entry
    words = ["--model", "base", "--data", "demo", "--forget", "class:seven", "--output", tmp_path]
    assert call("compare", *words) == 0
    assert passed["options"]["methods"] == "all"
    assert "0.100" in capsys.readouterr().out


def test_an_unknown_method_ends_the_command_with_one_line(tmp_path, capsys):
    words = ["--model", "base", "--data", "demo", "--forget", "class:seven", "--output", tmp_path / "runs"]
    assert call("compare", *words, "--methods", "nothing") == 2
    assert "--methods 'nothing' is not one of" in capsys.readouterr().err
