"""The settings of a request, and what the errors of its runs advise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.advice import Advice
from cliperase_fast.unlearning.methods import make_method

METHOD = "calibrated"
_OWN = ("audit", "report")  # settings of runs that the ledger decides


def ledger_settings(
    config: UnlearnConfig | Mapping[str, Any] | str | Path | None, method: str | None, given: Mapping[str, Any]
) -> UnlearnConfig:
    """Return the settings of a request: config, over it the keywords, checked by the method."""
    for name in _OWN:
        if name in given:
            raise InputError(f"{name}= is not for a ledger, which audits every state itself; leave it out")
    if isinstance(config, UnlearnConfig):
        base = config
    elif config is None or isinstance(config, Mapping):
        base = UnlearnConfig.from_dict({"method": METHOD, **(config or {})})
    else:
        base = UnlearnConfig.from_file(config)
    values = base.to_dict()
    if method is not None and method != base.method:
        values.update(method=method, method_options={})
    _, settings = make_method(UnlearnConfig.from_dict({**values, **given, "audit": False, "report": False}))
    return settings


def run_advice(work: Path) -> Advice:
    """Return what the errors of a run in a ledger advise: its user gives no folder, and does not ask to resume.

    work: the folder of unfinished runs.
    """
    move = f"move the ledger {work.parent} to a larger disk"
    return Advice(
        place="the ledger's folder ",
        room=f"or {move}",
        elsewhere=move,
        afresh=f"remove {work} and make the request again",
        go_on="make the same request again",
    )
