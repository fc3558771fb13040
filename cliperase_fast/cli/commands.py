"""What each command does with its parsed arguments. All return the exit code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from cliperase_fast.cli.settings import given_settings, settings_text
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data.selectors import make_reference
from cliperase_fast.data.sources import with_option
from cliperase_fast.errors import InputError
from cliperase_fast.progress import bars_by_default
from cliperase_fast.reading import read_mapping


def progress_style(arguments: argparse.Namespace) -> str:
    """Return bars, lines or none."""
    wanted = "none" if getattr(arguments, "quiet", False) else getattr(arguments, "progress", "none")
    if wanted == "auto":
        return "bars" if bars_by_default() else "lines"
    return wanted


def _name_classes(arguments: argparse.Namespace) -> None:
    """Add --class-names to the sources of pairs, as their option ?classnames=."""
    for flag in ("data", "test_data", "validation_data"):
        spec = getattr(arguments, flag, None)
        if spec is not None:
            setattr(arguments, flag, with_option(spec, "classnames", arguments.class_names))


def unlearn(arguments: argparse.Namespace) -> int:
    config = UnlearnConfig.from_dict(given_settings(arguments))
    if arguments.print_config:
        print(settings_text(config), end="")
        return 0
    from cliperase_fast.unlearning import unlearn

    _name_classes(arguments)
    retain = retain_pairs(arguments)
    result = unlearn(
        arguments.model,
        make_reference(arguments.data, arguments.forget),
        retain,
        test=arguments.test_data,
        validation=arguments.validation_data,
        oracle=arguments.oracle,
        teacher=arguments.teacher,
        config=config,
        output_dir=arguments.output,
        resume=arguments.resume,
        progress=progress_style(arguments) == "bars",
    )
    if os.environ.get("RANK", "0") == "0":  # of several ranks the first
        _print_result(result, Path(arguments.output))
    return 0


def retain_pairs(arguments: argparse.Namespace) -> str:
    """Return the retain set: "rest", a stream, or a selector of --data."""
    if arguments.retain == "rest" or arguments.retain.startswith("stream:"):
        return arguments.retain
    return make_reference(arguments.data, arguments.retain)


def evaluate(arguments: argparse.Namespace) -> int:
    from cliperase_fast.evaluation import evaluate
    from cliperase_fast.report import class_table, text_table
    from cliperase_fast.report.wording import left_out_lines
    from cliperase_fast.storage import check_output_file, write_text_atomically, writing

    if arguments.output:  # before it takes minutes
        check_output_file(arguments.output, "--output=")
    _name_classes(arguments)
    scores = evaluate(
        arguments.model,
        arguments.data,
        forget=arguments.forget,
        templates=arguments.template,
        long_captions=arguments.long_captions,
        on_error=arguments.on_error,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        progress=progress_style(arguments) == "bars",
    )
    text = json.dumps(scores, indent=2)
    if arguments.output:  # before the text, whose reader may stop, as `| head` does
        with writing(arguments.output):
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(Path(arguments.output), text + "\n")
    if arguments.json:
        print(text)
    else:
        left_out = "\n".join(f"Left out: {line}" for line in left_out_lines(scores.get("skipped", {})))
        print("\n\n".join(part for part in (text_table(scores), class_table(scores["per_class"]), left_out) if part))
    return 0


def audit(arguments: argparse.Namespace) -> int:
    from cliperase_fast.auditing import audit
    from cliperase_fast.reading import printable_data

    output = Path(arguments.output) if arguments.output else None
    if output is not None:
        _check_audit_folder(output)
    _name_classes(arguments)
    retain = retain_pairs(arguments)
    result = audit(
        arguments.before,
        arguments.after,
        make_reference(arguments.data, arguments.forget),
        retain,
        oracle=arguments.oracle,
        test=arguments.test_data,
        synonyms=_read_synonyms(arguments.synonyms),
        other=_named_sources(arguments.other, "other"),
        holdouts=_named_sources(arguments.holdout, "holdout"),
        templates=arguments.template,
        depth=arguments.depth,
        test_fraction=arguments.test_fraction,
        output_dir=output,
        seed=arguments.seed,
        long_captions=arguments.long_captions,
        on_error=arguments.on_error,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        progress=progress_style(arguments) == "bars",
    )
    if os.environ.get("RANK", "0") != "0":  # of several ranks the first prints
        return 0
    if arguments.json:
        print(json.dumps(printable_data(result.to_dict()), indent=2, allow_nan=False))
        return 0
    print(result.summary())
    if output is not None:
        print()
        for name, file in (("audit", "audit.json"), ("report", "audit.html")):
            if (output / file).is_file():
                print(f"{name:<8} {output / file}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from cliperase_fast.comparing import ALL, FILE, PAGE, compare

    _name_classes(arguments)
    retain = retain_pairs(arguments)
    names = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    result = compare(
        arguments.model,
        make_reference(arguments.data, arguments.forget),
        retain,
        methods=ALL if names == [ALL] else names,
        output_dir=arguments.output,
        oracle=arguments.oracle,
        oracle_seconds=arguments.oracle_seconds,
        test=arguments.test_data,
        depth=arguments.depth,
        recipes=arguments.recipes,
        config=given_settings(arguments),
        progress=progress_style(arguments) == "bars",
    )
    print(result.summary())
    print(f"\nscores   {result.folder / FILE}\nreport   {result.folder / PAGE}")
    return 1 if len(result.failed) == len(result.methods) else 0


def _check_audit_folder(folder: Path) -> None:
    """Raise InputError unless the folder is new, empty, that of an earlier audit, or that of a run."""
    from cliperase_fast.storage import check_writable
    from cliperase_fast.unlearning.run_directory import holds_run

    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output={folder} is a file; give a folder")
    check_writable(folder, "--output=")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "audit.json").is_file() and not holds_run(folder):
        raise InputError(
            f"--output={folder} holds other files: give a new folder, that of an earlier audit (its files are "
            "replaced), or that of an unlearning run"
        )


def _read_synonyms(path: str | None) -> dict[str, list[str]] | None:
    """Return the file's {class: [other names]}. YAML's own reading of 7, no and 12:30 is not meant; all are names."""
    if path is None:
        return None
    found = read_mapping(path, "the synonyms file", as_text=True)
    return {str(name): list(map(str, others)) if isinstance(others, list) else others for name, others in found.items()}


def _named_sources(words: list[str] | None, flag: str) -> dict[str, str] | None:
    """Return {name: source} of words NAME=SOURCE."""
    found: dict[str, str] = {}
    for word in words or ():
        name, equals, source = word.partition("=")
        if not (equals and name and source):
            raise InputError(f"--{flag}={word!r} is not NAME=SOURCE")
        if name in found:
            raise InputError(f"--{flag} names {name!r} twice: give each its own name")
        found[name] = source
    return found or None


def demo(arguments: argparse.Namespace) -> int:
    from cliperase_fast.demo import clear_demo_run, run_demo
    from cliperase_fast.demo_models import demo_model_for
    from cliperase_fast.unlearning.advice import Advice, advising
    from cliperase_fast.unlearning.methods import make_method
    from cliperase_fast.unlearning.run_directory import holds_run

    began = time.perf_counter()
    output = Path(arguments.output)
    forget = arguments.forget or demo_model_for(arguments.data).forget
    if forget is None:
        raise InputError(f"--forget is missing: say what to forget of {arguments.data!r}, such as class:apple")
    make_method(UnlearnConfig.from_dict(given_settings(arguments)))  # a wrong setting is an error before the training
    clear_demo_run(output)
    interrupted = output.is_dir() and holds_run(output)
    with advising(Advice(go_on="give the same command again")):  # it has no --resume
        result = run_demo(
            make_reference(arguments.data, forget),
            output,
            test=arguments.test_data,
            oracles=arguments.oracles,
            resume=interrupted,
            progress=progress_style(arguments) == "bars",
            **given_settings(arguments),
        )
    _print_result(result, output)
    print(f"\n{time.perf_counter() - began:.0f} s in all.")
    return 0


def train_open_clip(arguments: argparse.Namespace) -> int:
    from cliperase_fast.integrations.open_clip import train_open_clip

    return train_open_clip(_passed_on(arguments))


def _passed_on(arguments: argparse.Namespace) -> list[str]:
    given = arguments.arguments
    return given[1:] if given[:1] == ["--"] else given


def plan(arguments: argparse.Namespace) -> int:
    from cliperase_fast.planning.plan import plan_data, plan_text, step_of

    given = vars(arguments)
    step = step_of(**{name: given[name] for name in given.keys() - {"run", "command", "local_rank", "json"}})
    print(json.dumps(plan_data(step), indent=2) if arguments.json else plan_text(step))
    return 0


def bench(arguments: argparse.Namespace) -> int:
    return importlib.import_module(f"cliperase_fast.benchmarks.{arguments.what}").main(_passed_on(arguments))


def backends(arguments: argparse.Namespace) -> int:
    from cliperase_fast.ops import backends

    print(backends())
    return 0


def methods(arguments: argparse.Namespace) -> int:
    from cliperase_fast.unlearning.methods import methods

    print(methods())
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.doctor import examine, report

    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else report(found))
    return 1 if found["problems"] else 0


def completion(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.completion import script

    print(script(arguments.parser, arguments.shell), end="")
    return 0


def _print_result(result: Any, output: Path) -> None:
    print(result.summary())
    print(f"\nmodel    {output / 'model'}")
    if result.config.report:
        print(f"report   {output / 'report.html'}")
    if result.audit is not None:
        print(f"audit    {output / 'audit.json'}")
    print(f"verdict  {result.verdict.short}")
