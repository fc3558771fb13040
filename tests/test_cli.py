import dataclasses
import functools
import json
import shlex
import subprocess
import sys

import pytest

from cliperase_fast import UnlearnConfig, cli, config
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.cli.settings import given_settings


def call(*words):
    return cli.main([str(word) for word in words])


def test_every_setting_is_a_flag_of_unlearn(capsys):
    with pytest.raises(SystemExit) as stop:
        call("unlearn", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for spec in dataclasses.fields(UnlearnConfig):
        assert "--" + spec.name.replace("_", "-") in text
    for source in ("demo", "shapes", "cifar10:", "cifar100:", "folder:", "csv:", "flickr30k:", "wds:"):
        assert source in text


def test_the_deepspeed_launchers_argument_is_accepted(capsys):
    assert call("--local_rank=1", "backends") == 0
    assert call("--local_rank=1", "plan", "--batch", 64, "--gpus", 2, "--model", "ViT-B-32") == 0


def test_help_without_a_command_shows_examples(capsys):
    assert call() == 2
    assert "cliperase-fast unlearn --model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "ViT-B-99:openai", "--data", "demo", "--forget", "class:seven"], "ViT-B-"),
        (["--model", "ViT-B-32", "--data", "demo", "--forget", "class:seven"], "ViT-B-32:"),
        (["--model", "ViT-B-32:openai", "--data", "demo", "--forget", "class:seven", "--epochs", "none"], "epochs"),
        (
            ["--model", "ViT-B-32:openai", "--data", "demo", "--forget", "class:seven", "--config", "absent.yaml"],
            "absent.yaml",
        ),
    ],
)
def test_wrong_input_exits_with_2_and_one_line(tmp_path, capsys, words, says):
    assert call("unlearn", *words, "--output", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


_NEEDED = {
    "unlearn": ["--model", "m", "--output", "o"],
    "audit": ["--before", "m", "--after", "m"],
    "compare": ["--model", "m", "--output", "o", "--methods", "slug"],
    "inspect": [],
}


@pytest.mark.parametrize("command", _NEEDED)
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "demo", "--forget", "seven"], "'seven' is not a selector; use class:NAME"),
        (["--data", "demo", "--forget", "class:seven", "--retain", "one"], "'one' is not a selector; use class:NAME"),
        (["--data", "demo#class:one", "--forget", "class:seven"], "--data 'demo#class:one' has a selector: give"),
    ],
)
def test_what_is_not_a_selector_is_explained(command, words, says, capsys):
    assert call(command, *_NEEDED[command], *words) == 2
    assert says in capsys.readouterr().err


def test_the_demo_names_a_mistyped_class_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPERASE_CACHE", str(tmp_path / "cache"))
    assert call("demo", "--forget", "class:sevn", "--output", tmp_path / "run") == 2
    assert "seven" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_the_demo_must_be_told_what_to_forget_of_data_of_ones_own(tmp_path, capsys):
    assert call("demo", "--data", f"folder:{tmp_path}", "--output", tmp_path / "run") == 2
    assert "--forget is missing: say what to forget of 'folder:" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_flag_exits_with_2(tmp_path):
    with pytest.raises(SystemExit) as stop:
        call("unlearn", "--no-such-flag")
    assert stop.value.code == 2


def test_flags_win_over_the_config_file_and_that_over_the_preset(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"epochs": 7, "batch_size": 32}))
    words = [
        "unlearn",
        "--model",
        "m",
        "--data",
        "demo",
        "--forget",
        "class:one",
        "--output",
        "o",
        "--paper",
        "flickr30k",
    ]
    arguments = make_parser().parse_args([*words, "--config", str(path), "--epochs", "3"])
    found = UnlearnConfig.from_dict(given_settings(arguments))
    assert (found.epochs, found.batch_size, found.learning_rate) == (3, 32, 1e-8)


def settings_of(*words):
    needed = ("unlearn", "--model", "m", "--data", "demo", "--forget", "class:one", "--output", "o")
    return given_settings(make_parser().parse_args([*needed, *map(str, words)]))


def test_flags_and_the_config_file_win_over_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    (tmp_path / "ssd.yaml").write_text("method: ssd\nmethod_options: {alpha: 30.0}\nselect: divergence\nseed: 1\n")
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"seed": 2, "retain_floor": 0.1}))
    recipe = {"method": "ssd", "method_options": {"alpha": 30.0}, "select": "divergence", "seed": 1}
    assert settings_of("--recipe", "ssd") == recipe
    assert settings_of("--recipe", "ssd", "--config", path) == {**recipe, "seed": 2, "retain_floor": 0.1}
    path.write_text(json.dumps({"method": "slug"}))
    assert "method_options" not in settings_of("--recipe", "ssd", "--config", path)
    assert settings_of("--recipe", "ssd", "--method", "slug", "--seed", 3).keys() == {"method", "select", "seed"}


