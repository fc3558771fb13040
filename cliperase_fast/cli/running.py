"""`main`: run a command, and turn how it ends into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cliperase_fast.cli.commands import progress_style
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.errors import InputError, UnlearningError

# How to go on with a command that was stopped.
_GOES_ON = {
    "unlearn": "; the same command with --resume goes on",
    "demo": "; the same command goes on",
    "ledger": "; the same command goes on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: the work failed; 2: something given was wrong; 130: interrupted."""
    command = None
    try:
        try:
            parser = make_parser()
            arguments = parser.parse_args(argv)
            command = arguments.command
            if command is None:
                parser.print_help()
                return 2
            with _logging(arguments), _termination(command):
                return arguments.run(arguments)
        finally:
            sys.stdout.flush()  # a closed pipe or a full disk is reported here, not at exit
    except InputError as error:
        return _fail(str(error), 2)
    except UnlearningError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_GOES_ON.get(command or '', '')}", 130)
    except BrokenPipeError:  # the reader of the output closed it, as with `| head`
        _drop_output()
        return 1
    except OSError as error:
        from cliperase_fast.storage import explain

        _drop_output()
        return _fail(explain(error, error.filename or "standard output") if error.errno else str(error), 1)


def _fail(message: str, code: int) -> int:
    """Print one line, in which Python arguments are named by their flags."""
    line = message.strip().partition("\n")[0] or "failed"
    line = line.replace("output_dir=", "--output ").replace("output_dir", "--output").replace("resume=True", "--resume")
    print(f"cliperase-fast: {line}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Discard what is still to be printed; otherwise Python would try again at exit and print a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _termination(command: str) -> Iterator[None]:
    """Print how to go on when SIGTERM ends the process, as a batch system sends it."""
    before = signal.getsignal(signal.SIGTERM)
    ours = command in _GOES_ON and before is signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == process:  # a data loader's process inherits the handler
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
