"""The shared parts of the benchmarks' command lines: options, records, plots, and the comparison of two records."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.ops.autograd import KEEP_VARIABLE, cache_budget

from .batches import DATA, DTYPES, LOSSES
from .compare import comparison
from .loss_report import text
from .machine import IN_CHECKOUT, RESULTS, abilities_text, describe, own_folder
from .providers import every_provider, version

PEERS = ("inf-cl", "memeff", "cut-cross-entropy", "liger-kernel", "siglip-kernel")

Record = dict[str, Any]


def parser(what: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all of loss, memory and scaling have."""
    known = list(every_provider())
    formatter = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(f"cliperase-fast bench {what}", description=description, formatter_class=formatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    p.add_argument("--sizes", type=numbers, help="N, pairs in the retain batch, with commas")
    p.add_argument("--widths", type=numbers, help="D, width of the features")
    p.add_argument("--dtypes", type=some_of(list(DTYPES)), help=f"some of {', '.join(DTYPES)}")
    p.add_argument("--loss", type=some_of(LOSSES), default=["cliperase"], help=f"some of {', '.join(LOSSES)}")
    p.add_argument("--data", type=some_of(DATA), default=["peaked"], help="peaked: a trained model's; random")
    p.add_argument("--providers", type=some_of(known), help=f"some of {', '.join(known)}")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add_output(p, what)
    return p


def add_output(p: argparse.ArgumentParser, what: str) -> None:
    """Where results go, and what to do in place of measuring."""
    p.set_defaults(what=what)
    place = "benchmarks/results" if IN_CHECKOUT else "the current folder"
    p.add_argument("--json", type=Path, nargs="?", const=True, metavar="PATH",
                   help=f"where to write the record; without PATH into {place}; "
                   f"else {own_folder() / f'{what}-DEVICE.json'}")  # fmt: skip
    p.add_argument("--plots", type=Path, metavar="DIR", help="where to draw the pictures (default: beside the record)")
    p.add_argument("--no-plots", action="store_true", help="draw none")
    p.add_argument(
        "--from", type=Path, dest="source", metavar="JSON", help="show (and plot) this record, measure nothing"
    )
    p.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="show what changed from A to B")
    p.add_argument("--quick", action="store_true", help="a few small cases, a minute or two on two cores")


def begin(what: str, arguments: argparse.Namespace, words: Sequence[str], settings: dict[str, Any]) -> Record:
    """A record without its rows, `runs`."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; use --device cpu")
    torch.set_num_threads(arguments.threads)
    command = shlex.join(["cliperase-fast", "bench", what, *words])
    record = {"benchmark": what, "command": command, **describe(), "device": device_slug(arguments.device)}
    record["versions"].update({name: found for name in PEERS if (found := version(name)) is not None})
    record["versions"]["cuda"] = torch.version.cuda if arguments.device == "cuda" else None
    record["keep_mib"] = cache_budget(torch.device(arguments.device)) >> 20
    return {**record, "settings": settings, "runs": []}


def record_path(what: str, arguments: argparse.Namespace, committed: bool = False) -> Path:
    """Where the record goes. committed: among the results, though not asked to."""
    if isinstance(arguments.json, Path):
        return arguments.json
    folder = RESULTS if (arguments.json or committed) and IN_CHECKOUT else own_folder()
    return folder / f"{what}-{device_slug(arguments.device)}.json"


def save(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out = os.environ.get("OUT")  # a folder to leave copies in
    if out:
        shutil.copy(path, Path(out) / path.name)


def run(
    arguments: argparse.Namespace,
    path: Path,
    measure: Callable[[Path], tuple[Record, int]],
    shown: Callable[[Record], str],
) -> int:
    """Measure (or read, or compare), draw, print; the exit status."""
    if arguments.compare:
        before, after = (_read(one) for one in arguments.compare)
        print(text(comparison(before, after)))
        return 0
    if arguments.source is not None:
        record, status = _read(arguments.source), 0
        plots = arguments.plots
    else:
        began = time.perf_counter()
        print(f"{arguments.what}: the record goes to {path}", file=sys.stderr, flush=True)
        record, status = measure(path)
        save(record, path)
        how = "done" if status == 0 else "done, but something failed, see above,"
        print(f"{arguments.what}: {how} in {time.perf_counter() - began:.0f} s; written to {path}", file=sys.stderr)
        plots = None if arguments.no_plots else arguments.plots or path.with_suffix("")
    if plots is not None:
        from .plots import draw

        for picture in draw(record, plots):
            print(f"drawn {picture}", file=sys.stderr)
    print(f"{shown(record)}\n\n{circumstances(record)}")
    return status


def circumstances(record: Record) -> str:
    """What the figures hold for: the processor, whose code ran, and how much `keep` may keep."""
    machine = record["machine"]
    words = f"{machine['processor']} ({abilities_text(machine)})"
    if machine["gpu"]:
        words += f", {machine['gpu']}"
    if "keep_mib" in record:
        words += (
            f"\nkeep budget {record['keep_mib']:,} MiB ({KEEP_VARIABLE}): memory grows linearly with N, plus what "
            "keep='similarities', or 'auto' where it saves time, keeps within it"
        )
    return words


def _read(path: Path) -> Record:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is not a record of a benchmark: {error}") from error


def device_slug(device: str) -> str:
    """cpu, or the GPU's name: h200."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").replace("geforce", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def numbers(given: str) -> list[int]:
    try:
        found = [int(word.replace("_", "")) for word in _words(given)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given!r} is not a list of whole numbers such as 1024,4096") from error
    if any(number < 1 for number in found) or not found:
        raise argparse.ArgumentTypeError(f"{given!r}: numbers from 1 on")
    return found


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(given: str) -> list[str]:
        for word in _words(given):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not known; use {', '.join(known)}")
        return _words(given)

    return parse


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]
