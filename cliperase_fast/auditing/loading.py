"""Load the models of an audit, and check that they read the same captions and images."""

from __future__ import annotations

from collections.abc import Mapping
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
