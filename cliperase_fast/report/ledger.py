"""The page of a ledger, from the content of ledger.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cliperase_fast.evaluation.metrics import COSINE
from cliperase_fast.plurals import counted
from cliperase_fast.reading import in_bytes
from cliperase_fast.report.rendering import Cell, Row, Table, render
from cliperase_fast.report.table import aligned, shown
from cliperase_fast.report.wording import count, number, percent, written

Content = Mapping[str, Any]  # of ledger.json
_UNDO = {
    "exact": "the weights before the request were restored",
    "prepared": "the later requests had been made without it too",
    "replay": "the later requests were replayed without it",
    "merge": "its delta was taken out of the weights",
}
_KINDS = {"base": "base model", "forget": "forget", "undo": "undo"}


def ledger_page(content: Content) -> str:
    """Render report.html. Every text that comes from the ledger is escaped."""
    requests = content["requests"]
    return render(
        "ledger.html",
        title="Requests to forget",
        status=_status(requests),
        warnings=[
            f"Request {one['id']} is in force and its pairs are above the target: {_now(one)}"
            for one in requests
            if one["undone"] is None and (one["now"] or {}).get("at_target") is False
        ],
        unaudited=[f"Request {id}: {why}" for id, why in content["unaudited"].items()],
        timeline=_timeline(requests),
        requests=[_request(one) for one in requests],
        chain=Table(
            ("line", "what", "SHA-256"),
            [
                Row((str(line["number"]), f"{_KINDS[line['kind']]} {line['id'] if line['number'] else ''}".strip(),
                     line["hash"]))
                for line in content["chain"]
            ],
            text_columns=3,
        ),
        facts=[
            ("Base", content["base"]["reference"] or "a model that was given as an object"),
            ("SHA-256 of the base's weights", content["base"]["weights"]),
            ("SHA-256 of the current weights", content["weights"]),
            ("Head", content["head"]),
        ],
    )  # fmt: skip


def ledger_table(content: Content, *, unicode: bool | None = None) -> str:
    """Write the requests in plain text, with what the current model knows of them, and why that is not known of others.

    unicode: as in `text_table`.
    """
    rows = [["request", "selected", "date", "state", "forget top-1", "association", "retain top-1", "delta"]]
    for one in content["requests"]:
        now = one["now"]
        rows.append([
            one["id"], _selected(one["selection"]), one["date"][:10], _state(one), _share(now, "forget_top1"),
            _cosine(now), _share(now, "retain_top1"), in_bytes(one["delta"]["bytes"]),
        ])  # fmt: skip
    lines = aligned(rows, left=len(rows[0]))
    if content["unaudited"]:
        lines += ["", *(f"request {id} is not measured: {why}" for id, why in content["unaudited"].items())]
    return shown("\n".join(lines), unicode)


def _state(one: Content) -> str:
    return "in force" if one["undone"] is None else f"undone {one['undone']['date'][:10]}"


def _status(requests: Sequence[Content]) -> str:
    force = [one for one in requests if one["undone"] is None]
    known = [one for one in force if one["now"] is not None]
    reached = sum(bool(one["now"]["at_target"]) for one in known)
    said = f"{len(force)} of {counted(len(requests), 'request')} {_are(len(force))} in force."
    if known:
        said += f" {reached} of the {len(known)} whose pairs could be measured {_are(reached)} at the target."
    return said


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _timeline(requests: Sequence[Content]) -> Table:
    rows = []
    for one in requests:
        name = Cell(one["id"], note=_selected(one["selection"]))
        rows.append(
            Row((
                name, one["date"][:10], one["by"], _state(one), _share(one["then"], "forget_top1"),
                _share(one["now"], "forget_top1"), _cosine(one["now"]), _share(one["now"], "retain_top1"),
                in_bytes(one["delta"]["bytes"]),
            ))
        )  # fmt: skip
    columns = ("request", "date", "asked by", "state", "top-1 then", "now", "association", "retain top-1", "delta")
    return Table(columns, rows, text_columns=4, minor=(2, 4, 8))


def _request(one: Content) -> dict[str, Any]:
    selection, settings = one["selection"], one["settings"]
    undone = one["undone"]
    pairs = selection["pairs"]
    facts = [
        ("Selected", _selected(selection)),
        ("Kept", selection["retain"] or "pairs given as objects"),
        ("Asked by", one["by"]),
        ("Note", one["note"]),
        ("Date", one["date"]),
        ("Pairs", f"{count(pairs['forget'])} to forget, {count(pairs['retain'])} to keep"),
        ("Fingerprint", selection["fingerprints"]["forget"]),
        ("Method", f"{settings['method']}, seed {settings['seed']}, on {one['ranks']} rank{'s' * (one['ranks'] > 1)}"),
        ("Held down meanwhile", ", ".join(one["held"])),
        ("Undone", undone and f"{undone['date']}: {_UNDO[undone['how']]}. {undone['by']} {undone['note']}".strip()),
        ("How far it is from the base", undone and _from_base(one)),
        ("Prepared the undoing of", ", ".join(one["prepared"])),
        ("Delta", _delta(one["delta"])),
        ("To reproduce", _command(one)),
        ("With", ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)),
    ]
    rows = [
        Row((label, _score(one["then"], key, "base"), _score(one["then"], key, "now"), _score(one["now"], key, "now")))
        for label, key in (
            ("Forget top-1", "forget_top1"),
            ("Association", "association"),
            ("Retain top-1", "retain_top1"),
            ("Retain association", "retain_association"),
        )
    ]
    return {
        "id": one["id"],
        "facts": [(name, fact) for name, fact in facts if fact],
        "table": Table(("", "base", "then", "now"), rows) if one["then"] else None,
    }


def _from_base(one: Content) -> str:
    """Say how an undone request's pairs score in the current model and in the base."""
    now = one["now"]
    if now is None:
        return "not measured: its pairs were not at hand"
    return "; ".join(
        f"{label} {_score(now, key, 'now')} ({_score(now, key, 'base')} in the base)"
        for label, key in (("images named", "forget_top1"), ("association", "association"),
                           ("retain images named", "retain_top1"))
    )  # fmt: skip


def _selected(selection: Content) -> str:
    return selection["forget"] or f"{counted(selection['pairs']['forget'], 'pair', ',')} given as objects"


def _delta(delta: Content) -> str:
    forms = ", ".join(f"{number} as {form}" for form, number in delta["forms"].items())
    return (
        f"{in_bytes(delta['bytes'])} for changed tensors of {in_bytes(delta['whole_bytes'])} ({forms}; "
        f"tolerance {delta['tolerance']:g})"
    )


def _command(one: Content) -> str:
    selection = one["selection"]
    if selection["forget"] is None:
        return "the same call of Ledger.forget() with the same pairs; the settings are in the log"
    source, _, selector = selection["forget"].partition("#")
    return (
        f"cliperase-fast ledger forget NEW-LEDGER --data '{source}' --forget '{selector}' --id {one['id']}, after the "
        "requests before it; settings other than the defaults are in the log"
    )


def _now(one: Content) -> str:
    return f"{_share(one['now'], 'forget_top1')} of the forget images are named, association {_cosine(one['now'])}"


def _score(audit: Content | None, key: str, state: str) -> str:
    value = None if audit is None else number(audit[key][state])
    return percent(value) if key.endswith("top1") else written(value, COSINE)


def _share(audit: Content | None, key: str) -> str:
    return _score(audit, key, "now")


def _cosine(audit: Content | None) -> str:
    return _score(audit, "association", "now")
