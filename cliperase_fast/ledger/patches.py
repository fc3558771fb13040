"""Patches: one request of a ledger, for others to apply to the same base. Also converts models for other libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cliperase_fast import export
from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.ledger.deltas import apply_delta, digest_of, state_of
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import in_float32
from cliperase_fast.models.saving import write_directory
from cliperase_fast.reading import printable_data, read_text
from cliperase_fast.storage import writing
from cliperase_fast.tensor_files import read_tensors

FORMAT = 1
FILE, DELTA = "patch.json", "delta.safetensors"
_LARGEST = 1 << 24  # bytes of patch.json
LIBRARIES = ("open_clip", "transformers", "diffusers", "state_dict")


def check_folder(folder: Path) -> None:
    """Raise `InputError` for a folder that holds something else than a patch."""
    if folder.exists() and (not folder.is_dir() or any(path.name not in (FILE, DELTA) for path in folder.iterdir())):
        raise InputError(f"{folder} holds something else: give a new folder for the patch")


def write_patch(folder: Path, delta: Path, content: Mapping[str, Any]) -> None:
    """Write a patch. delta: the file to copy. content: for patch.json."""

    def write(work: Path) -> None:
        shutil.copyfile(delta, work / DELTA)
        text = json.dumps(printable_data({"format": FORMAT, **content}), indent=2, allow_nan=False)
        (work / FILE).write_text(text + "\n", encoding="utf-8")

    with writing(folder):
        write_directory(folder, FILE, write)


@plain_torch()
def apply_patch(patch: str | Path, model: Any) -> ClipAdapter:
    """Return the adapter of a copy of the model with the patch, in float32 on the CPU.

    patch: a folder that `Ledger.export` wrote. model: its base, as `unlearn()` takes it; it stays as it is.

    Raises `InputError` for another base and for a folder that is not a patch, `UnlearningError` for a changed patch.
    """
    folder = Path(patch)
    content = _read(folder)
    loaded = load_model(model, device="cpu")
    check_weights(loaded, "model")
    adapter = in_float32(loaded).clone()
    state = state_of(adapter.module)
    found = digest_of(state)
    if found != content["base"]["weights"]:
        raise InputError(
            f"the model is not the base of {folder}: its weights have the SHA-256 {found[:12]}… and the patch is for "
            f"{content['base']['weights'][:12]}… ({content['base']['reference'] or 'a model given as an object'})"
        )
    try:
        stored, sha256 = read_tensors(folder / DELTA)
        if sha256 != content["sha256"]:
            raise ValueError("its SHA-256 is not that in patch.json")
        apply_delta(state, stored)
    except (OSError, ValueError, KeyError) as error:
        raise UnlearningError(f"{folder / DELTA} was changed or is damaged ({error}); get the patch again") from error
    weights = digest_of(state)
    if weights != content["weights"]:
        raise UnlearningError(
            f"{folder} leads to other weights than it says ({weights[:12]}…, not {content['weights'][:12]}…); "
            "get the patch again"
        )
    adapter.module.load_state_dict(state)
    return adapter


def converted(adapter: ClipAdapter, library: str | None) -> Any:
    """Return the model for a library: None for its own, or one of `LIBRARIES`."""
    module = adapter.module
    if library in (None, adapter.kind):
        return module
    if library == "state_dict":
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    if library == "transformers":
        return export.to_transformers(module)
    if library == "open_clip":
        return export.to_open_clip(module)
    if library == "diffusers":
        return export.to_diffusers_text_encoder(module)
    raise InputError(f"library={library!r} is not one of {', '.join(LIBRARIES)}")


def _read(folder: Path) -> dict[str, Any]:
    text = read_text(folder / FILE, _LARGEST, "the patch ")
    try:
        content = json.loads(text)
        complete = {"base", "weights", "sha256"} <= content.keys() and {"weights", "reference"} <= content[
            "base"
        ].keys()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / FILE} is not a patch ({error}): give a folder that an export wrote") from error
    if content.get("format") != FORMAT or not complete:
        raise InputError(f"{folder / FILE} is not a patch of this version: give a folder that an export wrote")
    return content
