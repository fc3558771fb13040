"""Requests in a row, each undone, and sessions that are killed: what `cliperase_fast.Ledger` promises, measured.

    python -m benchmarks.ledger shapes     five requests on one model of shapes, and each of them undone
    python -m benchmarks.ledger towers --shards ... --test-shards ...    two on pretrained towers (benchmarks.towers)
    python -m benchmarks.ledger ranks      the five requests on two ranks, beside one process
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_model
from cliperase_fast.demo_models import demo_model_for
from cliperase_fast.ledger import Entry, Ledger
from cliperase_fast.progress import bars_by_default, say
from cliperase_fast.storage import write_text_atomically

from .machine import RESULTS, describe, own_folder
from .records import add_shards, record_text, shards_of

FILE = "ledger.json"
DATE = "2026-01-01"  # of all requests, so that heads can be compared
# Two single classes and three kinds of shapes: 640 test images in all, of 2,000.
SHAPES = {
    "red-circle": "class:red circle", "stars": "class:* star", "hearts": "class:* heart", "crosses": "class:* cross",
    "blue-square": "class:blue square",
}  # fmt: skip
FLOOR = 0.02  # points of retain accuracy, `UnlearnConfig.retain_floor`
CLOSE = 0.02  # how far below the base an undone concept may stay
TOWERS = {"airplane": "class:airplane", "ship": "class:ship"}  # two classes that share the sky and the sea
TINY: dict[str, Any] = {"steps": 6, "learning_rate": 1e-3, "batch_size": 8, "checkpoint_every": 2}
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
        command = f"python -m benchmarks.ledger {part}{' --shards … --test-shards …' if part == 'towers' else ''}"
        parts = {**self.parts, part: {**describe(), "command": command, **content}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, record_text({"parts": parts}) + "\n")


# requests in a row


@dataclass(frozen=True)
class Study:
    """Requests in a row on one model, each of which is undone in a copy of the ledger.

    part: of the record. base, source, test: as `Ledger` and `Ledger.forget` take them. requests: selectors by id.
    undoable: those that later ones prepare the undoing of. ways: of undoing a request, see `Ledger.undo`. settings: of
    all requests.
    """

    part: str
    base: str
    source: str
    requests: Mapping[str, str]
    undoable: Sequence[str]
    ways: Sequence[tuple[str, str]]
    test: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def forget(self, ledger: Ledger, name: str, undoable: Sequence[str]) -> Entry:
        return ledger.forget(
            f"{self.source}#{self.requests[name]}", id=name, by="benchmark", date=DATE, test=self.test,
            undoable=[id for id in undoable if id in ledger.active and id != name], **self.settings,
        )  # fmt: skip


def shapes() -> Study:
    large = [name for name in SHAPES if name in ("stars", "hearts", "crosses")]  # 600 test images
    ways = [(name, how) for how in ("auto", "merge") for name in large]
    ways += [("blue-square", "auto"), ("crosses", "replay")]
    return Study("shapes", original("shapes"), "shapes", SHAPES, large, ways)


def towers(shards: str, test_shards: str) -> Study:
    from .towers import towers_model

    base = f"local-dir:{towers_model(shards, progress=bars_by_default())}"
    ways = [("ship", "auto"), ("airplane", "auto"), ("airplane", "merge")]
    return Study("towers", base, f"wds:{shards}", TOWERS, ["airplane"], ways, f"wds:{test_shards}")


def run_study(study: Study, record: Record, folder: Path) -> None:
    """Forget in a row, then undo requests in copies of the ledger. A further call goes on where one ended."""
    content: dict[str, Any] = dict(record.parts.get(study.part, {"requests": {}, "undo": {}}))
    ledger = Ledger(folder / "all", study.base)
    for name, selector in study.requests.items():
        began = time.process_time()
        entry = study.forget(ledger, name, study.undoable)
        if name not in content["requests"]:
            content["requests"][name] = {
                "selector": selector, "cpu_seconds": time.process_time() - began, "run": entry.content["run"],
                "delta": next(iter(entry.content["deltas"].values())), "prepared": list(entry.prepared),
                "audits": _short(entry.audits),
            }  # fmt: skip
            record.set(study.part, content)
            _tell(name, entry)
    ledger.verify()
    if "patch" not in content:
        first = next(iter(study.requests))
        patch = folder / "patch"
        if not patch.exists():
            ledger.export(first, patch)
        alone = json.loads((patch / "patch.json").read_text(encoding="utf-8"))["alone"]
        content["patch"] = {"request": first, **alone}
    content["after"] = _after(ledger.entries[-1])
    record.set(study.part, content)
    for name, how in study.ways:
        key = f"{name} by {how}"
        if key not in content["undo"]:
            content["undo"][key] = _undone(folder, name, how)
            ways = dict.fromkeys(one["how"] for one in content["undo"].values())
            content["pooled"] = {way: _pooled(content["undo"].values(), way) for way in ways}
            record.set(study.part, content)


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
    prepared = ledger.entries[len(ledger.entries) - 1 - (name not in ledger.active)].prepared.get(name)
    entry = ledger.entries[-1] if name not in ledger.active else ledger.undo(name, how=how, date=DATE)
    ledger.verify()
    _tell(f"without {name} ({entry.content['how']})", entry)
    audits = _short(entry.audits)
    others = {other: audit for other, audit in audits.items() if other != name}
    before = next(line for line in ledger.entries if line.id == name).content["before"]
    found = {
        "how": entry.content["how"], "undone": name, "concept": audits[name],
        "others_at_target": all(audit["at_target"] for audit in others.values()), "others": others,
        "bits_of_before": entry.weights == before,
        "bits_of_prepared": None if prepared is None else entry.weights == prepared["weights"],
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip
    shutil.rmtree(copy)
    return found


def _short(audits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the record keeps of the audits of a line."""
    return {
        name: {key: value for key, value in audit.items() if key not in ("file", "sha256")}
        for name, audit in audits.items()
    }


