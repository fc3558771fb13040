"""What the command line says when it is asked for help, interrupted, or refused by the system: one line, a code."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import context

from cliperase_fast import InputError, UnlearnConfig, cli, demo
from cliperase_fast.cli import commands, running, select
from cliperase_fast.cli import ledger as ledgers
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.storage import lock, output_folder
from cliperase_fast.unlearning.run_directory import RunDirectory

COMMANDS = {
    "unlearn": ["--model", "m", "--data", "demo", "--forget", "class:one", "--output", "o"],
    "evaluate": ["--model", "m", "--data", "demo"],
    "audit": ["--before", "m", "--after", "m", "--data", "demo", "--forget", "class:one"],
    "compare": ["--methods", "slug", "--model", "m", "--data", "demo", "--forget", "class:one", "--output", "o"],
    "demo": [],
    "train-open-clip": [],
    "plan": ["--batch", "2", "--gpus", "1", "--model", "ViT-B-32"],
    "bench": ["loss"],
    "backends": [],
}
ADVICE = {
    "unlearn": "; the same command with --resume goes on",
    "compare": "; the same command goes on",
    "demo": "; the same command goes on",
}


def help_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_examples(command, capsys):
    assert f"examples: cliperase-fast {command}" in help_of(command, capsys)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "forget_fraction", "evaluate_every"])
def test_help_shows_the_defaults_of_each_command(name, capsys):
    usual = getattr(UnlearnConfig(), name)
    for command in ("demo", "unlearn"):
        text = help_of(command, capsys)
        assert f"(default: {usual})" in text[text.index("--" + name.replace("_", "-") + " ") :][:300]


@pytest.mark.parametrize(
    ("output", "says"),
    [("file/scores.json", "Not a directory"), ("folder", "is a folder"), ("pipe", "a device or a pipe")],
)
def test_an_unwritable_scores_file_is_an_error_before_evaluation(tmp_path, capsys, output, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["evaluate", *COMMANDS["evaluate"], "--output", str(tmp_path / output)]) == 2
    told = capsys.readouterr().err
    assert f"--output={tmp_path}" in told and says in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "flag"),
    [("evaluate", "output"), ("audit", "output"), ("unlearn", "output"), ("unlearn", "config"), ("unlearn", "recipe")],
)
def test_an_empty_name_is_an_error_and_does_not_count_as_not_given(command, flag, capsys):
    assert cli.main([command, *COMMANDS[command], f"--{flag}", ""]) == 2
    assert capsys.readouterr().err == f"cliperase-fast: --{flag} '' is empty: is it a variable that is not set?\n"


def test_a_wrong_setting_of_the_demo_is_an_error_before_its_model_is_trained(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", raising(AssertionError("it has started")))
    assert cli.main(["demo", "--epochs", "many"]) == 2
    assert capsys.readouterr().err == "cliperase-fast: --epochs 'many' must be a whole number or 'auto'\n"


def stop_with(monkeypatch, command, error):
    def stop(arguments):
        raise error

    monkeypatch.setattr(commands, command.replace("-", "_"), stop)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupted_command_says_how_to_resume_and_exits_with_130(command, monkeypatch, capsys):
    stop_with(monkeypatch, command, KeyboardInterrupt())
    assert cli.main([command, *COMMANDS[command]]) == 130
    assert capsys.readouterr().err == f"cliperase-fast: interrupted{ADVICE.get(command, '')}\n"


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
def test_sigterm_ends_a_command_with_a_line_on_how_to_resume(command, tmp_path):
    process = context().Process(target=_terminate_itself, args=(command, tmp_path / "stderr"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGTERM
    advice = f"cliperase-fast: stopped by SIGTERM{ADVICE[command]}\n" if command in ADVICE else ""
    assert (tmp_path / "stderr").read_text() == advice


def _terminate_itself(command, path):
    with open(path, "wb") as stderr:
        os.dup2(stderr.fileno(), 2)

    def work(arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    setattr(commands, command, work)
    cli.main([command, *COMMANDS[command]])


@pytest.mark.parametrize("command", ADVICE)
def test_the_advice_after_an_interruption_works(command):
    words = ["--resume"] if "--resume" in ADVICE[command] else []
    make_parser().parse_args([command, *COMMANDS[command], *words])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), OSError(errno.EROFS, os.strerror(errno.EROFS), "a"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), FileNotFoundError(errno.ENOENT, "gone", "a"),
        OSError("the hub says\nmany lines"), TimeoutError(errno.ETIMEDOUT, "x"), OSError(),
    ],
    ids=repr,
)  # fmt: skip
def test_system_errors_are_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(running, "_drop", lambda stream: None)  # pytest's own
    stop_with(monkeypatch, "evaluate", error)
    assert cli.main(["evaluate", *COMMANDS["evaluate"]]) == 1
    told = capsys.readouterr().err
    assert told.startswith("cliperase-fast: ") and told.count("\n") == 1
    assert error.filename is None or error.filename in told


def raising(error):
    def work(arguments):
        raise error

    return work


@pytest.mark.parametrize(
    ("command", "said", "told"),
    [
        ("evaluate", 'pass long_captions="truncate" to cut', 'pass --long-captions "truncate" to cut'),
        ("evaluate", "shapes?seed=x and batch_size=0", "shapes?seed=x and --batch-size 0"),
        ("unlearn", "output_dir='a' is in use; resume=True", "--output 'a' is in use; --resume"),
        ("unlearn", "output_dir=../a is in use; leave out oracle=.", "--output ../a is in use; leave out --oracle."),
        ("unlearn", "output_dir=. is in use, output_dir=.a too", "--output . is in use, --output .a too"),
        (
            "unlearn",
            "/output_dir/a: start again in another output_dir",
            "/output_dir/a: start again in another --output",
        ),
        ("unlearn", "output_dir=output_dir is in use", "--output output_dir is in use"),
        ("unlearn", "pass audit=True or report=False", "pass --audit or --no-report"),
        ("unlearn", "weights_only=True and how=", "weights_only=True and how="),
        ("select", "give k=, or the least similarity threshold=", "give --k, or the least similarity --threshold"),
    ],
)
def test_errors_name_the_flags_that_the_command_has(command, said, told, monkeypatch, capsys):
    module = select if command == "select" else commands
    monkeypatch.setattr(module, command, raising(InputError(said)))
    words = ["--model", "m", "--data", "d", "--output", "o"] if command == "select" else COMMANDS[command]
    assert cli.main([command, *words]) == 2
    assert capsys.readouterr().err == f"cliperase-fast: {told}\n"


def test_errors_name_the_flags_of_an_action(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text("")
    monkeypatch.setitem(ledgers._ACTIONS, "undo", raising(InputError("pass it as base=, or replay with how='replay'")))
    assert cli.main(["ledger", "undo", str(tmp_path), "red"]) == 2
    assert capsys.readouterr().err == "cliperase-fast: pass it as --model, or replay with --how 'replay'\n"


@pytest.mark.parametrize(("encoding", "written"), [("latin-1", b"\xe9 \\u2500"), ("ascii", b"\\xe9 \\u2500")])
def test_characters_that_the_output_lacks_are_written_as_escapes(encoding, written, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(commands, "methods", lambda _: print("\xe9 \u2500 \udce9") or 0)
    assert cli.main(["methods"]) == 0
    assert output.buffer.getvalue() == written + b" \\udce9\n"


def start(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "cliperase_fast.cli", *words], stderr=subprocess.PIPE, **options)


def test_a_closed_output_gives_no_traceback():
    with open("/dev/full", "wb") as full:
        onto_full = start("backends", stdout=full)
    reader, writer = os.pipe()
    os.close(reader)
    gone = [start(*words, stdout=writer) for words in (["backends"], ["unlearn", "--help"])]
    os.close(writer)
    told = onto_full.communicate()[1].decode()
    assert (onto_full.returncode, told.count("\n")) == (1, 1)
    assert "No space left on device" in told
    assert [process.communicate()[1] for process in gone] == [b"", b""]
    assert gone[0].returncode == 1


def closed(redirections, *words):
    """Run a command with redirections of the shell. Returns its exit code, its output and its standard error."""
    command = f'exec "$@" {redirections}'
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "cliperase_fast.cli", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


WRONG = ["ledger", "head", "no-such-folder"]


@pytest.mark.parametrize(
    ("redirections", "words", "code"),
    [
        (">&-", ["methods"], 0), (">&- 2>&-", ["methods"], 0), ("<&- >&- 2>&-", ["methods"], 0),
        (">&-", ["unlearn", "--help"], 0), ("2>&-", WRONG, 2), (">&- 2>&-", WRONG, 2), ("2>/dev/full", WRONG, 2),
        ("2>&-", ["no-such-command"], 2),
    ],
    ids=str,
)  # fmt: skip
def test_closed_streams_change_no_exit_code_and_print_nothing_elsewhere(redirections, words, code):
    assert closed(redirections, *words) == (code, "", "")


def test_a_closed_standard_error_leaves_the_output():
    code, output, _ = closed("2>&-", "methods")
    assert code == 0 and "calibrated" in output


def test_an_error_is_printed_where_the_output_is_closed():
    code, output, errors = closed(">&-", *WRONG)
    assert (code, output) == (2, "") and errors.startswith("cliperase-fast: ") and errors.count("\n") == 1


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Else what libraries write to standard error would go to that file."""
    code = (
        "import sys; from cliperase_fast.cli import main; main(['backends']); "
        f"sys.exit(min(open({str(tmp_path / 'x')!r}, 'w').fileno(), 3))"
    )
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True).returncode == 3


