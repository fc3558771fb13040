"""`main`: run a command, and turn how it ends into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cliperase_fast.cli.commands import progress_style
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.reading import user_path

# How to go on with a command that was stopped.
_GOES_ON = {
    "unlearn": "; the same command with --resume goes on",
    "compare": "; the same command goes on",
    "demo": "; the same command goes on",
    "ledger": "; the same command goes on",
}

# Arguments in Python that have another name in every command, and the flag that stands for them.
_OTHER_NAMES = {"output_dir": "output", "base": "model", "templates": "template", "holdouts": "holdout"}
# A full stop after the sign begins a path or ends the sentence.
_ARGUMENT = re.compile(r"(?<![\w?&.'\"/\\-])([a-z]\w*)=(True\b|False\b|\.(?=[./\w]| [a-z])|(?=[^\s,;.:)])[^\s]?|)")
_FOLDER = re.compile(r"\b(an|another|give|needs|[Ww]ithout) output_dir\b")  # the argument, not a folder of that name


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: the work failed; 2: something given was wrong; 130: interrupted."""
    _open_closed_streams()
    _escape_what_cannot_be_written()
    command, flags = None, {}
    try:
        try:
            parser = make_parser()
            arguments = parser.parse_args(argv)
            flags = _flags(parser, arguments)
            command = arguments.command
            if command is None:
                parser.print_help()
                return 2
            _complete_paths(arguments)
            with _logging(arguments), _termination(command):
                return arguments.run(arguments)
        finally:
            getattr(sys.stdout, "flush", bool)()  # a closed pipe or a full disk is reported here, not at exit
    except InputError as error:
        return _fail(_with_flags(str(error), flags), 2)
    except UnlearningError as error:
        return _fail(_with_flags(str(error), flags), 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_GOES_ON.get(command or '', '')}", 130)
    except BrokenPipeError:  # the reader of the output closed it, as with `| head`
        _drop(sys.stdout)
        return 1
    except OSError as error:
        from cliperase_fast.storage import explain

        _drop(sys.stdout)
        return _fail(explain(error, error.filename or "standard output") if error.errno else str(error), 1)


def _complete_paths(arguments: argparse.Namespace) -> None:
    """Expand "~", which shells leave alone after `--output=`.

    Raises InputError for an empty path, as of a shell's variable that is not set, which would count as not given.
    """
    for name in ("output", "config", "recipe", "ledger", "synonyms", "features"):
        path = getattr(arguments, name, None)
        if path == "":
            raise InputError(f"{name}='' is empty: is it a variable that is not set?")
        if isinstance(path, str):
            setattr(arguments, name, str(user_path(path)) if path.startswith("~") else path)


def _flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, str]:
    """Return the flags of the command that was called, by their names in Python."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            chosen = action.choices.get(getattr(arguments, action.dest, None) or "")
            found.update(_flags(chosen, arguments) if chosen is not None else {})
        found.update({flag[2:].replace("-", "_"): flag for flag in action.option_strings if flag.startswith("--")})
    for name, own in _OTHER_NAMES.items():
        if own in found:
            found.setdefault(name, found[own])
    found.pop("method_options", None)  # its words are not those of Python
    return found


def _with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Write `on_error='skip'` as `--on-error 'skip'` and so on, for the flags that the command has."""

    def named(found: re.Match[str]) -> str:
        flag, value = flags.get(found[1]), found[2]
        if flag is None or (value == "False" and f"no_{found[1]}" not in flags):
            return found[0]
        if value in ("True", "False"):
            return flag if value == "True" else flags[f"no_{found[1]}"]
        return f"{flag} {value}" if value else flag

    return _ARGUMENT.sub(named, message)


def _fail(message: str, code: int) -> int:
    """Print one line."""
    line = message.strip().partition("\n")[0] or "failed"
    line = _FOLDER.sub(r"\1 --output", line)
    try:
        print(f"cliperase-fast: {line}", file=sys.stderr)
    except (OSError, ValueError):  # a full disk, or a reader that is gone: the exit code says it
        _drop(sys.stderr)
    return code


def _open_closed_streams() -> None:
    """Open the null device in the place of standard streams that are closed, as with `>&-`.

    Python has None in their place. The next file that is opened would get a free number of theirs, and what libraries
    write to standard error would go to that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            else:
                os.set_inheritable(null, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None or getattr(getattr(sys, name), "closed", False):
            null = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, os.fdopen(null, "w", encoding="utf-8"))  # for the rest of the process


def _escape_what_cannot_be_written() -> None:
    """Write characters that the encoding of a standard stream lacks as escapes, instead of failing after the work.

    Encodings other than UTF-8 lack those of tables and of many class names, and UTF-8 the bytes of file names that are
    not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _drop(stream: Any) -> None:
    """Discard what a stream still has to write; otherwise Python would try again at exit and print a traceback."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):  # an object in the place of a file, as in notebooks
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


@contextmanager
def _termination(command: str) -> Iterator[None]:
    """Print how to go on when SIGTERM ends the process, as a batch system sends it."""
    before = signal.getsignal(signal.SIGTERM)
    ours = command in _GOES_ON and before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == process:  # a data loader's process inherits the handler
            with suppress(OSError):
                os.write(2, f"cliperase-fast: stopped by SIGTERM{_GOES_ON[command]}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging(arguments: argparse.Namespace) -> Iterator[None]:
    """Show the package's log on standard error without progress bars, on the first rank only."""
    shown = progress_style(arguments) == "lines" and os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("cliperase_fast")
    before = logger.handlers, logger.level, logger.propagate
    # Not propagated: libraries add a handler to the root logger, and each line would appear twice.
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if shown else logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
