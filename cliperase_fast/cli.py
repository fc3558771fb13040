"""The command line, `cliperase-fast COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cliperase_fast._version import __version__
from cliperase_fast.cli_settings import add_settings, demo_defaults, given_settings
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError, UnlearningError

_SELECTORS = """\
selectors:
  class:apple              pairs of this class; several with commas
  caption:apple,apples     pairs with a caption that holds one of these words
  ids:FILE                 pairs listed in a file, one id a line
"""

_BENCHMARKS = ("loss", "train", "memory", "scaling")  # modules of benchmarks/

_EXAMPLES = """\
examples:
  cliperase-fast demo
  cliperase-fast unlearn --model ViT-B-32:openai --data cifar100:/data --forget class:apple --output runs/apple
  cliperase-fast unlearn --model local-dir:my-clip --data 'wds:/data/{000..099}.tar' \\
      --forget caption:dog,dogs --output runs/dog --precision bf16 --trainable last:4
  cliperase-fast evaluate --model local-dir:runs/apple/model --data cifar100:/data --forget class:apple
"""


_WITH_DATA = ("unlearn", "evaluate", "demo")
_EXAMPLES_OF = {
    "unlearn": """\
examples:
  cliperase-fast unlearn --model ViT-B-32:openai --data cifar100:/data --forget class:apple --output runs/apple
  cliperase-fast unlearn --model local-dir:my-clip --data folder:/photos --forget class:cat,dog --output runs/pets \\
      --epochs 5 --learning-rate 1e-5
  cliperase-fast unlearn ... the same ... --resume          (after an interruption)
""",
    "evaluate": """\
examples:
  cliperase-fast evaluate --model local-dir:runs/apple/model --data cifar100:/data --forget class:apple
  cliperase-fast evaluate --model ViT-B-32:openai --data folder:/photos --output scores.json
""",
    "demo": """\
examples:
  cliperase-fast demo
  cliperase-fast demo --forget class:three --output runs/three
  cliperase-fast demo --data shapes --forget 'class:red circle' --output runs/shapes

A run that was interrupted goes on when the same command is given again.
""",
    "train-open-clip": """\
examples:
  cliperase-fast train-open-clip -- --model ViT-B-32 --train-data 'data/{000..099}.tar' --batch-size 1024
  torchrun --nproc_per_node 8 -m cliperase_fast.cli train-open-clip -- --model ViT-B-32 ...
""",
    "plan": """\
examples:
  cliperase-fast plan --batch 32768 --gpus 64 --model ViT-B-32
  cliperase-fast plan --batch 32768 --gpus 8 --model ViT-L-14 --chunk 256 --zero 2

Nothing is run or measured: docs/scaling.md says what the figures rest on.
""",
    "bench": """\
examples:
  cliperase-fast bench loss --quick
  cliperase-fast bench memory
  cliperase-fast bench loss --help          (what is measured, and how)

With --quick it takes a minute or two.
""",
    "methods": """\
examples:
  cliperase-fast methods
  cliperase-fast unlearn --method gradient_ascent ...

docs/methods.md says how to add one.
""",
    "backends": """\
examples:
  cliperase-fast backends
""",
}


# How to go on with a command that was stopped.
_GOES_ON = {"unlearn": "; the same command with --resume goes on", "demo": "; the same command goes on"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0: done; 1: the work failed; 2: something given was wrong; 130: interrupted."""
    command = None
    try:
        try:
            parser = _parser()
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
    shown = _progress(arguments) == "lines" and os.environ.get("RANK", "0") == "0"
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