def _after(entry: Entry) -> dict[str, Any]:
    """Whether all requests are at the target after the last one, and the largest loss of retain accuracy."""
    changes = [audit["retain_top1"]["now"] - audit["retain_top1"]["base"] for audit in entry.audits.values()]
    return {
        "at_target": [name for name, audit in entry.audits.items() if audit["at_target"]],
        "retain_change": min(changes),
        "within_floor": min(changes) >= -FLOOR,
    }


def _pooled(undone: Any, how: str) -> dict[str, Any]:
    """Pool the accuracy on the test images of undone concepts, in the base and after undoing."""
    audits = [one["concept"] for one in undone if one["how"] == how]
    pairs = sum(audit["forget_pairs"] for audit in audits)

    def accuracy(state: str) -> float:
        return sum(audit["forget_top1"][state] * audit["forget_pairs"] for audit in audits) / pairs

    base, now = accuracy("base"), accuracy("now")
    return {"images": pairs, "base": base, "now": now, "within": now >= base - CLOSE}


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


def session(folder: str, study: Study) -> str:
    """Make the requests of a study, or those that are missing. Returns the head."""
    ledger = Ledger(folder, study.base)
    for name in study.requests:
        study.forget(ledger, name, [])
    ledger.verify()
    return ledger.head()


def tiny_session(folder: str) -> str:
    """Make three requests to a model of random weights, which takes a few seconds."""
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


def _squares(colour: str) -> list[tuple[torch.Tensor, str]]:
    """Noisy squares of a colour with their captions."""
    noise = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(list(COLOURS).index(colour)))
    return [(torch.tensor(COLOURS[colour])[:, None, None] + 0.3 * one, f"a {colour} square") for one in noise]


def run_kills(record: Record, kills: int) -> None:
    """Kill the session at random moments of its time, resume it, and compare the head with that of one never killed."""
    rng = random.Random(0)
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


def run_ranks(record: Record, study: Study, folder: Path, one_process: Path) -> None:
    """Make the requests of a study on two ranks, and compare the weights and the audits with those of one process.

    folder: of the ledger of the ranks, which goes on where it ended. one_process: the ledger of one process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_started(_on_rank, rank, port, str(folder), study) for rank in range(2)]
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError("a rank failed, see above")
    session(str(one_process), study)
    two, one = Ledger(folder), Ledger(one_process)
    pairs = [(line, one.entries[line.number]) for line in two.entries[1:]]
    record.set(
        "ranks",
        {"source": study.source, "ranks": two.entries[-1].content["ranks"],
         "same_weights": [line.id for line, other in pairs if line.weights == other.weights],
         "two_ranks": _short(two.entries[-1].audits), "one_process": _short(pairs[-1][1].audits)},
    )  # fmt: skip


def _on_rank(rank: int, port: int, folder: str, study: Study) -> None:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    session(folder, study)
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
    parser.add_argument("part", metavar="PART", choices=("shapes", "towers", "kills", "ranks"))
    parser.add_argument("--kills", type=int, default=KILLS, help=f"how many sessions are killed ({KILLS})")
    add_shards(parser, "towers")
    parser.add_argument("--steps", type=int, default=0, help="shapes, towers: of each request, to try; recorded apart")
    arguments = parser.parse_args(words)
    arguments.name = part = arguments.part
    record = Record()
    if part == "kills":
        run_kills(record, arguments.kills)
    elif part == "ranks":
        folder = own_folder() / "ledger-ranks"
        run_ranks(record, shapes(), folder / "two", folder / "one")
    else:
        study = shapes() if part == "shapes" else towers(*shards_of(parser, arguments))
        folder = own_folder() / f"ledger-{part}"
        if arguments.steps:
            folder = folder.with_name(f"{folder.name}-{arguments.steps}")
            study, record = replace(study, settings={"steps": arguments.steps}), Record(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run_study(study, record, folder)


if __name__ == "__main__":
    main()
