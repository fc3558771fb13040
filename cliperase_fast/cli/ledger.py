"""The commands `ledger` and `apply`: requests over time, and patches from other ledgers."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cliperase_fast.cli.settings import add_settings, given_settings
from cliperase_fast.data.selectors import make_reference
from cliperase_fast.errors import InputError

EXAMPLES = """\
examples:
  cliperase-fast ledger start ledgers/shop --model ViT-B-32:openai
  cliperase-fast ledger forget ledgers/shop --data folder:/photos --forget class:cat --by 'letter of 1 March' --id cat
  cliperase-fast ledger undo ledgers/shop cat --by 'letter of 9 June'
  cliperase-fast ledger model ledgers/shop --output served
  cliperase-fast ledger head ledgers/shop                       (keep it elsewhere)
  cliperase-fast ledger verify ledgers/shop --head SHA256
  cliperase-fast ledger export ledgers/shop cat --output patches/cat
  cliperase-fast ledger report ledgers/shop

docs/ledger.md tells what the ledger promises. A request that was interrupted goes on when the same command is given
again, with the same --id.
"""
APPLY_EXAMPLES = """\
examples:
  cliperase-fast apply patches/cat --model ViT-B-32:openai --output without-cats

The model must be the base of the patch, which is compared by SHA-256, and so is the result.
"""
_LIBRARIES = ("open_clip", "transformers")  # that save a whole model


def add_ledger(
    parser: argparse.ArgumentParser, model_help: str, add_progress: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add the actions of `ledger` to its parser."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        found.add_argument("ledger", metavar="DIR", help="the ledger")
        return found

    start = action("start", "start a ledger from a model")
    start.add_argument("--model", required=True, help=model_help)
    forget = action("forget", "make the current model forget, and record it")
    forget.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, as in `unlearn`")
    forget.add_argument("--forget", required=True, metavar="SELECTOR", help="which of them to forget")
    forget.add_argument("--retain", default="rest", metavar="SELECTOR", help="which to keep (default: all others)")
    forget.add_argument(
        "--test",
        "--test-data",
        dest="test_data",
        metavar="SOURCE",
        help="where to measure (default: the source's test split)",
    )
    forget.add_argument(
        "--validation",
        "--validation-data",
        dest="validation_data",
        metavar="SOURCE",
        help="where to choose the learning rate and the checkpoint (default: a share val_fraction of the pairs)",
    )
    forget.add_argument("--id", help="of the request (default: its number)")
    forget.add_argument(
        "--undoable",
        default="all",
        metavar="IDS",
        help="earlier requests that can be undone later without any pairs, which takes a further run for each: all, "
        "none, or ids with commas between them (default: all)",
    )
    forget.add_argument("--config", metavar="FILE", help="YAML or JSON with settings; flags win")
    undo = action("undo", "take a request back, and record it")
    undo.add_argument("id", metavar="ID", help="the request")
    undo.add_argument(
        "--how",
        default="auto",
        choices=("auto", "prepared", "replay", "merge"),
        help="auto: exactly for the last request, else from what later requests prepared, else by replaying these if "
        "their pairs are at hand, else by merging deltas (default: auto)",
    )
    undo.add_argument("--device", help="where to replay and to audit (default: that of the request)")
    for one in (forget, undo):
        one.add_argument("--by", default="", metavar="TEXT", help="who asked")
        one.add_argument("--note", default="", metavar="TEXT", help="why, or anything else")
        one.add_argument("--date", help="of the request, such as 2026-03-01 (default: now)")
    action("list", "the requests, and what the current model knows of them")
    action("head", "the last hash of the chain, to be kept elsewhere")
    verify = action("verify", "compute every hash again")
    verify.add_argument("--head", metavar="SHA256", help="a head that was kept elsewhere")
    export = action("export", "write one request as a patch for the same base")
    export.add_argument("id", metavar="ID", help="the request")
    export.add_argument("--output", required=True, metavar="PATCH", help="a new folder")
    model = action("model", "write the current model to a folder")
    model.add_argument("--output", required=True, metavar="FOLDER", help="a new folder")
    _add_library(model)
    report = action("report", "write report.html, one page with everything")
    report.add_argument("--output", metavar="FILE", help="where (default: report.html in the ledger)")
    for one in (forget, undo, verify, export, model):
        one.add_argument("--model", metavar="MODEL", help="the base, where it is not where the ledger says")
        add_progress(one)
    add_settings(forget, without=("audit", "report"))


def add_apply(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Add the arguments of `apply`."""
    parser.add_argument("patch", metavar="PATCH", help="a folder that `ledger export` wrote")
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder for the result")
    _add_library(parser)