class Bare:
    """What replaces standard output in some programs: it has only write()."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


def test_streams_without_the_methods_of_a_file_serve_the_commands(monkeypatch):
    output, errors = Bare(), Bare()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    assert cli.main(["methods"]) == 0
    assert cli.main(WRONG) == 2
    stop_with(monkeypatch, "evaluate", BrokenPipeError())
    assert cli.main(["evaluate", *COMMANDS["evaluate"]]) == 1
    assert "calibrated" in output.text and errors.text.count("\n") == 1


class Closed(Bare):
    """Standard output whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_a_reader_that_stops_does_not_cost_the_output_file(command, monkeypatch, tmp_path):
    words = {
        "evaluate": COMMANDS["evaluate"],
        "generate": ["--pipeline", "p", "--after", "m", "--judge", "m", "--forget", "cat"],
        "inspect": ["--data", "shapes?train=1&test=1&size=16"],
    }[command]
    scores = {"all": {"pairs": 1, "zero_shot_top1": 1.0}, "per_class": {}}
    monkeypatch.setattr("cliperase_fast.evaluation.evaluate", lambda *given, **options: scores)
    monkeypatch.setattr("cliperase_fast.cli.generate._compared", lambda arguments: SimpleNamespace(content={}))
    monkeypatch.setattr(
        "cliperase_fast.report.generation.save_generation_page", lambda found, path, title: Path(path).write_text(title)
    )
    monkeypatch.setattr(sys, "stdout", Closed())
    output = tmp_path / "output.html"
    assert cli.main([command, *words, "--output", str(output), *(["--json"] if command == "generate" else [])]) == 1
    assert output.stat().st_size


