"""Recompute the hashes of a ledger, and say what it holds in short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.ledger.deltas import State, apply_delta, digest_of, state_of
from cliperase_fast.ledger.log import Entry, Log, Step
from cliperase_fast.ledger.weights import Weights
from cliperase_fast.reading import read_text
from cliperase_fast.storage import file_digest

SUMMARY = "ledger.json"
_LARGEST = 1 << 28


def verify(folder: Path, log: Log, weights: Weights, head: str | None) -> None:
    """Recompute all hashes; the chain of `log` was checked when it was read. See `Ledger.verify`."""
    if head is not None and head not in {entry.hash for entry in log.entries}:
        raise UnlearningError(
            f"the log of {folder} does not have the head {head[:12]}… (its last line has {log.head[:12]}…): it was "
            "changed or cut since that head was kept, or the head is of another ledger"
        )
    _check_summary(folder, log)
    for entry in log.entries:
        for audits in (entry.audits, *(state["audits"] for state in entry.prepared.values())):
            for name, audit in audits.items():
                _check_audit(folder / audit["file"], audit["sha256"], name)
    start = state_of(weights.base(log.base).module)
    current = _Walk(weights, start)
    digest = log.base.weights
    for entry in log.entries[1:]:
        _require(entry.content["before"] == digest, folder, entry, "does not continue the weights of the line before")
        digest = current.digest(entry.steps)
        _require(digest == entry.weights, folder, entry, "names other weights than its deltas lead to")
    for id in dict.fromkeys(id for entry in log.entries for id in entry.prepared):
        walk = _Walk(weights, start)
        for entry in log.entries:
            if id in entry.prepared:
                found = walk.digest([Step(**step) for step in entry.prepared[id]["steps"]])
                right = found == entry.prepared[id]["weights"]
                _require(right, folder, entry, f"names other weights without {id!r} than its deltas lead to")


class _Walk:
    """The digests of the states that lists of steps lead to; steps that a list shares with the one before are kept."""

    def __init__(self, weights: Weights, start: State) -> None:
        self.weights, self.start = weights, start
        self.states: list[tuple[Step, State]] = []

    def digest(self, steps: Sequence[Step]) -> str:
        """Return the digest of the weights. Raises `UnlearningError` for a delta that is not as the log has it."""
        shared = 0
        while shared < min(len(self.states), len(steps)) and self.states[shared][0] == steps[shared]:
            shared += 1
        del self.states[shared:]
        for step in steps[shared:]:
            state = dict(self._last())
            try:
                apply_delta(state, self.weights.read(step))
            except ValueError as error:
                raise UnlearningError(f"{self.weights.folder / step.file} does not fit the base: {error}") from error
            self.states.append((step, state))
        return digest_of(self._last())

    def _last(self) -> State:
        return self.states[-1][1] if self.states else self.start


def _require(holds: bool, folder: Path, entry: Entry, what: str) -> None:
    if not holds:
        raise UnlearningError(f"line {entry.number + 1} of the log of {folder} {what}: it was changed")


def _check_audit(path: Path, sha256: str, name: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise UnlearningError(f"the audit {path} cannot be read ({error.strerror}); restore it from a copy") from error
    if found != sha256:
        raise UnlearningError(
            f"the audit {path} of request {name!r} was changed: its SHA-256 is {found[:12]}… and the log has "
            f"{sha256[:12]}…; restore it from a copy"
        )


def _check_summary(folder: Path, log: Log) -> None:
    """Compare ledger.json with the log. After a kill it may lack the last lines, but never has others."""
    path = folder / SUMMARY
    if not path.exists():
        return
    try:
        found = json.loads(read_text(path, _LARGEST))
        chain = [line["hash"] for line in found["chain"]]
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise UnlearningError(
            f"{path} cannot be read ({error}); remove it, the next request writes it again"
        ) from error
    if not chain or chain != [entry.hash for entry in log.entries][: len(chain)]:
        raise UnlearningError(f"{path} has another chain than the log: one of the two was changed; restore both")
    differs = _difference(found, summary(replace(log, entries=log.entries[: len(chain)])))
    if differs is not None:
        raise UnlearningError(
            f"{path} says something else than the log, at {differs}: it was changed, or written by another version; "
            "remove it, the next request writes it again"
        )


def _difference(found: Any, expected: Any, place: str = "") -> str | None:
    """Return the place of the first value that differs, such as "requests.0.note"; None if all are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(key, found.get(key), expected.get(key)) for key in dict.fromkeys([*expected, *found])]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(str(number), *both) for number, both in enumerate(zip(found, expected, strict=True))]
    else:
        return None if found == expected else place or "the top"
    inner = (_difference(one, other, f"{place}.{key}".lstrip(".")) for key, one, other in pairs)
    return next((differs for differs in inner if differs is not None), None)


def above_target(entries: Sequence[Entry], entry: Entry, id: str) -> str:
    """Say that a request is above its target after a line, and whether it was before. entries: all of the log."""
    if (entry.kind, entry.id) == ("forget", id):
        return f"request {id} did not reach its target: its pairs are still known"
    earlier = (line.audits[id] for line in reversed(entries[: entry.number]) if id in line.audits)
    before = next(earlier, {}).get("at_target")
    if before is None:
        return f"request {id} is above its target"
    return f"request {id} is above its target" + (": its pairs are known again" if before else ", as it was before")


def summary(log: Log) -> dict[str, Any]:
    """Return the content of ledger.json, from which the page is made too.

    chain: the hash of each line. requests: of each its line, whether it is in force, and its audits then and now.
    unaudited: why requests have no audit now.
    """
    undone, current = log.undone(), _current(log)
    return {
        "format": log.base.content["format"],
        "base": {key: log.base.content[key] for key in ("reference", "library", "weights")},
        "head": log.head,
        "weights": log.last.weights,
        "chain": [
            {"number": entry.number, "kind": entry.kind, "id": entry.id, "hash": entry.hash} for entry in log.entries
        ],
        "requests": [
            {
                **{key: entry.content[key] for key in ("id", "date", "by", "note", "selection", "settings", "held")},
                "undone": None if entry.id not in undone else _undone(undone[entry.id]),
                "prepared": list(entry.prepared),
                "delta": next(iter(entry.content["deltas"].values())),
                "versions": entry.content["versions"],
                "ranks": entry.content["ranks"],
                "then": entry.audits.get(entry.id),
                "now": current.get(entry.id),
            }
            for entry in log.requests()
        ],
        "unaudited": {id: why for id, why in log.last.content.get("unaudited", {}).items() if id not in current},
    }


def _current(log: Log) -> dict[str, Mapping[str, Any]]:
    """Return by request the newest audit of the current weights; of one that was undone, that of undoing it.

    An audit of other weights says nothing about these, also where the pairs were not at hand for a newer one.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for entry in log.entries:
        if entry.weights == log.last.weights:
            found.update(entry.audits)
    for id, entry in log.undone().items():
        found.pop(id, None)
        if id in entry.audits:
            found[id] = entry.audits[id]
    return found


def _undone(entry: Entry) -> dict[str, Any]:
    return {key: entry.content[key] for key in ("date", "by", "note", "how")}
