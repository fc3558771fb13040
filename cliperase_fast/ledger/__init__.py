"""Requests to forget over time: a log, a delta for each request, audits, and ways to undo and to prove."""

from cliperase_fast.ledger.api import Ledger
from cliperase_fast.ledger.log import Entry
from cliperase_fast.ledger.patches import apply_patch

__all__ = ["Entry", "Ledger", "apply_patch"]