@pytest.mark.parametrize("option", [["--progress", "lines"], ["--quiet"], ["--progress", "none"], []])
def test_progress_is_shown_as_requested(option, monkeypatch, capsys):
    from cliperase_fast.progress import say

    told = []

    def work(arguments):
        monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])  # as some libraries set it up
        say("a line")
        told.append(commands.progress_style(arguments))
        return 0

    monkeypatch.setattr(commands, "demo", work)
    assert cli.main(["demo", *option]) == 0
    lines = capsys.readouterr().err
    wanted = "none" if option in (["--quiet"], ["--progress", "none"]) else "lines"  # auto: no terminal here
    assert told == [wanted]
    assert lines.count("a line") == (wanted == "lines")


def _fill_cache(folder, number):
    import open_clip

    def train(pairs, recipe, **options):
        (folder / f"trained-{number}").write_text("")
        time.sleep(0.3)
        text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        vision = {"image_size": 8, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16}
        return open_clip.model.CLIP(16, vision, text).eval()

    demo.train_small_clip = train
    path = demo.cached_small_clip("demo", DEMO_MODELS["demo"], cache_dir=folder / "cache")
    (folder / f"path-{number}").write_text(str(path))


def test_a_tilde_that_the_shell_left_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("batch_size: 7\n")
    arguments = make_parser().parse_args(
        ["unlearn", "--model", "m", "--data", "d", "--forget", "f", "--output=~/run", "--config=~/settings.yaml"]
    )
    running._complete_paths(arguments)
    assert (arguments.output, arguments.config) == (str(tmp_path / "run"), str(tmp_path / "settings.yaml"))
    assert UnlearnConfig.from_file("~/settings.yaml").batch_size == 7
    assert output_folder("~/run") == tmp_path / "run"
    with pytest.raises(InputError, match="'~nobody-here/run' is not a path"):
        output_folder("~nobody-here/run")


def test_two_demos_train_a_shared_model_once(tmp_path):
    processes = [context().Process(target=_fill_cache, args=(tmp_path, number), daemon=True) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("trained-*"))) == 1
    (path,) = {file.read_text() for file in tmp_path.glob("path-*")}
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [os.path.basename(path)]
    assert json.loads((Path(path) / "open_clip_config.json").read_text())


def test_a_demo_folder_in_use_is_not_cleared(tmp_path):
    (tmp_path / demo._MARK).write_text("")
    with lock(tmp_path / ".lock"):
        demo.clear_demo_run(tmp_path)
        assert (tmp_path / demo._MARK).exists()
    demo.clear_demo_run(tmp_path)
    assert not tmp_path.exists()


def test_a_demo_behind_a_symbolic_link_is_replaced(tmp_path):
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    (folder / demo._MARK).write_text("")
    demo.clear_demo_run(link)
    assert list(folder.iterdir()) == []
    RunDirectory(link, resume=False).check()


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_demo_keeps_a_folder_with_other_files(tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    assert cli.main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "already used: give another folder" in told and "resume" not in told
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_errors_name_arguments_by_their_flags(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"lambda_forget": 3.0, "lambda_consistency": 3.0}')
    words = ["--model", "local-dir:x", "--data", "demo", "--forget", "class:one", "--quiet"]
    assert cli.main(["unlearn", *words, "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is already used: give another folder, or --resume to go on" in capsys.readouterr().err
