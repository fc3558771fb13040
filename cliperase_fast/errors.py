"""The two kinds of error a user meets; every message names the thing and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """Something the caller gave is wrong (exit code 2). Raised before work starts and anything is written."""


class UnlearningError(RuntimeError):
    """The work itself failed (exit code 1), for example a loss that became NaN. What was saved before stays."""
