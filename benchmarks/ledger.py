"""Requests in a row, each undone, and sessions that are killed: what `cliperase_fast.Ledger` promises, measured.

    python -m benchmarks.ledger shapes     five requests on one model of shapes, and each of them undone
    python -m benchmarks.ledger ranks      three requests on digits on two ranks, beside one process
    python -m benchmarks.ledger kills      three requests on a tiny model, killed at random moments and resumed

The result file benchmarks/results/ledger.json is written after every part, and a further call continues with what is
missing; remove the file to measure again. The models are those of `cliperase-fast demo`, from its cache. The ledgers
are kept in runs/bench.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_model
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.ledger import Entry, Ledger
from cliperase_fast.progress import say
from cliperase_fast.storage import write_text_atomically

from .machine import RESULTS, describe, own_folder
from .records import record_text

FILE = "ledger.json"
DATE = "2026-01-01"  # of all requests, so that heads can be compared
# Two single classes and three kinds of shapes: 640 test images in all, of 2,000.
REQUESTS = {
    "red-circle": "class:red circle", "stars": "class:* star", "hearts": "class:* heart", "crosses": "class:* cross",
    "blue-square": "class:blue square",
}  # fmt: skip
FLOOR = 0.02  # points of retain accuracy, `UnlearnConfig.retain_floor`
CLOSE = 0.02  # how near to the base an undone concept must come
SESSION = {"seven": "class:seven", "three": "class:three", "one": "class:one"}
NUMBERS = {"steps": 30, "learning_rate": 3e-4, "batch_size": 128}  # of the session on digits
TINY = {"steps": 6, "learning_rate": 1e-3, "batch_size": 8, "checkpoint_every": 2}
COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "grey": (0.2, 0.2, 0.2)}
KILLS = 50


def original(source: str) -> str:
    return f"local-dir:{cached_model(open_source(source).train, demo_model_for(source))}"


class Record:
    """The result file, by part."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.path = folder / FILE

    @property
    def parts(self) -> dict[str, Any]:
        """What the file holds now: parts may be measured at the same time."""
        return json.loads(self.path.read_text(encoding="utf-8"))["parts"] if self.path.exists() else {}

    def set(self, part: str, content: Mapping[str, Any]) -> None:
        parts = {**self.parts, part: {**describe(), "command": f"python -m benchmarks.ledger {part}", **content}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, record_text({"parts": parts}) + "\n")


# requests in a row


def run_shapes(record: Record, folder: Path) -> None:
    """Forget in a row, then undo each request in a copy of the ledger: by merging, and as the ledger does by itself."""
    content: dict[str, Any] = dict(record.parts.get("shapes", {"requests": {}, "undo": {}}))
    ledger = Ledger(folder / "all", original("shapes"))
    for name, selector in REQUESTS.items():
        began = time.process_time()
        entry = ledger.forget(f"shapes#{selector}", id=name, by="benchmark", date=DATE)
        if name not in content["requests"]:
            content["requests"][name] = {
                "selector": selector, "cpu_seconds": time.process_time() - began, "run": entry.content["run"],
                "delta": next(iter(entry.content["deltas"].values())), "audits": _short(entry),
            }  # fmt: skip
            record.set("shapes", content)
            _tell(name, entry)
    ledger.verify()
    patch = ledger.export("stars", folder / "patch") if not (folder / "patch").exists() else folder / "patch"
    content["patch"] = json.loads((patch / "patch.json").read_text(encoding="utf-8"))["alone"]
    content["after"] = _after(ledger.entries[-1])
    record.set("shapes", content)
    for name, how in [*((name, "merge") for name in REQUESTS), *((name, "auto") for name in reversed(REQUESTS))]:
        key = f"{name} by {how}"
        if key not in content["undo"]:
            content["undo"][key] = _undone(folder, name, how)
            content["pooled"] = {way: _pooled(content["undo"].values(), way) for way in ("exact", "replay", "merge")}
            record.set("shapes", content)


