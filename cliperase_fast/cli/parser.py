"""The arguments of every command, and their help."""

from __future__ import annotations

import argparse
from typing import Any

from cliperase_fast._version import __version__
from cliperase_fast.cli import commands, generate, inspect, select
from cliperase_fast.cli import ledger as ledgers
from cliperase_fast.cli.completion import SHELLS
from cliperase_fast.cli.settings import add_settings, demo_forget
from cliperase_fast.config import UnlearnConfig

_SELECTORS = """\
selectors:
  class:apple              pairs of this class; several with commas; * is any text, ? one character
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


_WITH_DATA = ("unlearn", "evaluate", "audit", "compare", "ledger", "demo", "inspect", "select")
_EXAMPLES_OF = {
    "inspect": inspect.EXAMPLES,
    "select": select.EXAMPLES,
    "generate": generate.EXAMPLES,
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
    "audit": """\
examples:
  cliperase-fast audit --before ViT-B-32:openai --after local-dir:runs/apple/model --data cifar100:/data \\
      --forget class:apple --output runs/apple
  cliperase-fast audit --before local-dir:base --after local-dir:runs/cat/model --data folder:/photos \\
      --forget class:cat --oracle local-dir:without-cats-1 --oracle local-dir:without-cats-2 --depth --output audit
  cliperase-fast audit ... the same ... --json > scores.json

what it tells, with 95 % intervals, for each model on the test pairs:
  forgetting   whether the concept is still known: the cosine of forget images with their own captions
               (association), their rank, zero-shot accuracy, and accuracy under other templates and names
  collateral   what changed beside it: retain classes, the class that lost most, the nearest classes, other data
  depth        with --depth, what attacks on copies of the model bring back: a linear probe on its layers,
               relearning from few pictures, soft prompts, rounded weights (minutes instead of seconds)
  gap          with --oracle, how far the model is from models that never saw the forget pairs, and how far
               these are from each other; without one, unrelated pairs of the original are the reference
An accuracy of 0 % alone does not show that a concept is gone. A model that pushes the concept further away than
not knowing it explains is reported as over-forgotten: that marks the concept instead of removing it.
""",
    "compare": """\
examples:
  cliperase-fast compare --methods all --model local-dir:base --data folder:/photos --forget class:cat --output runs/cat
  cliperase-fast compare --methods calibrated,cliperase,retain_finetune --model ViT-B-32:openai --data cifar100:/data \\
      --forget class:apple --oracle local-dir:without-apples-1 --oracle local-dir:without-apples-2 --output runs/apple

Every method gets the same model, pairs, splits and audit, and a run directory of its own in --output. The command
goes on after a method that fails, and the same command again continues where it ended. `cliperase-fast methods`
lists the methods. A setting that a method does not use is left out for it.
""",
    "ledger": ledgers.EXAMPLES,
    "apply": ledgers.APPLY_EXAMPLES,
    "demo": """\
