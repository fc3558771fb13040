"""A ledger in which a small model has forgotten three of four colours, and its pairs."""

import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "auditing"))

from small import make_model, make_pairs

from cliperase_fast import Ledger

REQUESTS = ("red", "green", "blue")
SETTINGS = {"steps": 60, "learning_rate": 1e-3, "batch_size": 24, "forget_fraction": 0.5, "progress": False}
MODEL = make_model()


def pairs_of(colour):
    """The arguments of `Ledger.forget` for a colour."""
    (forget, retain), test = (
        ([pair for pair in pairs if colour in pair[1]], [pair for pair in pairs if colour not in pair[1]])
        for pairs in (make_pairs(), make_pairs(16, seed=1))
    )
    return {"forget": forget, "retain": retain, "test": test}


def make_ledger(folder, requests=REQUESTS, undoable=(), **changes):
    """A ledger of requests. undoable: those that the later ones prepare the undoing of."""
    ledger = Ledger(folder, MODEL)
    for colour in requests:
        earlier = [id for id in undoable if id in ledger.active]
        ledger.forget(**pairs_of(colour), id=colour, date="2026-03-01", undoable=earlier, **{**SETTINGS, **changes})
    return ledger


def copied(ledger, folder, supplied=REQUESTS, **changes):
    """A copy of the ledger as another session opens it. supplied: the requests whose pairs that session has."""
    shutil.copytree(ledger.dir, folder)
    found = Ledger(folder, **{"base": MODEL, **changes})
    for colour in supplied:
        found.supply(colour, **pairs_of(colour))
    return found
