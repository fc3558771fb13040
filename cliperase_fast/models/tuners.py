"""Adapters of the caller's own (LoRA, DoRA and the other kinds of `peft`) folded into a copy of the model."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from cliperase_fast.errors import InputError

_REMEDY = "fold them in yourself with peft_model.merge_and_unload() and pass the model that returns"


def fold_tuners(model: nn.Module) -> nn.Module:
    """A copy of `model` with its active adapters in the weights and none beside them; `model` where it has none.

    Adapters that are switched off or not active are left out, as they are when the model runs.
    Raises InputError for adapters that cannot be folded in.
    """
    if not any(_is_tuner(part) for part in model.modules()):
        return model
    try:
        twin = copy.deepcopy(model)
        if _is_tuner(twin):
            return _folded(twin)
        for name, parent, child in _outermost_tuners(twin):
            setattr(parent, name, _folded(child))
    except Exception as error:  # every kind of tuner refuses in its own way
        raise InputError(
            f"the model's {kinds(model)} layers cannot be folded into its weights ({error}): {_REMEDY}"
        ) from error
    for name in ("peft_config", "peft_type", "active_adapter"):
        twin.__dict__.pop(name, None)
    if getattr(twin, "_hf_peft_config_loaded", False):
        twin._hf_peft_config_loaded = False  # type: ignore[assignment]
    return twin


def refuse_inexact(model: nn.Module, difference: float) -> InputError:
    return InputError(
        f"the model's {kinds(model)} layers cannot be folded into its weights: the features then differ by "
        f"{difference:.1e}. To go on with those features, {_REMEDY}"
    )


def kinds(model: nn.Module) -> str:
    """The kinds of adapter in the model, such as "peft.tuners.lora"."""
    return ", ".join(
        sorted({type(part).__module__.removesuffix(".layer") for part in model.modules() if _is_tuner(part)})
    )


def _outermost_tuners(root: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    found = []
    for name, child in list(root.named_children()):
        found += [(name, root, child)] if _is_tuner(child) else _outermost_tuners(child)
    return found


def _folded(layer: Any) -> nn.Module:
    inner = layer._modules.get("base_layer")
    if inner is not None and _is_tuner(inner):  # one kind of adapter around another
        layer._modules["base_layer"] = _folded(inner)
    active = not layer.disable_adapters
    if hasattr(layer, "unload_and_optionally_merge_module"):  # a module trained beside the original, say
        if not active and hasattr(layer, "original_module"):
            return layer.original_module
        return layer.unload_and_optionally_merge_module(merge=active, safe_merge=True, adapter_names=None)
    if active:
        layer.merge(safe_merge=True)
    elif layer.merged:
        layer.unmerge()
    return layer.get_base_layer()


def _is_tuner(module: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        return True
    other = getattr(sys.modules["peft.utils.other"], "AuxiliaryTrainingWrapper", None)
    other = other or sys.modules["peft.utils.other"].ModulesToSaveWrapper
    return isinstance(module, other)