examples:
  cliperase-fast demo
  cliperase-fast demo --forget class:three --output runs/three
  cliperase-fast demo --data shapes --forget 'class:red circle' --output runs/shapes
  cliperase-fast demo --data personas --forget 'class:person 0* phone' --output runs/phones
  cliperase-fast demo --oracles 3           (also audit the result against three models that never saw a seven)

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
    "doctor": """\
examples:
  cliperase-fast doctor
  cliperase-fast doctor --json > doctor.json         (to attach to a bug report)

Each backend computes small losses and their gradients, which are compared with float64. The exit code is 1 if a backend
fails or a library is missing, broken or of an unsupported version. Optional libraries and backends that are missing are
listed only.
""",
    "completion": """\
examples:
  eval "$(cliperase-fast completion bash)"           (in ~/.bashrc; zsh in ~/.zshrc)
  cliperase-fast completion fish > ~/.config/fish/completions/cliperase-fast.fish

The script does not start cliperase-fast. Print it again after an update.
""",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cliperase-fast",
        description="Make a CLIP model forget chosen image-text associations and keep the rest (CLIPErase).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cliperase-fast {__version__}")
    # The deepspeed launcher adds it; the environment has the same value.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")

    unlearn = _command(subparsers, "unlearn", "make a model forget", commands.unlearn)
    unlearn.usage = "cliperase-fast unlearn --model MODEL --data SOURCE --forget SELECTOR --output DIR [settings]"
    _add_model(unlearn)
    unlearn.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, see below")
    _add_class_names(unlearn)
    unlearn.add_argument("--forget", required=True, metavar="SELECTOR", help="which of them to forget, see below")
    unlearn.add_argument("--retain", default="rest", metavar="SELECTOR", help="which to keep (default: all others)")
    _add_test(unlearn)
    unlearn.add_argument(
        "--validation",
        "--validation-data",
        dest="validation_data",
        metavar="SOURCE",
        help="where to choose the learning rate and the checkpoint (default: a share val_fraction of the pairs)",
    )
    unlearn.add_argument("--teacher", metavar="MODEL", help="stay consistent with this model (default: --model itself)")
    _add_oracle(unlearn, "with --audit: ")
    unlearn.add_argument("--output", required=True, metavar="DIR", help="the run directory")
    unlearn.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    unlearn.add_argument("--config", metavar="FILE", help="YAML or JSON with settings; flags win over it")
    unlearn.add_argument(
        "--paper", choices=("cifar100", "cc12m", "flickr30k"), help="start from the paper's settings for this data"
    )
    unlearn.add_argument(
        "--recipe", metavar="METHOD", help="start from the settings that a search on validation data found for a method"
    )
    unlearn.add_argument(
        "--print-config",
        action=_PrintConfig,
        help="print all settings as YAML for --config, and do nothing else; needs no other flag",
    )
    _add_progress(unlearn)
    add_settings(unlearn)

    evaluate = _command(subparsers, "evaluate", "zero-shot accuracy and retrieval of a model", commands.evaluate)
    _add_model(evaluate)
    evaluate.add_argument("--data", required=True, metavar="SOURCE", help="what to measure on, see below")
    _add_class_names(evaluate)
    evaluate.add_argument("--forget", metavar="SELECTOR", help="report these pairs and the others apart")
    _add_captions(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print all scores as JSON, every class, for programs")
    evaluate.add_argument("--output", metavar="FILE", help="also write the scores there, as JSON")
    _add_encoding(evaluate)
    _add_progress(evaluate)

    _add_audit(subparsers)
    _add_compare(subparsers)
    ledger = _command(subparsers, "ledger", "requests to forget over time, each undoable and provable", ledgers.ledger)
    ledgers.add_ledger(ledger, _MODEL, _add_progress)
    apply = _command(subparsers, "apply", "add a request of somebody's ledger to the same base", ledgers.apply)
    ledgers.add_apply(apply, _MODEL)

    look = _command(subparsers, "inspect", "what data and a forget set hold, before training", inspect.inspect)
    inspect.add_arguments(look)
    _add_progress(look)

    find = _command(subparsers, "select", "find pairs by a text or example images", select.select)
    _add_model(find)
    select.add_arguments(find)
    _add_encoding(find)
    _add_progress(find)

    paint = _command(subparsers, "generate", "what a text-to-image pipeline paints after unlearning", generate.generate)
    generate.add_arguments(paint, _MODEL)
    _add_progress(paint)

    demo = _command(subparsers, "demo", "train a small CLIP and make it forget, from nothing", commands.demo)
    demo.usage = "cliperase-fast demo [--data SOURCE] [--forget SELECTOR] [--oracles N] [--output DIR] [settings]"
    demo.add_argument("--data", default="demo", metavar="SOURCE", help="what to train on (default: demo, the digits)")
    demo.add_argument("--forget", metavar="SELECTOR", help=f"default: {demo_forget()}")
    _add_test(demo)
    demo.add_argument(
        "--oracles",
        type=_at_least_one,
        metavar="N",
        help="also train N models without the forget pairs, and audit the result against them (default: none)",
    )
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="the run directory (default: runs/demo)")
    _add_progress(demo)
    add_settings(demo)

    train = _command(
        subparsers, "train-open-clip", "open_clip's own trainer, with the fused losses", commands.train_open_clip
    )
    train.usage = "cliperase-fast train-open-clip -- ARGUMENTS OF open_clip_train.main"
    train.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="passed on as they are")

    plan = _command(subparsers, "plan", "memory and time of a step on many GPUs, computed", commands.plan)
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
    plan.add_argument("--strip-mib", type=int, metavar="MIB", help="memory for blocks (default: CLIPERASE_STRIP_MIB)")

    plan.add_argument("--json", action="store_true", help="print the figures as JSON, for programs")

    bench = _command(subparsers, "bench", "measure the losses and unlearn(), beside others", commands.bench)
    bench.usage = "cliperase-fast bench {" + ",".join(_BENCHMARKS) + "} ..."
    bench.add_argument("what", choices=_BENCHMARKS, metavar="{" + ",".join(_BENCHMARKS) + "}", help="what to measure")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="passed on as they are")

    _command(subparsers, "methods", "the unlearning methods, with their options", commands.methods)
    _command(subparsers, "backends", "what computes the losses here", commands.backends)
    doctor = _command(subparsers, "doctor", "what is installed, and whether it computes correctly", commands.doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON, for programs")
    completion = _command(subparsers, "completion", "completion of commands and flags in a shell", commands.completion)
    completion.add_argument("shell", choices=SHELLS, help="whose script to print")
    completion.set_defaults(parser=parser)
    return parser


class _PrintConfig(argparse.Action):
    """A flag with which no other one is required."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *values: Any) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            action.required = False


def _command(subparsers: Any, name: str, description: str, run: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
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


_MODEL = (
    "ARCH:TAG as open_clip names them (ViT-B-32:openai), ARCH:/path/to/checkpoint, local-dir:DIR, "
    "or a transformers CLIP folder"
)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL)


def _add_class_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="the names of the classes of a source with ?classnames=: a line 'KEY NAME' for each, or JSON {key: name}",
    )


def _add_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test",
        "--test-data",
        dest="test_data",
        metavar="SOURCE",
        help="where to measure (default: the source's test split)",
    )


def _add_captions(parser: argparse.ArgumentParser) -> None:
    """Add the captions of classes, and what to do with captions that are too long."""
    parser.add_argument(
        "--template", action="append", metavar="TEXT", help="caption of a class, 'a photo of a {}'; may be repeated"
    )
    parser.add_argument(
        "--long-captions",
        default="error",
        choices=("error", "truncate"),
        help="captions longer than the model's context: an error, or cut (default: error)",
    )


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    """Add what to do with pairs that cannot be used, and how the encoders run."""
    parser.add_argument(
        "--on-error",
        default="raise",
        choices=("raise", "skip"),
        help="pairs that cannot be used, such as unreadable images: raise, or skip and count (default: raise)",
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch (default: 256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")


def _add_oracle(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument(
        "--oracle",
        action="append",
        metavar="MODEL",
        help=f"{when}a model trained like the original without the forget pairs; repeat it, three or more are best",
    )


def _add_audit(subparsers: Any) -> None:
    audit = _command(subparsers, "audit", "what unlearning left behind, and what it damaged", commands.audit)
    audit.usage = "cliperase-fast audit --before MODEL --after MODEL --data SOURCE --forget SELECTOR [--output DIR] ..."
    audit.add_argument("--before", required=True, metavar="MODEL", help=f"the original: {_MODEL}")
    audit.add_argument("--after", required=True, metavar="MODEL", help="the unlearned model")
    _add_oracle(audit, "")
    audit.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, see below")
    _add_class_names(audit)
    audit.add_argument("--forget", required=True, metavar="SELECTOR", help="which of them were forgotten, see below")
    audit.add_argument("--retain", default="rest", metavar="SELECTOR", help="which were kept (default: all others)")
    _add_test(audit)
    audit.add_argument(
        "--test-fraction",
        type=float,
        default=UnlearnConfig.test_fraction,
        metavar="X",
        help="share that is scored where the data has no test split, as of the run (default: %(default)s)",
    )
    audit.add_argument(
        "--other",
        action="append",
        metavar="NAME=SOURCE",
        help="data with other classes that the model should still name; may be repeated",
    )
    audit.add_argument(
        "--holdout",
        action="append",
        metavar="KEY=SOURCE#SELECTOR",
        help="pairs that unlearning never saw; KEY is association (of the same entities) or identity (of others)",
    )
    audit.add_argument(
        "--synonyms",
        metavar="FILE",
        help="YAML or JSON with `class: [other names]` (default: a small list for digits, shapes and CIFAR-10)",
    )
    _add_captions(audit)
    _add_depth(audit)
    audit.add_argument("--output", metavar="DIR", help="write audit.json and audit.html there; a run's folder fits")
    audit.add_argument("--json", action="store_true", help="print what audit.json holds, for programs")
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="of intervals and attacks (default: 0)")
    _add_encoding(audit)
    _add_progress(audit)


def _add_compare(subparsers: Any) -> None:
    compare = _command(subparsers, "compare", "several methods on the same model and pairs", commands.compare)
    compare.usage = (
        "cliperase-fast compare --methods all --model MODEL --data SOURCE --forget SELECTOR --output DIR [settings]"
    )
    compare.add_argument("--methods", default="all", metavar="NAMES", help="all, or names with commas (default: all)")
    _add_model(compare)
    compare.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, see below")
    _add_class_names(compare)
    compare.add_argument("--forget", required=True, metavar="SELECTOR", help="which of them to forget, see below")
    compare.add_argument("--retain", default="rest", metavar="SELECTOR", help="which to keep (default: all others)")
    _add_test(compare)
    _add_oracle(compare, "")
    compare.add_argument(
        "--oracle-seconds", type=float, metavar="S", help="how long training one of them took, to be shown beside"
    )
    _add_depth(compare)
    compare.add_argument("--output", required=True, metavar="DIR", help="the folder of the runs and of the comparison")
    compare.add_argument("--config", metavar="FILE", help="YAML or JSON with settings for all methods; flags win")
    compare.add_argument(
        "--no-recipes",
        dest="recipes",
        action="store_false",
        help="start from the methods' defaults, not from their recipes (see unlearn --recipe)",
    )
    _add_progress(compare)
    add_settings(compare, without=("method", "method_options", "audit"))


def _add_depth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth",
        nargs="?",
        const=True,
        default=False,
        choices=("full",),
        help="also attack copies of the models; full: relearn from 1, 4 and 16 pictures and other data too",
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


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)
