"""Load the models of an audit, and check that they read the same captions and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cliperase_fast.auditing.features import pixels_of
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.errors import InputError
from cliperase_fast.models import ClipAdapter, load_model
from cliperase_fast.models.requirements import check_weights
from cliperase_fast.models.runtime import in_float32

CAPTIONS = 64  # whose token ids are compared


def load_models(
    before: Any, after: Any, oracle: Any, *, tokenizer: Any, transform: Any, device: torch.device, truncate: bool
) -> dict[str, ClipAdapter]:
    """Return the models by name, on the device and in float32; a model that is not is copied."""
    given = {"before": before, "after": after}
    if isinstance(oracle, (list, tuple)) and len(oracle) == 0:
        raise InputError("oracle is an empty list: give at least one model, or None")
    oracles = list(oracle) if isinstance(oracle, (list, tuple)) else [] if oracle is None else [oracle]
    _check_different(oracles)
    given |= {f"oracle {number}": one for number, one in enumerate(oracles, 1)}
    found = {}
    for name, model in given.items():
        try:
            adapter = load_model(model, tokenizer=tokenizer, transform=transform, device=device, truncate=truncate)
            check_weights(adapter, "model")
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        found[name] = in_float32(adapter)
    return found


def _check_different(oracles: Sequence[Any]) -> None:
    """Raise InputError for a model that is given as two oracles: it would count as two samples."""
    seen: dict[Any, int] = {}
    for number, one in enumerate(oracles, 1):
        first = seen.setdefault(_place(one), number)
        if first != number:
            name = one if isinstance(one, (str, Path)) else f"the {type(one).__name__} object"
            raise InputError(
                f"oracle {first} and oracle {number} are the same model ({name}): give each oracle once, and models "
                "that were trained with different seeds for a noise floor"
            )


def _place(model: Any) -> Any:
    """Return what is equal for two mentions of the same model."""
    if isinstance(model, (str, Path)):
        path = Path(str(model).removeprefix("local-dir:"))
        return path.resolve() if path.exists() else str(model)
    return id(model)


def check_alike(models: Mapping[str, ClipAdapter], sets: AuditSets) -> None:
    """Raise InputError unless all models read the same captions and images as the original."""
    captions = sets.test.different_captions()[0][:CAPTIONS]
    first = models["before"]
    tokens, pixels = first.token_ids(captions), pixels_of(first, sets.test, [0])
    for name, adapter in models.items():
        if None not in (limits := {first.context_length, adapter.context_length}) and len(limits) > 1:
            raise InputError(
                f"the models 'before' and {name!r} read captions of different lengths ({first.context_length} and "
                f"{adapter.context_length} tokens): audit models of the same kind"
            )
        own = adapter.token_ids(captions)
        if own.shape != tokens.shape or not torch.equal(own, tokens):
            raise InputError(
                f"the models 'before' and {name!r} have different tokenizers ({captions[0]!r} gives other ids): audit "
                "models of the same kind"
            )
        size = pixels_of(adapter, sets.test, [0]).shape
        if size != pixels.shape:
            raise InputError(
                f"the models 'before' and {name!r} take images of different sizes ({list(pixels.shape[1:])} and "
                f"{list(size[1:])}): audit models of the same kind"
            )