def _progress(arguments: argparse.Namespace) -> str:
    """Return bars, lines or none."""
    wanted = "none" if getattr(arguments, "quiet", False) else getattr(arguments, "progress", "none")
    if wanted == "auto":
        return "bars" if sys.stderr.isatty() else "lines"
    return wanted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cliperase-fast",
        description="Make a CLIP model forget chosen image-text associations and keep the rest (CLIPErase).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cliperase-fast {__version__}")
    # The deepspeed launcher adds it; the environment has the same value.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    unlearn = _command(commands, "unlearn", "make a model forget", _unlearn)
    unlearn.usage = "cliperase-fast unlearn --model MODEL --data SOURCE --forget SELECTOR --output DIR [settings]"
    _add_model(unlearn)
    unlearn.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, see below")
    unlearn.add_argument("--forget", required=True, metavar="SELECTOR", help="which of them to forget, see below")
    unlearn.add_argument("--retain", default="rest", metavar="SELECTOR", help="which to keep (default: all others)")
    unlearn.add_argument("--test-data", metavar="SOURCE", help="where to measure (default: the source's test split)")
    unlearn.add_argument("--teacher", metavar="MODEL", help="stay consistent with this model (default: --model itself)")
    unlearn.add_argument("--output", required=True, metavar="DIR", help="the run directory")
    unlearn.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    unlearn.add_argument("--config", metavar="FILE", help="YAML or JSON with settings; flags win over it")
    unlearn.add_argument(
        "--paper", choices=("cifar100", "cc12m", "flickr30k"), help="start from the paper's settings for this data"
    )
    _add_progress(unlearn)
    add_settings(unlearn, {})

    evaluate = _command(commands, "evaluate", "zero-shot accuracy and retrieval of a model", _evaluate)
    _add_model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="SOURCE", help="what to measure on, see below")
    evaluate.add_argument("--forget", metavar="SELECTOR", help="report these pairs and the others apart")
    evaluate.add_argument("--json", action="store_true", help="print all scores as JSON, every class, for programs")
    evaluate.add_argument("--output", metavar="FILE", help="also write the scores there, as JSON")
    evaluate.add_argument(
        "--on-error",
        default="raise",
        choices=("raise", "skip"),
        help="pairs that cannot be used, such as unreadable images: raise, or skip and count (default: raise)",
    )
    evaluate.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch (default: 256)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    evaluate.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")

    _add_progress(evaluate)

    demo = _command(commands, "demo", "train a small CLIP and make it forget, from nothing", _demo)
    demo.usage = "cliperase-fast demo [--data SOURCE] [--forget SELECTOR] [--output DIR] [settings]"
    demo.add_argument("--data", default="demo", metavar="SOURCE", help="what to train on (default: demo, the digits)")
    demo.add_argument("--forget", default="class:seven", metavar="SELECTOR", help="default: class:seven")
    demo.add_argument("--test-data", metavar="SOURCE", help="where to measure (default: the source's test split)")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="the run directory (default: runs/demo)")
    _add_progress(demo)
    add_settings(demo, demo_defaults())

    train = _command(commands, "train-open-clip", "open_clip's own trainer, with the fused losses", _train_open_clip)
    train.usage = "cliperase-fast train-open-clip -- ARGUMENTS OF open_clip_train.main"
    train.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="passed on as they are")

    plan = _command(commands, "plan", "memory and time of a step on many GPUs, computed", _plan)
    plan.add_argument("--batch", type=int, required=True, metavar="N", help="pairs of a step, on all GPUs together")
    plan.add_argument("--gpus", type=int, required=True, metavar="R", help="how many GPUs")
    plan.add_argument("--model", required=True, metavar="ARCH", help="an architecture of open_clip: ViT-B-32")
    plan.add_argument("--gpu", default="h100", help="a100, h100 or h200 (default: h100)")
    plan.add_argument("--precision", default="bf16", help="bf16 or fp32 (default: bf16)")
    plan.add_argument("--gather", default="all", help="texts of the others: all at once, or ring (default: all)")
    plan.add_argument("--chunk", type=int, metavar="K", help="pairs encoded at a time, gradients of features cached")
    plan.add_argument("--zero", type=int, default=0, metavar="STAGE", help="ZeRO 1, 2 or 3 (default: 0, none)")
    plan.add_argument("--cached-teacher", action="store_true", help="the teacher's features are read, not computed")
    plan.add_argument("--efficiency", type=float, default=0.5, help="part of the peak rates reached (default: 0.5)")
    plan.add_argument("--strip-mib", type=int, metavar="MIB", help="memory for strips (default: CLIPERASE_STRIP_MIB)")

    bench = _command(commands, "bench", "measure the losses and unlearn(), beside others", _bench)
    bench.usage = "cliperase-fast bench {" + ",".join(_BENCHMARKS) + "} ..."
    bench.add_argument("what", choices=_BENCHMARKS, metavar="{" + ",".join(_BENCHMARKS) + "}", help="what to measure")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="passed on as they are")

    _command(commands, "methods", "the unlearning methods, with their options", _methods)
    _command(commands, "backends", "what computes the losses here", _backends)
    return parser


