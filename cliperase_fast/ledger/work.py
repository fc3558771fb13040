"""The work behind `Ledger`: lock the directory, unlearn on top of a state, measure all requests, and record a line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from cliperase_fast._version import installed_versions
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.distributed import Ranks, init_distributed
from cliperase_fast.errors import InputError
from cliperase_fast.ledger.checking import SUMMARY, above_target, summary
from cliperase_fast.ledger.deltas import State, digest_of, merge_undone, state_of
from cliperase_fast.ledger.leftovers import AUDITS, DELTAS, WORK, note_file, remove_leftovers
from cliperase_fast.ledger.log import FILE, FORMAT, Entry, Log, Step, returned
from cliperase_fast.ledger.measuring import Measured, audit_requests, encoding, stored_audit, summarise
from cliperase_fast.ledger.pairs import HOLDING, DataAtHand, RequestPairs, held_among, without_earlier
from cliperase_fast.ledger.settings import run_advice
from cliperase_fast.ledger.weights import Weights, reference_of
from cliperase_fast.models import ClipAdapter
from cliperase_fast.progress import bars_by_default, say
from cliperase_fast.reading import printable_data
from cliperase_fast.storage import Locked, file_digest, lock, write_text_atomically, writing
from cliperase_fast.unlearning import unlearn
from cliperase_fast.unlearning.advice import advising

_LOCK = ".lock"
_WITHOUT = "-without-"  # between the ids in the names of files that prepare undoing


class LedgerWork:
    """What a ledger holds, and how its lines come about; `Ledger` has the calls for users."""

    dir: Path
    _weights: Weights
    _data: DataAtHand
    _log: Log

    @contextmanager
    def _working(self, settings: UnlearnConfig) -> Iterator[Ranks]:
        """Lock the ledger and read its log again. Raises `InputError` if another process works there."""
        require_group()
        with init_distributed(settings.device, settings.rank_timeout) as ranks, ExitStack() as stack:
            ranks.run_on_first(lambda: self._lock(stack))
            self._log = ranks.run_on_all(lambda: Log.read(self.dir / FILE))
            ranks.agree({"the head of the ledger": self._log.head})
            ranks.run_on_all(lambda: self._base() and None)
            yield ranks

    def _lock(self, stack: ExitStack) -> None:
        try:
            with writing(self.dir / _LOCK):
                stack.enter_context(lock(self.dir / _LOCK))
        except Locked as holder:
            raise InputError(f"the ledger {self.dir} is in use by {holder}: wait for it to end") from None

    def _start(self) -> None:
        """Make a new or empty directory a ledger. Raises `InputError` for a directory that holds something else."""
        try:
            if (self.dir / FILE).is_file():
                return
            if self.dir.exists() and not self.dir.is_dir():
                raise InputError(f"{self.dir} is a file; a ledger is a directory")
            foreign = self.dir.is_dir() and any(path.name not in (_LOCK, f".{FILE}.tmp") for path in self.dir.iterdir())
        except OSError as error:
            raise InputError(f"{self.dir} cannot be read ({error.strerror}): give a ledger's directory") from error
        if foreign:
            raise InputError(f"{self.dir} is not a ledger and holds other files: give a new directory, or a ledger's")
        if self._weights.given is None:
            raise InputError(f"{self.dir} is not a ledger yet: give the model that it starts from, base=MODEL")
        base = self._weights.load()
        with writing(self.dir), ExitStack() as stack:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock(stack)
            if not (self.dir / FILE).is_file():  # another process may have started it meanwhile
                Log(self.dir / FILE).append(
                    {
                        "format": FORMAT,
                        "kind": "base",
                        "reference": reference_of(self._weights.given),
                        "library": base.kind,
                        "weights": digest_of(state_of(base.module)),
                    }
                )

    def _base(self) -> ClipAdapter:
        return self._weights.base(self._log.base)

    def _state(self, steps: Sequence[Step]) -> State:
        return self._weights.state(self._log.base, steps)

    def _adapter(self, steps: Sequence[Step]) -> ClipAdapter:
        return self._weights.adapter(self._log.base, self._state(steps))

    def _require_active(self, id: str) -> None:
        self._log.find(id)
        undone = self._log.undone().get(id)
        if undone is not None:
            raise InputError(f"request {id!r} was undone on {undone.content['date']} and is not in force")

    def _recorded(self, id: str, content: Mapping[str, Any]) -> Entry | None:
        """Return the line of a request that was made before, None for a new id."""
        entry = next((entry for entry in self._log.requests() if entry.id == id), None)
        if entry is None:
            if _WITHOUT in id:
                raise InputError(f"id={id!r} has {_WITHOUT!r}, which names files of prepared states: give another id")
            return None
        undone = self._log.undone().get(id)
        if undone is not None:
            raise InputError(
                f"request {id!r} was undone on {undone.content['date']}: give another id, such as {id}-2, to make it "
                "again"
            )
        wanted = json.loads(json.dumps(printable_data(dict(content))))
        words = {"selection": "other pairs", "settings": "other settings"}
        different = [words[name] for name, value in wanted.items() if entry.content[name] != value]
        if different:
            raise InputError(
                f"request {id!r} is recorded with {' and '.join(different)}: give the new request another id"
            )
        say("request %s is recorded already", id)
        return entry

    def _warn_of_missing(self, ranks: Ranks) -> None:
        """Warn of requests in force whose pairs are not at hand, which are neither held down nor left out of retain."""
        missing = {entry.id: found for entry in self._log.active() if isinstance(found := self._data.find(entry), str)}
        for id, why in missing.items() if ranks.first else ():
            warnings.warn(
                f"request {id!r} is neither held down nor measured, and if its pairs are among those to keep, they are "
                f"trained back in: {why}",
                stacklevel=4,
            )

    def _next_id(self) -> str:
        taken = {entry.id for entry in self._log.entries}
        number = len(self._log.entries)
        while f"{number:04d}" in taken:
            number += 1
        return f"{number:04d}"

    def _unlearned(
        self,
        name: str,
        own: RequestPairs,
        earlier: Sequence[Entry],
        steps: Sequence[Step],
        settings: UnlearnConfig,
        ranks: Ranks,
        progress: bool | None,
    ) -> tuple[State, State, dict[str, Any]]:
        """Unlearn pairs on top of the steps. Returns the state before and after, and facts for the line.

        earlier: the requests that must stay forgotten. An interrupted run of the same request goes on.
        """
        at_hand = {entry.id: self._data.find(entry) for entry in earlier}
        held = [found for found in at_hand.values() if isinstance(found, RequestPairs)]
        holds = settings.method in HOLDING and bool(held) and not own.single
        pairs = ranks.run_on_all(lambda: without_earlier(own, held, settings))
        if holds:
            pairs = ranks.run_on_all(lambda: held_among(pairs, held))
        before = self._state(steps)
        key = {
            "settings": settings.to_dict(),
            "pairs": own.fingerprints(),
            "held": [one.fingerprints()["forget"] for one in held],
            "steps": [step.sha256 for step in steps],
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        with advising(run_advice(self.dir / WORK)):
            result = unlearn(
                self._weights.adapter(self._log.base, before),
                pairs.forget,
                pairs.retain,
                test=pairs.test,
                validation=None if own.single else pairs.validation,
                config=replace(settings, audit=False, report=False, overlap="drop"),
                output_dir=self.dir / WORK / f"{name}-{digest[:16]}",
                resume=True,
                progress=progress,
            )
        selection, recipe = result.selection, result.record["recipe"] or {}
        facts = {
            "held": [id for id, found in at_hand.items() if holds and isinstance(found, RequestPairs)],
            "not_at_hand": {id: found for id, found in at_hand.items() if isinstance(found, str)},
            "run": {
                "step": selection["step"],
                "learning_rate": recipe.get("learning_rate"),
                "target": (recipe.get("target") or {}).get("association"),
                "association": selection["association"],
                "target_reached": selection["target_reached"],
                "within_floor": selection["within_floor"],
            },
        }
        return before, state_of(result.model), facts

    def _prepared(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the states that were prepared for undoing requests, by request, if they belong to the current one."""
        steps = self._log.last.steps
        lines = (entry for entry in reversed(self._log.entries) if entry.prepared)
        return next((entry.prepared for entry in lines if entry.steps == steps), {})

    def _undoable(self, given: bool | Sequence[str]) -> list[str] | None:
        """Return the requests to prepare the undoing of, None for all. Raises `InputError` for an unknown one."""
        if isinstance(given, bool):
            return None if given else []
        for id in given:
            self._require_active(id)
        return list(given)

    def _way(self, id: str, how: str, *, last: bool) -> str:
        """Return how a request is undone. last: whether nothing followed it. Raises `InputError` for a wrong `how`."""
        if last and how != "merge":
            return "exact"
        ready = id in self._prepared()
        missing = self._missing_for_replay(id)
        if how == "prepared" and not ready:
            raise InputError(
                f"request {id!r} was not prepared for undoing in the current state: replay or merge, with how="
            )
        if how == "replay" and missing:
            raise InputError(f"request {id!r} cannot be undone by replaying later ones: {missing}")
        if how != "auto":
            return how
        return "prepared" if ready else "merge" if missing else "replay"

    def _without(self, id: str) -> list[Step] | None:
        """Return the steps to the current state without a request; None if nobody prepared it."""
        steps = self._log.last.steps
        if (steps[-1].id, steps[-1].kind) == (id, "forget"):
            return steps[:-1]
        found = self._prepared().get(id)
        return None if found is None else [Step(**step) for step in found["steps"]]

    def _prepare(
        self,
        line: Mapping[str, Any],
        own: RequestPairs,
        undoable: Sequence[str] | None,
        settings: UnlearnConfig,
        ranks: Ranks,
        progress: bool | None,
    ) -> dict[str, dict[str, Any]]:
        """Make a new request again on top of each state without one of the earlier requests.

        These are the states after undoing the earlier request; its pairs and those of the new one are not needed for
        it any more. line: of the new request. undoable: the earlier requests, None for all. Returns by request the
        steps to its state, their weights, the new delta, and the audits.
        """
        name, number, prepared = line["id"], len(self._log.entries), {}
        for id in [entry.id for entry in self._log.active() if undoable is None or entry.id in undoable]:
            steps = self._without(id)
            if steps is None:
                continue
            say("preparing to undo request %s", id)
            earlier = [entry for entry in self._log.active() if entry.id != id]
            before, after, facts = self._unlearned(name, own, earlier, steps, settings, ranks, progress)
            file = f"{number:04d}-{name}{_WITHOUT}{id}"
            step, delta = self._store(file, name, facts["run"], before, after, line["tolerance"], ranks)
            found = [*steps, step]
            state = self._state(found)
            measured, missing = self._to_measure({**line, "of": id}, found, in_full=False)
            audits = self._audited(state, measured, f"{_WITHOUT}{id}", settings, ranks, progress)
            for above in returned(audits):
                say("request %s would be above the target after undoing %s: see its audit", above, id)
            prepared[id] = {
                "steps": [one.to_dict() for one in found],
                "weights": digest_of(state),
                "delta": delta,
                "run": facts["run"],
                "audits": audits,
                "unaudited": missing,
            }
        return prepared

    def _replay_plan(self, id: str, steps: Sequence[Step]) -> tuple[int, list[Entry]]:
        """Return how many steps a replay without the request keeps, and the requests that it repeats.

        Requests that were taken back by merging, behind the first step that changes, are left out of the replay too.
        """
        merged = {step.id for step in steps if step.kind == "merge"}
        first = min(at for at, step in enumerate(steps) if step.kind == "forget" and step.id == id)
        while True:  # what a merge behind the first step takes back may lie before it
            behind = {step.id for step in steps[first:] if step.kind == "merge"}
            start = min([first, *(at for at, step in enumerate(steps) if step.kind == "forget" and step.id in behind)])
            if start == first:
                break
            first = start
        again = [step.id for step in steps[first:] if step.kind == "forget" and step.id not in merged | {id}]
        return first, [self._log.find(name) for name in again]

    def _missing_for_replay(self, id: str) -> str:
        """Say which pairs a replay would need and are not at hand; empty if it can be done."""
        _, again = self._replay_plan(id, self._log.last.steps)
        found = {entry.id: self._data.find(entry) for entry in again}
        return "; ".join(f"request {name!r}: {why}" for name, why in found.items() if isinstance(why, str))

    def _replayed(
        self, id: str, number: int, device: str | None, ranks: Ranks, progress: bool | None
    ) -> tuple[list[Step], dict[str, Any]]:
        """Repeat the requests behind `id` without it. Returns the new steps, and descriptions of the new deltas."""
        steps = self._log.last.steps
        keep, again = self._replay_plan(id, steps)
        found, deltas = list(steps[:keep]), {}
        for entry in again:
            say("replaying request %s", entry.id)
            own = self._data.find(entry)
            assert isinstance(own, RequestPairs)
            settings = UnlearnConfig.from_dict(entry.content["settings"])
            settings = settings if device is None else replace(settings, device=device)
            earlier = [self._log.find(step.id) for step in in_force(found)]
            before, after, facts = self._unlearned(entry.id, own, earlier, found, settings, ranks, progress)
            file = f"{number:04d}-{entry.id}"
            step, delta = self._store(file, entry.id, facts["run"], before, after, entry, ranks)
            found.append(step)
            deltas[step.file] = delta
        return found, deltas

    def _merged(self, id: str, place: int, number: int, ranks: Ranks) -> tuple[list[Step], dict[str, Any]]:
        """Take a request back by its delta alone."""
        steps = self._log.last.steps
        before, after, current = (self._state(part) for part in (steps[:place], steps[: place + 1], steps))
        merged = merge_undone(before, after, current)
        step, delta = self._store(f"{number:04d}-undo-{id}", id, None, current, merged, self._log.find(id), ranks)
        return [*steps, step], {step.file: delta}

    def _store(
        self,
        name: str,
        id: str,
        run: Mapping[str, Any] | None,
        before: State,
        after: State,
        like: Entry | float,
        ranks: Ranks,
    ) -> tuple[Step, dict[str, Any]]:
        """Write a delta on the first rank.

        run: the facts of the run that it comes from; None for one that takes a request back. like: its tolerance, or
        the line whose tolerance it takes.
        """
        tolerance = like if isinstance(like, float) else float(like.content["tolerance"])
        file, kind = f"{DELTAS}/{name}.safetensors", "merge" if run is None else "forget"
        step, delta = ranks.run_on_first(lambda: self._weights.write(file, id, kind, before, after, tolerance))
        return (step if run is None else replace(step, accepted=_accepted(run))), delta

    def _alone(
        self, entry: Entry, state: State, settings: UnlearnConfig, ranks: Ranks, progress: bool | None
    ) -> dict[str, Any] | None:
        """Return the scores of a request's pairs in a state without any other request; None if they are not at hand."""
        pairs = self._data.find(entry)
        if isinstance(pairs, str):
            return None
        how = ranks.run_on_all(lambda: encoding(settings, ranks, shown(progress)))
        base, current = self._base(), self._weights.adapter(self._log.base, state)
        request = Measured(entry.id, pairs, False, _accepted(entry.content["run"]))
        return summarise(audit_requests(base, current, [request], how)[entry.id], request, base)

    def _record(
        self,
        content: Mapping[str, Any],
        steps: Sequence[Step],
        deltas: Mapping[str, Any],
        settings: UnlearnConfig,
        ranks: Ranks,
        progress: bool | None,
        known: Mapping[str, Any] = MappingProxyType({}),
    ) -> Entry:
        """Measure all requests in the state that the steps lead to, and add the line. All ranks call it together.

        known: audits of this state that were made earlier, for requests whose pairs are not at hand.
        """
        state = self._state(steps)
        measured, unmeasured = self._to_measure(content, steps)
        audits = self._audited(state, measured, "", settings, ranks, progress)
        known = {name: audit for name, audit in known.items() if name in unmeasured}

        def write() -> None:
            line = {
                **content,
                "before": self._log.last.weights,
                "weights": digest_of(state),
                "steps": [step.to_dict() for step in steps],
                "deltas": dict(deltas),
                "audits": {**audits, **known},
                "unaudited": {name: why for name, why in unmeasured.items() if name not in known},
                "ranks": ranks.size,
                "versions": installed_versions("torch", "open_clip_torch", "transformers", "numpy"),
            }
            entry = self._log.append(line)
            for id in entry.returned:
                say("%s, see its audit", above_target(self._log.entries, entry, id))
            remove_leftovers(self.dir, self._log)
            with writing(self.dir / SUMMARY, "the request is recorded"):
                write_text_atomically(self.dir / SUMMARY, json.dumps(summary(self._log), indent=2) + "\n")
            shutil.rmtree(self.dir / WORK, ignore_errors=True)

        ranks.run_on_first(write)
        self._log = ranks.run_on_all(lambda: Log.read(self.dir / FILE))
        return self._log.last

    def _audited(
        self,
        state: State,
        requests: Sequence[Measured],
        suffix: str,
        settings: UnlearnConfig,
        ranks: Ranks,
        progress: bool | None,
    ) -> dict[str, dict[str, Any]]:
        """Audit requests in a state, and write what was found to files. Returns what the log holds, by request."""
        how = ranks.run_on_all(lambda: encoding(settings, ranks, shown(progress)))
        base = self._base()
        audits = audit_requests(base, self._weights.adapter(self._log.base, state), requests, how)
        number = len(self._log.entries)

        def write() -> dict[str, dict[str, Any]]:
            found = {}
            for request in requests:
                audit = audits[request.id]
                file = f"{AUDITS}/{number:04d}-{request.id}{suffix}.json"
                with writing(self.dir / file, "the ledger is as it was"):
                    note_file(self.dir, file)
                    (self.dir / AUDITS).mkdir(exist_ok=True)
                    text = json.dumps(printable_data(stored_audit(audit)), indent=2, allow_nan=False)
                    write_text_atomically(self.dir / file, text + "\n")
                found[request.id] = {
                    **summarise(audit, request, base),
                    "file": file,
                    "sha256": file_digest(self.dir / file),
                }
            return found

        return ranks.run_on_first(write)

    def _to_measure(
        self, content: Mapping[str, Any], steps: Sequence[Step], *, in_full: bool = True
    ) -> tuple[list[Measured], dict[str, str]]:
        """Return the requests in force and the one that the line takes back, and why others are not at hand.

        steps: to the state. in_full: whether a new request is measured in full.
        """
        accepted = {step.id: step.accepted for step in steps if step.kind == "forget"}
        found, missing = [], {}
        of = content.get("of")
        for entry in self._log.active():
            pairs = self._data.find(entry)
            if isinstance(pairs, str):
                missing[entry.id] = pairs
            else:
                target = accepted.get(entry.id)  # of its last run, which may be a replay
                target = _accepted(entry.content["run"]) if target is None else target
                found.append(Measured(entry.id, pairs, entry.id == of, target))
        if content["kind"] == "forget":
            own = self._data.known(content["id"])
            found.append(Measured(content["id"], own, False, accepted[content["id"]], in_full))
        return found, missing


def shown(progress: bool | None) -> bool:
    """Return whether bars are shown: as given, else where standard error is a terminal."""
    return bars_by_default() if progress is None else progress


def _accepted(run: Mapping[str, Any]) -> float | None:
    """Return the association at which the run of a request called it forgotten.

    A run counts the association of the validation pairs up to one standard error, so that it may have accepted a value
    above its target.
    """
    accepted = run.get("association") if run["target_reached"] else None
    return run["target"] if run["target"] is None or accepted is None else max(run["target"], accepted)


def in_force(steps: Sequence[Step]) -> list[Step]:
    """Return the steps of requests that no later step takes back."""
    merged = {step.id for step in steps if step.kind == "merge"}
    return [step for step in steps if step.kind == "forget" and step.id not in merged]


def require_group() -> None:
    """Raise `InputError` in a process that a launcher started and that has not joined the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise InputError(
            "a ledger on several ranks needs torch.distributed: call torch.distributed.init_process_group() before "
            "Ledger(...)"
        )
