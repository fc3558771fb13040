"""`cliperase-fast unlearn` and `evaluate` from end to end, on a tiny CLIP and a folder of flat colours."""

import html
import json
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from tiny import make_tiny_clip

import cliperase_fast as cf
from cliperase_fast import cli
from cliperase_fast.models import load_model

QUICK = ["--epochs", 2, "--batch-size", 6, "--learning-rate", "1e-3"]


@pytest.fixture
def model(tmp_path):
    load_model(make_tiny_clip()).save(tmp_path / "model")
    return f"local-dir:{tmp_path / 'model'}"


@pytest.fixture
def data(tmp_path):
    for colour in ("red", "green", "blue"):
        (tmp_path / "data" / colour).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / colour / f"{i}.png")
    return f"folder:{tmp_path / 'data'}"


def call(*words):
    return cli.main([str(word) for word in words])


def test_unlearn_then_evaluate(tmp_path, model, data, capsys):
    output = tmp_path / "run"
    words = ["unlearn", "--model", model, "--data", data, "--forget", "class:red", "--output", output, *QUICK]
    assert call(*words) == 0
    told = capsys.readouterr()
    assert "Zero-shot accuracy" in told.out
    verdict = json.loads((output / "result.json").read_text())["verdict"]
    assert told.out.startswith(verdict["sentence"])
    assert told.out.splitlines()[-1] == f"verdict  {verdict['opening']}. {verdict['advice']}".rstrip()
    assert html.escape(verdict["sentence"]) in (output / "report.html").read_text()
    assert str(output / "report.html") in told.out
    assert "step/s" not in told.err, "no progress bar if standard error is not a terminal"
    assert {path.name for path in output.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "model",
        "report.html",
    }

    card = (output / "model" / "README.md").read_text()
    assert f"{data.partition(':')[0]}:" in card and "class:red" in card
    assert f"cliperase-fast audit --before {model} --after local-dir:{output / 'model'}" in card

    scores = tmp_path / "scores.json"
    evaluate = ["evaluate", "--model", f"local-dir:{output / 'model'}", "--data", data, "--forget", "class:red"]
    assert call(*evaluate, "--output", scores) == 0
    table = capsys.readouterr().out
    assert "Zero-shot accuracy" in table
    assert table.splitlines()[-3].split()[:3] == ["red", "forget", "10"]
    assert call(*evaluate, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(scores.read_text())
    assert json.loads(scores.read_text())["forget"]["pairs"] == 10

    assert call(*words) == 2
    assert "already used" in capsys.readouterr().err
    assert call(*words, "--resume") == 0


@pytest.mark.filterwarnings("ignore:oracle 1 seems to know")
def test_an_audited_run_names_its_audit(tmp_path, model, data, capsys):
    output = tmp_path / "run"
    words = ["unlearn", "--model", model, "--data", data, "--forget", "class:red", "--output", output, *QUICK]
    assert call(*words, "--oracle", model) == 2
    assert "--audit" in capsys.readouterr().err
    assert call(*words, "--audit", "--oracle", model, "--no-report") == 0
    told = capsys.readouterr().out
    content = json.loads((output / "audit.json").read_text())
    assert f"audit    {output / 'audit.json'}" in told.splitlines()
    assert content["verdicts"]["forgetting"] in told
    assert content["data"]["concepts"] == ["red"]
    assert content["scores"]["oracle 1"] == content["scores"]["before"]


def test_the_command_in_the_card_gives_the_audit_of_the_run(tmp_path, model, data, capsys):
    for split, start in (("train", 0), ("test", 7)):  # a split of its own: no pairs are held out for validation alone
        for colour in ("red", "green", "blue"):
            (tmp_path / "split" / split / colour).mkdir(parents=True)
            for number in range(start, 10):
                source = tmp_path / "data" / colour / f"{number}.png"
                (tmp_path / "split" / split / colour / source.name).write_bytes(source.read_bytes())
    output = tmp_path / "run"
    words = ["--data", f"folder:{tmp_path / 'split'}", "--forget", "class:red", "--output", output, *QUICK]
    assert call("unlearn", "--model", model, *words, "--quiet") == 0
    card = (output / "model" / "README.md").read_text()
    (command,) = re.findall("^cliperase-fast (audit .*)$", card, re.M)
    assert call(*shlex.split(command), "--quiet") == 0
    scores = json.loads((output / "audit.json").read_text())["scores"]
    record = json.loads((output / "result.json").read_text())
    for name in ("before", "after"):
        assert scores[name]["forgetting"]["association"]["value"] == pytest.approx(
            record[name]["forget"]["association"], abs=1e-5
        )


@pytest.mark.parametrize("redirections", ["2>&-", ">&- 2>&-"])
def test_commands_work_with_closed_streams(tmp_path, model, data, redirections):
    scores, run = tmp_path / "scores.json", tmp_path / "run"
    given = ["--model", model, "--data", data]
    for words in (
        ["evaluate", *given, "--json", "--output", scores],
        ["unlearn", *given, "--forget", "class:red", "--output", run, "--no-report", *QUICK],
    ):
        command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "cliperase_fast.cli", *words]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        if words[0] == "evaluate":
            assert done.stdout == ("" if ">&- 2" in redirections else scores.read_text())
    assert json.loads(scores.read_text())["all"] and (run / "result.json").is_file()


def test_the_library_works_without_standard_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    pairs = [(Image.new("RGB", (8, 8), colour), f"a {colour} one") for colour in ("red", "green", "blue") * 4]
    forget, retain = ([pair for pair in pairs if ("red" in pair[1]) is wanted] for wanted in (True, False))
    for progress in (None, True):
        settings = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-3, "report": False}
        result = cf.unlearn(make_tiny_clip(), forget, retain, test=(forget, retain), progress=progress, **settings)
        cf.evaluate(result.model, pairs, progress=progress)
        cf.audit(make_tiny_clip(), result.model, forget, retain, test=(forget, retain), progress=progress)


def test_settings_come_from_a_file(tmp_path, model, data):
    (tmp_path / "settings.yaml").write_text(
        "method: cliperase\nepochs: 2\nbatch_size: 6\nreport: false\nforget_loss: hinge\n"
    )
    words = [
        "--data",
        data,
        "--forget",
        "class:red",
        "--output",
        tmp_path / "run",
        "--config",
        tmp_path / "settings.yaml",
    ]
    assert call("unlearn", "--model", model, *words) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["forget_loss"] == "hinge"
    assert not (tmp_path / "run" / "report.html").exists()


def test_failed_work_exits_with_1(tmp_path, model, data, capsys):
    words = ["--data", data, "--forget", "class:red", "--output", tmp_path / "run", "--epochs", 10]
    assert call("unlearn", "--model", model, *words, "--learning-rate", "1e30") == 1
    assert "not finite at step" in capsys.readouterr().err