def _command(commands: Any, name: str, description: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=description,
        description=description[0].upper() + description[1:] + ".",
        epilog="\n".join(part for part in (_EXAMPLES_OF[name], _data_help() if name in _WITH_DATA else "") if part),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _data_help() -> str:
    from cliperase_fast.data.sources import sources_text

    return f"data sources:\n{sources_text('  ')}\n\n{_SELECTORS}"


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="ARCH:TAG as open_clip names them (ViT-B-32:openai), ARCH:/path/to/checkpoint, local-dir:DIR, "
        "or a transformers CLIP folder",
    )


def _add_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--progress",
        default="auto",
        choices=("auto", "bars", "lines", "none"),
        help="on standard error: bars, a line now and then, or none; auto: bars on a terminal, else lines "
        "(default: auto)",
    )
    parser.add_argument("--quiet", action="store_true", help="the same as --progress none")


def _unlearn(arguments: argparse.Namespace) -> int:
    config = UnlearnConfig.from_dict(given_settings(arguments))
    from cliperase_fast.unlearning import unlearn

    retain = arguments.retain if arguments.retain == "rest" else f"{arguments.data}#{arguments.retain}"
    result = unlearn(
        arguments.model,
        f"{arguments.data}#{arguments.forget}",
        retain,
        test=arguments.test_data,
        teacher=arguments.teacher,
        config=config,
        output_dir=arguments.output,
        resume=arguments.resume,
        progress=_progress(arguments) == "bars",
    )
    if os.environ.get("RANK", "0") == "0":  # of several ranks the first
        _print_result(result, Path(arguments.output))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from cliperase_fast.evaluation import evaluate
    from cliperase_fast.report import class_table, text_table
    from cliperase_fast.report.wording import left_out_lines
    from cliperase_fast.storage import check_writable, write_text_atomically, writing

    if arguments.output:  # before it takes minutes
        if Path(arguments.output).is_dir():
            raise InputError(f"--output={arguments.output} is a folder; give a file")
        check_writable(Path(arguments.output).parent, "--output")
    scores = evaluate(
        arguments.model,
        arguments.data,
        forget=arguments.forget,
        on_error=arguments.on_error,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        progress=_progress(arguments) == "bars",
    )
    text = json.dumps(scores, indent=2)
    if arguments.json:
        print(text)
    else:
        left_out = "\n".join(f"Left out: {line}" for line in left_out_lines(scores.get("skipped", {})))
        print("\n\n".join(part for part in (text_table(scores), class_table(scores["per_class"]), left_out) if part))
    if arguments.output:
        with writing(arguments.output):
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(Path(arguments.output), text + "\n")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from cliperase_fast.demo import clear_demo_run, run_demo
    from cliperase_fast.unlearning.run_directory import holds_run

    began = time.perf_counter()
    output = Path(arguments.output)
    clear_demo_run(output)
    interrupted = output.is_dir() and holds_run(output)
    result = run_demo(
        f"{arguments.data}#{arguments.forget}",
        output,
        test=arguments.test_data,
        resume=interrupted,
        progress=_progress(arguments) == "bars",
        **given_settings(arguments),
    )
    _print_result(result, output)
    print(f"\n{time.perf_counter() - began:.0f} s in all.")
    return 0


def _train_open_clip(arguments: argparse.Namespace) -> int:
    from cliperase_fast.integrations.open_clip import train_open_clip

    return train_open_clip(_passed_on(arguments))


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    given = arguments.arguments
    return given[1:] if given[:1] == ["--"] else given


def _plan(arguments: argparse.Namespace) -> int:
    from cliperase_fast.planning.plan import plan_text, step_of

    given = vars(arguments)
    print(plan_text(step_of(**{name: given[name] for name in given.keys() - {"run", "command", "local_rank"}})))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    return importlib.import_module(f"cliperase_fast.benchmarks.{arguments.what}").main(_passed_on(arguments))


def _backends(arguments: argparse.Namespace) -> int:
    from cliperase_fast.ops import backends

    print(backends())
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from cliperase_fast.unlearning.methods import methods

    print(methods())
    return 0


def _print_result(result: Any, output: Path) -> None:
    print(result.summary())
    print(f"\nmodel    {output / 'model'}")
    if result.config.report:
        print(f"report   {output / 'report.html'}")
    print(f"verdict  {result.verdict.short}")


if __name__ == "__main__":
    sys.exit(main())