def ledger(arguments: argparse.Namespace) -> int:
    from cliperase_fast.config import UnlearnConfig
    from cliperase_fast.distributed import init_distributed

    with init_distributed(getattr(arguments, "device", None) or "auto", UnlearnConfig.rank_timeout):
        return _ACTIONS[arguments.action](arguments)


def apply(arguments: argparse.Namespace) -> int:
    from cliperase_fast.ledger import apply_patch

    output = _new_folder(arguments.output)
    _save(apply_patch(arguments.patch, arguments.model), output, arguments.library)
    print(f"model    {output}")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    found = _open(arguments)
    print(f"head     {found.head()}")
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.commands import progress_style, retain_pairs
    from cliperase_fast.config import UnlearnConfig
    from cliperase_fast.ledger.settings import METHOD

    settings = {"method": METHOD, **given_settings(arguments)}
    found = _open(arguments)
    entry = found.forget(
        make_reference(arguments.data, arguments.forget),
        retain_pairs(arguments),
        id=arguments.id,
        by=arguments.by,
        note=arguments.note,
        date=arguments.date,
        test=arguments.test_data,
        validation=arguments.validation_data,
        config=UnlearnConfig.from_dict(settings),
        undoable={"all": True, "none": False}.get(arguments.undoable, _names(arguments.undoable)),
        progress=progress_style(arguments) == "bars",
    )
    return _told(found, entry)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _undo(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.commands import progress_style

    found = _open(arguments)
    entry = found.undo(
        arguments.id,
        how=arguments.how,
        by=arguments.by,
        note=arguments.note,
        date=arguments.date,
        device=arguments.device,
        progress=progress_style(arguments) == "bars",
    )
    return _told(found, entry)


def _list(arguments: argparse.Namespace) -> int:
    from cliperase_fast.report import ledger_table

    print(ledger_table(_open(arguments).summary()))
    return 0


def _head(arguments: argparse.Namespace) -> int:
    print(_open(arguments).head())
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    found = _open(arguments)
    found.verify(arguments.head)
    print(f"all hashes of {found.dir} are right; head {found.head()}")
    for file in found.unnamed():
        print(f"note: no line of the log names {file}: an unfinished request left it, or the ledger did not write it")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.commands import progress_style
    from cliperase_fast.reading import in_bytes

    found = _open(arguments)
    patch = found.export(arguments.id, arguments.output, progress=progress_style(arguments) == "bars")
    content = json.loads((patch / "patch.json").read_text(encoding="utf-8"))
    print(f"patch    {patch}, {in_bytes(content['bytes'])}")
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from cliperase_fast.models import load_model

    output = _new_folder(arguments.output)
    _save(load_model(_open(arguments).model()), output, arguments.library)
    print(f"model    {output}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from cliperase_fast.storage import check_output_file

    if arguments.output:
        check_output_file(arguments.output, "--output=")
    print(f"report   {_open(arguments).report(arguments.output)}")
    return 0


_ACTIONS = {
    "start": _start,
    "forget": _forget,
    "undo": _undo,
    "list": _list,
    "head": _head,
    "verify": _verify,
    "export": _export,
    "model": _model,
    "report": _report,
}


def _add_library(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--library", choices=_LIBRARIES, help="convert it for this library (default: that of the base)")


def _open(arguments: argparse.Namespace) -> Any:
    from cliperase_fast.ledger import Ledger

    folder = Path(arguments.ledger)
    if arguments.action != "start" and not (folder / "log.jsonl").exists():
        raise InputError(f"{folder} is not a ledger; `cliperase-fast ledger start {folder} --model MODEL` makes it one")
    return Ledger(folder, getattr(arguments, "model", None))


def _told(found: Any, entry: Any) -> int:
    """Print all requests after a new line. Returns 1 if one that must be forgotten is above the target."""
    if os.environ.get("RANK", "0") != "0":  # of several ranks the first prints
        return 0
    from cliperase_fast.ledger.checking import above_target
    from cliperase_fast.report import ledger_table

    print(ledger_table(found.summary()))
    for id in entry.returned:
        print(f"\n{above_target(found.entries, entry, id)}; it is in force")
    print(f"\nhead     {entry.hash}")
    return 1 if entry.returned else 0


def _new_folder(path: str) -> Path:
    from cliperase_fast.storage import check_writable

    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output={path} is in use: give a new folder")
    check_writable(folder, "--output=")
    return folder


def _save(adapter: Any, folder: Path, library: str | None) -> None:
    from cliperase_fast.ledger.patches import converted
    from cliperase_fast.models import load_model
    from cliperase_fast.storage import writing

    found = adapter
    if library not in (None, adapter.kind):
        found = load_model(converted(adapter, library), tokenizer=adapter.tokenizer and adapter.tokenizer.source)
        found.transform = adapter.transform
    with writing(folder):
        found.save(folder)
