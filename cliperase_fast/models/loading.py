"""`load_model`: get the adapter of a model that is given as a string, a folder or an instance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters import FAMILIES, accepted_instances, accepted_strings
from cliperase_fast.models.adapters.base import ClipAdapter, Family, hint_of_run
from cliperase_fast.models.adapters.generic import GenericAdapter, missing_parts
from cliperase_fast.models.adapters.transformers import model_type
from cliperase_fast.models.equivalence import feature_difference, tolerance
from cliperase_fast.models.requirements import copy_of, require_weights
from cliperase_fast.models.runtime import pick_device
from cliperase_fast.models.unwrapping import fold_tuners, holder_of, outside_inference, refuse_inexact, unwrap
from cliperase_fast.reading import user_path


@plain_torch()
def load_model(
    model: Any,
    *,
    tokenizer: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    truncate: bool = False,
) -> ClipAdapter:
    """Return the adapter of `model`.

    model: a module of a family in `models.adapters.FAMILIES`, any module with `encode_image`, `encode_text` and
        `logit_scale`, an adapter, or a string: "ARCH:TAG" (open_clip's pretrained weights and cache),
        "ARCH:/path/to/weights" (.pt, .bin, .safetensors; a state dict or open_clip's training checkpoint),
        "local-dir:DIR", "hf-hub:ORG/NAME", or a folder that open_clip or transformers saved. A loaded model is in
        evaluation mode.
    tokenizer: captions -> integer ids [B, L], an open_clip tokenizer or a transformers tokenizer.
    transform: PIL image -> float tensor [3, H, W]. By default both are the model's own, if it has them.
    device: None leaves an instance where it is and puts a loaded model on the CPU. An instance on another device is
        copied, never moved.
    truncate: truncate captions longer than the context instead of raising an error.

    Raises `InputError` that says what is wrong and how to fix it; weights are never left random.
    """
    options = {"tokenizer": tokenizer, "transform": transform, "truncate": truncate}
    if isinstance(model, (str, Path)):
        if not str(model).strip():
            raise InputError(f"model is an empty string; pass {accepted_strings()}")
        adapter = _from_string(str(model), options)
        adapter.module.eval()
        if device is not None:
            adapter.module.to(pick_device(device))
        return adapter
    if isinstance(model, ClipAdapter):
        model, options = model.module, _given_or_kept(model, options)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch module or one of {accepted_strings()}")
    return _from_module(model, options, None if device is None else pick_device(device))


def _from_module(model: nn.Module, options: dict[str, Any], device: torch.device | None) -> ClipAdapter:
    model = unwrap(model)
    require_weights(model)
    model = outside_inference(model)
    folded = fold_tuners(model)
    if folded is not model:
        difference = feature_difference(_adapter(model, options), _adapter(folded, options))
        if difference is not None and difference > 10 * tolerance(model):  # folding rounds differently
            raise refuse_inexact(model, difference)
    if device is not None:
        wanted = torch.empty(0, dtype=torch.uint8, device=device).device  # with its index: cuda is cuda:0
        if any(tensor.device != wanted for tensor in chain(folded.parameters(), folded.buffers())):
            if len(set((getattr(folded, "hf_device_map", None) or {}).values())) > 1:
                raise InputError(
                    f"the {type(folded).__name__} is spread over several devices; load it without device_map"
                )
            folded = copy_of(folded).to(wanted)
    return _adapter(folded, options)


def _adapter(model: nn.Module, options: dict[str, Any]) -> ClipAdapter:
    family = _family_of(model)
    if family is not None:
        return family.wrap(model, **options)
    held = holder_of(model, lambda inner: _family_of(inner) is not None)
    missing, name = missing_parts(model), type(model).__name__
    if missing and held is not None:
        raise InputError(f"the {name} is not a CLIP model but holds one; pass its attribute, model.{held}")
    if missing:
        raise InputError(
            f"the {name} is none of the supported models ({accepted_instances()}) and has no "
            f"{' and no '.join(missing)}; wrap it in a module that has them"
        )
    return GenericAdapter(model, **options)


def _family_of(model: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if family.matches(model)), None)


def _given_or_kept(adapter: ClipAdapter, options: dict[str, Any]) -> dict[str, Any]:
    source = adapter.tokenizer.source if adapter.tokenizer is not None else None
    return {
        "tokenizer": source if options["tokenizer"] is None else options["tokenizer"],
        "transform": adapter.transform if options["transform"] is None else options["transform"],
        "truncate": options["truncate"] or adapter.truncate,
        **adapter.own_options(),
    }


def _from_string(text: str, options: dict[str, Any]) -> ClipAdapter:
    for family in FAMILIES:
        if family.opens(text):
            return family.load(text, options)
    if not user_path(text).is_dir():
        raise InputError(f"there is no model {text!r}; pass {accepted_strings()}")
    kind = model_type(text)
    if kind is not None:
        known = ", ".join(repr(family.model_type) for family in FAMILIES if family.model_type)
        raise InputError(f"{text} holds a transformers model of type {kind!r}; supported are {known}")
    names: dict[str, list[str]] = {}
    for family in FAMILIES:
        names.setdefault(family.marker, []).append(family.name)
    markers = " nor ".join(f"{marker} ({', '.join(of)})" for marker, of in names.items())
    hint = hint_of_run(Path(text), list(names))
    raise InputError(f"the folder {text} holds neither {markers}, so it is not a saved model{hint}")
