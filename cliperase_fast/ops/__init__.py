"""The losses over similarities: one contract (`spec.py`), its backends, and the table of them (`registry.py`)."""

from __future__ import annotations

from cliperase_fast.ops.registry import BackendStatus, BackendTable, backends

__all__ = ["BackendStatus", "BackendTable", "backends"]
