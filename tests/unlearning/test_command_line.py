"""`cliperase-fast unlearn` and `evaluate` from end to end, on a tiny CLIP and a folder of flat colours."""

import html
import json

import pytest
from PIL import Image
from tiny import make_tiny_clip

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


def test_settings_come_from_a_file(tmp_path, model, data):
    (tmp_path / "settings.yaml").write_text("epochs: 2\nbatch_size: 6\nreport: false\nforget_loss: hinge\n")
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