def test_a_method_and_its_options_are_given_as_words(tmp_path):
    given = settings_of("--method", "mine", "--method-options", "a=1", "b=x", "--method-options", "c=true")
    assert given == {"method": "mine", "method_options": {"a": 1, "b": "x", "c": True}}
    path = tmp_path / "c.yaml"
    path.write_text("method: mine\nmethod_options: {a: 1}\n")
    assert settings_of("--config", path) == {"method": "mine", "method_options": {"a": 1}}
    assert settings_of("--config", path, "--method", "mine")["method_options"] == {"a": 1}
    assert settings_of("--config", path, "--method", "other") == {"method": "other"}


def test_the_audit_of_a_run_is_a_flag_with_an_optional_depth(tmp_path):
    assert "audit" not in settings_of()
    assert settings_of("--audit") == {"audit": True}
    assert settings_of("--audit", "depth") == {"audit": "depth"}
    path = tmp_path / "c.yaml"
    path.write_text("audit: full\n")
    assert UnlearnConfig.from_dict(settings_of("--config", path)).audit == "full"
    assert settings_of("--config", path, "--no-audit") == {"audit": False}


def test_print_config_needs_no_other_flag_and_prints_a_config_file(tmp_path, capsys):
    assert call("unlearn", "--print-config", "--paper", "flickr30k", "--epochs", 3) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert UnlearnConfig.from_file(path) == UnlearnConfig.paper("flickr30k", epochs=3)
    assert "# loss\nlambda_retain: 1.0\n" in path.read_text()


def test_without_print_config_the_required_flags_stay_required(capsys):
    with pytest.raises(SystemExit) as stop:
        call("unlearn", "--paper", "flickr30k")
    assert stop.value.code == 2
    assert "--model, --data, --forget, --output" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["unlearn", "audit", "compare", "demo"])
def test_the_test_set_has_the_name_of_the_python_argument(command):
    models = ["--before", "a", "--after", "b"] if command == "audit" else ["--model", "a"] * (command != "demo")
    words = [command, *models, "--data", "demo", "--forget", "class:one", "--output", "o"]
    for flag in ("--test", "--test-data"):
        assert make_parser().parse_args([*words, flag, "shapes"]).test_data == "shapes"


def test_a_request_takes_its_test_and_validation_sets_by_the_names_in_python():
    words = ["ledger", "forget", "shop", "--data", "demo", "--forget", "class:one"]
    given = make_parser().parse_args([*words, "--test", "shapes", "--validation", "personas"])
    assert (given.test_data, given.validation_data) == ("shapes", "personas")


def completed(shell_script, *words):
    """Return what bash offers for the last of `words`."""
    set_up = f"COMP_WORDS=({' '.join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}"
    code = f'{shell_script}\n{set_up}; _cliperase_fast; echo "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_flags_and_values(capsys):
    assert call("completion", "bash") == 0
    found = functools.partial(completed, capsys.readouterr().out, "cliperase-fast")
    assert found("un") == ["unlearn"]
    assert set(found("unlearn", "--forget-")) == {"--forget-loss", "--forget-fraction", "--forget-level"}
    assert found("unlearn", "--optimizer", "") == ["adam", "adamw"]
    assert "cifar100:" in found("unlearn", "--model", "m", "--data", "ci")
    assert "calibrated" in found("unlearn", "--method", "cal")
    assert found("bench", "l") == ["loss"]
    assert found("unlearn", "--model", "") == []  # bash then offers files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_for_other_shells_have_every_command_and_setting(shell, capsys):
    assert call("completion", shell) == 0
    text = capsys.readouterr().out
    assert "unlearn" in text and "doctor" in text
    for spec in dataclasses.fields(UnlearnConfig):
        assert spec.name.replace("_", "-") in text


def test_an_unknown_method_exits_with_2_and_the_nearest_name(tmp_path, capsys):
    words = ["--model", "m", "--data", "demo", "--forget", "class:one", "--output", tmp_path / "run"]
    assert call("unlearn", *words, "--method", "gradient_asent") == 2
    assert "did you mean 'gradient_ascent'?" in capsys.readouterr().err


def test_backends_are_listed_with_the_reason_of_each(capsys):
    assert call("backends") == 0
    text = capsys.readouterr().out
    assert "eager" in text
    assert "torch" in text


def test_the_installed_command_answers():
    done = subprocess.run([sys.executable, "-m", "cliperase_fast.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("cliperase-fast 0.")
