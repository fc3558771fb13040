"""The weights of a ledger: its base, and the states that stored deltas lead to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.ledger.deltas import State, apply_delta, describe_delta, digest_of, encode_delta, state_of
from cliperase_fast.ledger.leftovers import note_file
from cliperase_fast.ledger.log import Entry, Step
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import in_float32
from cliperase_fast.reading import user_path
from cliperase_fast.storage import draft_of, flush_folder, writing
from cliperase_fast.tensor_files import read_tensors, write_tensors

_LOCAL = "local-dir:"


class Weights:
    """The base of a ledger in `folder`, loaded when it is first needed.

    base: as `unlearn()` takes a model; None for the reference in the ledger. It is never changed.
    """

    def __init__(
        self, folder: Path, base: Any, tokenizer: Any = None, transform: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.folder, self.given, self._options = folder, base, {"tokenizer": tokenizer, "transform": transform}
        self._base: ClipAdapter | None = None

    def load(self) -> ClipAdapter:
        """Return the given model in float32 on the CPU, without comparing it with the ledger's."""
        if self._base is None:
            loaded = load_model(self.given, device="cpu", **self._options)
            check_weights(loaded, "base")
            self._base = in_float32(loaded)
        return self._base

    def base(self, entry: Entry) -> ClipAdapter:
        """Return the base in float32 on the CPU. Raises `InputError` if it is not the ledger's.

        entry: the first line of the log.
        """
        if self._base is not None:
            return self._base
        reference = entry.content["reference"]
        named = self.given is None
        if named and reference is None:
            raise InputError(f"the base of {self.folder} was given as an object: pass it again as base=")
        if named:
            self.given = reference
        try:
            found = self.load()
        except InputError as error:
            if not named:
                raise
            raise InputError(f"the base of {self.folder} cannot be loaded: {error}; pass it as base=") from error
        weights = digest_of(state_of(found.module))
        if weights != entry.weights:
            self._base, what = None, reference if named else "base"
            self.given = None if named else self.given
            raise InputError(
                f"{what} is not the base of {self.folder}: its weights have the SHA-256 {weights[:12]}… and the "
                f"ledger's {entry.weights[:12]}…; give the model with which the ledger was started"
            )
        return found

    def state(self, entry: Entry, steps: Sequence[Step]) -> State:
        """Return the weights that the steps lead to."""
        state = state_of(self.base(entry).module)
        for step in steps:
            try:
                apply_delta(state, self.read(step))
            except ValueError as error:
                raise UnlearningError(f"{self.folder / step.file} does not fit the base: {error}") from error
        return state

    def adapter(self, entry: Entry, state: Mapping[str, Tensor]) -> ClipAdapter:
        """Return a copy of the base with these weights."""
        twin = self.base(entry).clone()
        twin.module.load_state_dict(state)
        return twin

    def read(self, step: Step) -> State:
        """Return a stored delta. Raises `UnlearningError` if it is not the one that the log names."""
        path = self.folder / step.file
        try:
            found, digest = read_tensors(path)
        except (OSError, ValueError, KeyError) as error:
            raise UnlearningError(f"the delta {path} cannot be read ({error}); restore it from a copy") from error
        if digest != step.sha256:
            raise UnlearningError(
                f"the delta {path} was changed: its SHA-256 is {digest[:12]}… and the log has {step.sha256[:12]}…; "
                "restore it from a copy"
            )
        return found

    def write(
        self, file: str, id: str, kind: str, before: State, after: State, tolerance: float
    ) -> tuple[Step, dict[str, Any]]:
        """Store the delta from one state to another. Returns its step and its description."""
        stored = encode_delta(before, after, tolerance)
        path = self.folder / file
        with writing(path, "the ledger is as it was"):
            note_file(self.folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = write_tensors(draft_of(path), stored)
            os.replace(draft_of(path), path)
            flush_folder(path.parent)
        return Step(id, file, digest, kind), {**describe_delta(stored, before), "tolerance": tolerance}


def reference_of(base: Any) -> str | None:
    """Return the reference by which the base is loaded again, folders with their whole path; None for an object."""
    if not isinstance(base, (str, Path)):
        return None
    text = str(base)
    if text.startswith(_LOCAL):
        return _LOCAL + str(user_path(text.removeprefix(_LOCAL)).resolve())
    path = user_path(text)
    return str(path.resolve()) if path.is_dir() else text
