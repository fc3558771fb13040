"""`Ledger`: requests to forget over time, each of which can be undone and proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.defaults import plain_torch
from cliperase_fast.distributed import init_distributed
from cliperase_fast.errors import InputError
from cliperase_fast.ledger.checking import summary, verify
from cliperase_fast.ledger.deltas import TOLERANCE, digest_of
from cliperase_fast.ledger.leftovers import unnamed_files
from cliperase_fast.ledger.log import FILE, Entry, Log, Step, check_id, checked_date
from cliperase_fast.ledger.pairs import DataAtHand, open_request, selection_of
from cliperase_fast.ledger.patches import check_folder, converted, write_patch
from cliperase_fast.ledger.settings import ledger_settings
from cliperase_fast.ledger.weights import Weights
from cliperase_fast.ledger.work import LedgerWork, require_group
from cliperase_fast.plurals import counted
from cliperase_fast.reading import user_path
from cliperase_fast.report import ledger_page
from cliperase_fast.storage import output_folder, write_text_atomically, writing

_HOW = ("auto", "prepared", "replay", "merge")


class Ledger(LedgerWork):
    """What a model must forget, request by request, in a directory.

    dir: the directory; a missing or empty one becomes a ledger. base: the model that all requests start from, as
        `unlearn()` takes it; None for the one that the ledger names. It is stored by reference and SHA-256, not copied.
    tokenizer, transform: needed only if the base does not have its own.

    log.jsonl has a line for each request, with the SHA-256 of the line before it; deltas/ has the change of weights of
    each request, and audits/ what was measured after it. Images and captions are not stored. A process that is killed
    loses no finished request. On several ranks, call `torch.distributed.init_process_group()` first; the first rank
    writes.

    Raises `InputError` for a directory that is not a ledger, and for another base than the ledger's.
    """

    @plain_torch()
    def __init__(
        self,
        dir: str | Path,
        base: Any = None,
        *,
        tokenizer: Any = None,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.dir = output_folder(dir, "dir=")
        self._weights = Weights(self.dir, base, tokenizer, transform)
        self._data = DataAtHand()
        require_group()
        with init_distributed("cpu", UnlearnConfig.rank_timeout) as ranks:
            ranks.run_on_first(self._start)
            self._log = ranks.run_on_all(lambda: Log.read(self.dir / FILE))
            if base is not None:
                ranks.run_on_all(lambda: self._base() and None)

    def __repr__(self) -> str:
        return f"<Ledger {self.dir}: {counted(len(self._log.active()), 'request')} in force, head {self.head()[:12]}>"

    @property
    def entries(self) -> list[Entry]:
        """All lines of the log; the first one is the base."""
        return list(self._log.entries)

    @property
    def active(self) -> list[str]:
        """The ids of the requests in force, in their order."""
        return [entry.id for entry in self._log.active()]

    def summary(self) -> dict[str, Any]:
        """Return what ledger.json holds: the chain, and each request with its audits then and now."""
        return summary(self._log)

    def head(self) -> str:
        """Return the SHA-256 of the last line. Keep it outside the ledger: it proves all that came before it."""
        return self._log.head

    @plain_torch()
    def verify(self, head: str | None = None) -> bool:
        """Compute every hash again: the lines, the base, the deltas, the audits and the weights after each line.

        head: what `head()` returned earlier. The log must have the line with it; later lines may have been added.
        Returns True. Raises `UnlearningError` that names the first that differs.
        """
        self._log = Log.read(self.dir / FILE)
        verify(self.dir, self._log, self._weights, head)
        return True

    def unnamed(self) -> list[str]:
        """Return the files in deltas/ and audits/ that no line names, relative to the ledger.

        A request that is under way or was killed has written them, and the next line that is recorded removes them;
        what the ledger did not write is never removed. They do not affect the model or the chain.
        """
        return unnamed_files(self.dir, Log.read(self.dir / FILE))

    @plain_torch()
    def model(self, library: str | None = None) -> Any:
        """Return the current model, in float32 on the CPU.

        library: None for that of the base, "open_clip", "transformers", "diffusers" (a text encoder), or "state_dict".
        """
        return converted(self._adapter(self._log.last.steps), library)

    @plain_torch()
    def save(self, folder: str | Path) -> None:
        """Write the current model to a folder that its own library loads."""
        with writing(folder):
            self._adapter(self._log.last.steps).save(folder)

    def supply(self, id: str, forget: Any, retain: Any = "rest", test: Any = None, validation: Any = None) -> None:
        """Give the pairs of an earlier request again, for audits, for holding it down and for replays.

        Only a request whose pairs were given as objects in another session needs it. Raises `InputError` if they are
        not the request's pairs.
        """
        self._data.supply(self._log.find(id), forget, retain, test, validation)

    @plain_torch()
    def forget(
        self,
        forget: Any,
        retain: Any = "rest",
        *,
        id: str | None = None,
        by: str = "",
        note: str = "",
        date: str | None = None,
        test: Any = None,
        validation: Any = None,
        templates: Sequence[str] | None = None,
        method: str | None = None,
        config: UnlearnConfig | Mapping[str, Any] | str | Path | None = None,
        tolerance: float = TOLERANCE,
        undoable: bool | Sequence[str] = True,
        progress: bool | None = None,
        **settings: Any,
    ) -> Entry:
        """Make the current model forget pairs, and record it.

        forget, retain, test, validation, templates, config, progress, settings: as in `unlearn()`. Pairs of earlier
            requests in force are left out of retain, test and validation. Only a method that keeps what the current
            model does, and not what captions say ("calibrated"), gets them as pairs to keep, which holds them down.
        id: of the request; by default its number. A request that is recorded already is returned as it is, and one that
            was interrupted goes on, if the same call is made again.
        by, note, date: who asked, why and when; free texts, and a date in ISO 8601 (by default now).
        method: by default config's, else "calibrated".
        tolerance: how exact a change must be that is stored in factors, see docs/ledger.md.
        undoable: the earlier requests, by id, that can be undone later without any pairs; by default all in force. For
            each of them the request is made once more, without it, and that delta is stored too. False does no such
            run.

        Returns the entry. Raises `InputError` before any work for what is wrong, `UnlearningError` if the work fails;
        the ledger is then as before.
        """
        chosen = ledger_settings(config, method, settings)
        date = checked_date(date)
        wanted = self._undoable(undoable)
        given = {"forget": forget, "retain": retain, "test": test, "validation": validation}
        with self._working(chosen) as ranks:
            opener = self._data.opener(chosen, templates)
            own = ranks.run_on_all(lambda: open_request(forget, retain, test, validation, chosen, templates, opener))
            content = {"selection": selection_of(given, templates, own), "settings": chosen.to_dict()}
            name = check_id(id) if id is not None else self._next_id()
            done = self._recorded(name, content)
            if done is not None:
                self._data.keep(name, own)  # for the requests that follow
                return done
            self._warn_of_missing(ranks)
            number, steps = len(self._log.entries), self._log.last.steps
            before, after, facts = self._unlearned(name, own, self._log.active(), steps, chosen, ranks, progress)
            step, delta = self._store(f"{number:04d}-{name}", name, facts["run"], before, after, tolerance, ranks)
            self._data.keep(name, own)
            told = {"id": name, "date": date, "by": by, "note": note, "tolerance": tolerance}
            line = {"kind": "forget", **told, **content, **facts}
            line["prepared"] = self._prepare(line, own, wanted, chosen, ranks, progress)
            return self._record(line, [*steps, step], {step.file: delta}, chosen, ranks, progress)

    @plain_torch()
    def undo(
        self,
        id: str,
        *,
        how: str = "auto",
        by: str = "",
        note: str = "",
        date: str | None = None,
        device: str | None = None,
        progress: bool | None = None,
    ) -> Entry:
        """Take a request back, and record it.

        how: "auto" restores the weights before the request bit for bit if it is the last one; else it takes the deltas
            that later requests prepared, else it replays these where their pairs are at hand, else it merges deltas.
            "prepared", "replay" and "merge" insist on one of them.
        device: where to replay and to audit; by default that of the request.

        Returns the entry; its `how` says which way was taken, and `audits` how far the result is from the base. Raises
        `InputError` for an unknown request, one that is undone already, a replay without the pairs, and "prepared"
        where nothing is.
        """
        if how not in _HOW:
            raise InputError(f"how={how!r} is not one of {', '.join(_HOW)}")
        date = checked_date(date)
        settings = UnlearnConfig.from_dict(self._log.find(id).content["settings"])
        settings = settings if device is None else replace(settings, device=device)
        with self._working(settings) as ranks:
            self._require_active(id)
            steps, number = self._log.last.steps, len(self._log.entries)
            place = next(at for at, step in enumerate(steps) if step.id == id and step.kind == "forget")
            deltas: dict[str, Any] = {}
            known: Mapping[str, Any] = {}
            used = self._way(id, how, last=place == len(steps) - 1)
            if used == "exact":
                found = steps[:-1]
            elif used == "prepared":
                ready = self._prepared()[id]
                found, known = [Step(**step) for step in ready["steps"]], ready["audits"]
            elif used == "replay":
                found, deltas = self._replayed(id, number, device, ranks, progress)
            else:
                found, deltas = self._merged(id, place, number, ranks)
            told = {"id": f"undo-{id}", "of": id, "date": date, "by": by, "note": note, "how": used}
            return self._record({"kind": "undo", **told}, found, deltas, settings, ranks, progress, known)

    @plain_torch()
    def export(self, id: str, folder: str | Path | None = None, *, progress: bool | None = None) -> Path:
        """Write one request as a patch, a folder that `cliperase-fast apply` adds to the same base.

        folder: by default patches/ID in the ledger. Returns it. The patch names the base by its SHA-256 and holds what
        the request's pairs score in the base with this patch alone, if they are at hand.
        """
        entry = self._log.find(id)
        settings = UnlearnConfig.from_dict(entry.content["settings"])
        target = output_folder(folder) if folder is not None else self.dir / "patches" / id
        with self._working(settings) as ranks:
            self._require_active(id)
            ranks.run_on_first(lambda: check_folder(target))
            step = next(step for step in self._log.last.steps if step.id == id and step.kind == "forget")
            patched = self._state([step])
            base = self._log.base.content
            content = {
                "id": id,
                "ledger_head": self._log.head,
                "base": {key: base[key] for key in ("reference", "library", "weights")},
                "weights": digest_of(patched),
                "sha256": step.sha256,
                "bytes": (self.dir / step.file).stat().st_size,
                "alone": self._alone(entry, patched, settings, ranks, progress),
                "method": entry.content["settings"]["method"],
                "date": entry.content["date"],
            }
            ranks.run_on_first(lambda: write_patch(target, self.dir / step.file, content))
        return target

    def report(self, path: str | Path | None = None) -> Path:
        """Write report.html, one page with everything, and return its path.

        path: another place than the ledger.
        """
        target = user_path(path) if path is not None else self.dir / "report.html"
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(target, ledger_page(self.summary()))
        return target