def _undone(folder: Path, name: str, how: str) -> dict[str, Any]:
    """Undo a request in a copy of the ledger, which stays until it is done."""
    copy = folder / f"without-{name}-{how}"
    if not copy.exists():
        draft = folder / ".copy"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(folder / "all", draft)
        draft.rename(copy)
    ledger = Ledger(copy)
    began = time.process_time()
    entry = ledger.entries[-1] if name not in ledger.active else ledger.undo(name, how=how, date=DATE)
    ledger.verify()
    _tell(f"without {name} ({entry.content['how']})", entry)
    audits = _short(entry)
    others = {other: audit for other, audit in audits.items() if other != name}
    before = next(line for line in ledger.entries if line.id == name).content["before"]
    found = {
        "how": entry.content["how"], "undone": name, "concept": audits[name],
        "others_at_target": all(audit["at_target"] for audit in others.values()), "others": others,
        "bits_of_before": entry.weights == before, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip
    shutil.rmtree(copy)
    return found


def _short(entry: Entry) -> dict[str, Any]:
    """What the record keeps of the audits of a line."""
    return {
        name: {key: value for key, value in audit.items() if key not in ("file", "sha256")}
        for name, audit in entry.audits.items()
    }


def _after(entry: Entry) -> dict[str, Any]:
    """Whether all requests are at the target after the last one, and the largest loss of retain accuracy."""
    changes = [audit["retain_top1"]["now"] - audit["retain_top1"]["base"] for audit in entry.audits.values()]
    return {
        "at_target": [name for name, audit in entry.audits.items() if audit["at_target"]],
        "retain_change": min(changes),
        "within_floor": min(changes) >= -FLOOR,
    }


def _pooled(undone: Any, how: str) -> dict[str, Any] | None:
    """Pool the accuracy on the test images of undone concepts, in the base and after undoing."""
    audits = [one["concept"] for one in undone if one["how"] == how]
    pairs = sum(audit["forget_pairs"] for audit in audits)
    if not pairs:
        return None

    def accuracy(state: str) -> float:
        return sum(audit["forget_top1"][state] * audit["forget_pairs"] for audit in audits) / pairs

    base, now = accuracy("base"), accuracy("now")
    return {"images": pairs, "base": base, "now": now, "within": abs(now - base) <= CLOSE}


def _tell(name: str, entry: Entry) -> None:
    for request, audit in entry.audits.items():
        top1, level = audit["forget_top1"], audit["association"]
        print(
            f"{name}: {request} top-1 {top1['base']:.1%} -> {top1['now']:.1%}, association {level['base']:.3f} -> "
            f"{level['now']:.3f} (background {audit['background']:.3f}), retain {audit['retain_top1']['base']:.1%} -> "
            f"{audit['retain_top1']['now']:.1%}, at target: {audit['at_target']}",
            flush=True,
        )


# sessions that are killed


def session(folder: str, base: str) -> str:
    """Make three requests, or go on with those that are missing. Returns the head."""
    ledger = Ledger(folder, base)
    for name, selector in SESSION.items():
        ledger.forget(f"demo#{selector}", id=name, date=DATE, progress=False, **NUMBERS)
    ledger.verify()
    return ledger.head()


def tiny_session(folder: str) -> str:
    """The same with a model of random weights, which takes a few seconds."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    ledger = Ledger(folder, model)
    for name in ("red", "green", "blue"):
        forget, retain = (
            [pair for colour in COLOURS if (colour == name) == forgotten for pair in _squares(colour)]
            for forgotten in (True, False)
        )
        ledger.forget(forget, retain, id=name, date=DATE, progress=False, **TINY)
    ledger.verify()
    return ledger.head()


def _squares(colour: str, count: int = 12) -> list[tuple[torch.Tensor, str]]:
    """Noisy squares of a colour with their captions."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(list(COLOURS).index(colour)))
    return [(torch.tensor(COLOURS[colour])[:, None, None] + 0.3 * one, f"a {colour} square") for one in noise]


def run_kills(record: Record, kills: int, seed: int = 0) -> None:
    """Kill the session at random moments of its time, resume it, and compare the head with that of one never killed."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="ledger-") as work:
        _apart(tiny_session, f"{work}/first")  # starts the server of processes, which takes as long as a session
        began = time.perf_counter()
        head = _apart(tiny_session, f"{work}/whole")
        seconds = time.perf_counter() - began
        say("a session takes %.1f s", seconds)
        same, lines = 0, []
        for number in range(kills):
            folder = Path(work) / f"killed-{number}"
            process = _started(tiny_session, str(folder))
            process.join(rng.uniform(0, seconds))
            finished = not process.is_alive()
            process.kill()
            process.join()
            log = folder / "log.jsonl"
            lines.append(None if finished else log.read_text(encoding="utf-8").count("\n") if log.exists() else 0)
            found = _apart(tiny_session, str(folder))
            same += found == head
            outcome = "the same head" if found == head else found
            print(f"{number + 1}: killed with {lines[-1]} lines, {outcome}", flush=True)
            shutil.rmtree(folder)
        counts = {str(count): lines.count(count) for count in (0, 1, 2, 3, 4)}
        record.set(
            "kills",
            {"kills": kills, "same_head": same, "too_late": lines.count(None), "lines_when_killed": counts,
             "session_seconds": seconds},
        )  # fmt: skip


def run_ranks(record: Record) -> None:
    """Make the session on two ranks and in one process, and compare what the audits say."""
    base = original("demo")
    with tempfile.TemporaryDirectory(prefix="ledger-") as work:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [_started(_on_rank, rank, port, f"{work}/ranks", base) for rank in range(2)]
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError("a rank failed, see above")
        _apart(session, f"{work}/one", base)
        two, one = (Ledger(f"{work}/{name}").entries[-1] for name in ("ranks", "one"))
        record.set("ranks", {"two_ranks": _short(two), "one_process": _short(one), "ranks": two.content["ranks"]})


def _on_rank(rank: int, port: int, folder: str, base: str) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    session(folder, base)
    dist.destroy_process_group()


def _context() -> Any:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["cliperase_fast.ledger", "open_clip", "torchvision"])
    return found


def _started(function: Callable[..., Any], *arguments: Any) -> Any:
    process = _context().Process(target=function, args=arguments)
    process.start()
    return process


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a process of its own."""
    with _context().Pool(1) as pool:
        return pool.apply(function, arguments)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("shapes", "kills", "ranks"))
    parser.add_argument("--kills", type=int, default=KILLS, help=f"how many sessions are killed ({KILLS})")
    arguments = parser.parse_args(words)
    record = Record()
    if arguments.part == "shapes":
        folder = own_folder() / "ledger-shapes"
        folder.mkdir(parents=True, exist_ok=True)
        run_shapes(record, folder)
    elif arguments.part == "kills":
        run_kills(record, arguments.kills)
    else:
        run_ranks(record)


if __name__ == "__main__":
    main()
