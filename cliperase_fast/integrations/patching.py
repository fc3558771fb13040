"""`Patch`, the result of a patch function: undone at the end of a `with` block or by `unpatch()`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Patch:
    """An active patch. `replaced`: the names that this call replaced; empty if the patch was active already."""

    def __init__(self, replaced: list[str], undo: Callable[[], object]) -> None:
        self.replaced = replaced
        self._undo = undo

    def unpatch(self) -> None:
        """Restore the original objects, unless an outer patch had replaced them already."""
        if self.replaced:
            self._undo()
            self.replaced = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return f"Patch(replaced={self.replaced})"
