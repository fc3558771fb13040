"""Take off what training and serving put around a model (wrappers, adapter layers) without changing that model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import nn

from cliperase_fast.errors import InputError

# The attribute under which a wrapper holds the model, and the classes that use it.
_HOLDERS = {
    "_orig_mod": {"torch._dynamo.eval_frame.OptimizedModule"},
    "module": {
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.optim.swa_utils.AveragedModel",
        "deepspeed.runtime.engine.DeepSpeedEngine",
        "accelerate.utils.other.ModelForwardWrapper",
        "timm.utils.model_ema.ModelEmaV2",
        "timm.utils.model_ema.ModelEmaV3",
    },
    "_checkpoint_wrapped_module": {
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.OffloadWrapper",
    },
    "_forward_module": {
        "lightning.fabric.wrappers._FabricModule",
        "lightning_fabric.wrappers._FabricModule",
    },
}
_FOLD = "fold them in yourself with peft_model.merge_and_unload() and pass the result"
_METHODS = ("forward", "encode_image", "encode_text", "get_image_features", "get_text_features")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside any nesting of DataParallel, DistributedDataParallel, torch.compile, PeftModel and so on.

    Also removes wrappers around parts of the model, and the methods that accelerate and torch.compile replace. `model`
    is not changed: the result is a copy that shares its parameters where anything had to be removed.
    Raises `InputError` for a model whose parameters are spread over processes.
    """
    model = _outermost(model)
    if any(_step(part) is not part for part in model.modules()):
        model = _bare(model, {})
    return model


def holder_of(model: nn.Module, is_model: Callable[[nn.Module], bool]) -> str | None:
    """Return the attribute of `model` that holds the only CLIP model in it, such as "model" of a LightningModule."""
    found = [name for name, child in model.named_children() if is_model(_outermost(child))]
    return found[0] if len(found) == 1 else None


def _outermost(model: nn.Module) -> nn.Module:
    seen: set[int] = set()
    while id(model) not in seen:  # stop at a wrapper that holds itself
        seen.add(id(model))
        model = _step(model)
    return model


def _step(model: nn.Module) -> nn.Module:
    """Return the model inside the outermost wrapper, or `model` itself if there is none."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript program, which cannot be copied and trained as a module; save it with "
            "torch.jit.save(model, 'clip.pt') and pass its architecture and that file, such as 'ViT-B-32:clip.pt' "
            "(for OpenAI's weights 'ViT-B-32-quickgelu:clip.pt'), or load it without jit"
        )
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel" in classes:
        raise InputError(
            "the model is wrapped in FullyShardedDataParallel, so each process holds only a part of its weights; "
            "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), load them into a plain model and pass that one"
        )
    for attribute, holders in _HOLDERS.items():
        inner = model._modules.get(attribute)
        if inner is not None and classes & holders:
            return inner
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        config = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"the PeftModel learns prompts ({type(config).__name__}), which a CLIP model cannot hold; pass "
                "the model without them: peft_model.get_base_model()"
            )
        return peft_base(model)
    return _without_patched_methods(model)


def peft_base(model: Any) -> nn.Module:
    """Return the module that holds the layers of a PeftModel, with the layers in place."""
    base = model.base_model
    return base if not hasattr(base, "model") or not hasattr(base, "prefix") else base.model


def _without_patched_methods(model: nn.Module) -> nn.Module:
    """Return a copy without the methods that accelerate and torch.compile replaced, or `model` if there are none."""
    own = vars(model)
    dropped = {name for name in _METHODS if name in own and _is_compiled(own[name], model, name)}
    if "_original_forward" in own:  # accelerate's mixed precision
        dropped |= {"forward", "_original_forward"}
    if not dropped & set(own):
        return model
    twin = _shallow(model)
    original = own.get("_original_forward")
    for name in dropped:
        twin.__dict__.pop(name, None)
    if original is not None and getattr(original, "__func__", None) is not type(model).forward:
        twin.__dict__["forward"] = original
    return twin


def _is_compiled(method: Any, model: nn.Module, name: str) -> bool:
    """Return whether `method` is torch.compile of the model's own method of that name."""
    inner = getattr(method, "_torchdynamo_orig_callable", None)
    return isinstance(inner, MethodType) and inner.__func__ is getattr(type(model), name, None)


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of the module tree without wrappers that shares the parameters and buffers."""
    if id(module) in done:
        return done[id(module)]
    twin = _shallow(_outermost(module))
    done[id(module)] = twin
    for name, child in twin._modules.items():
        twin._modules[name] = None if child is None else _bare(child, done)
    return twin


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin


def outside_inference(model: nn.Module) -> nn.Module:
    """Return a copy of a model made in inference mode, whose tensors can be neither trained nor assigned; or itself."""
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        return copy.deepcopy(model)
    return model


def fold_tuners(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with its active `peft` adapters folded into the weights, or `model` if it has none.

    Disabled and inactive adapters are dropped, because the model does not use them either.
    Raises `InputError` for adapters that cannot be folded in.
    """
    if not any(_is_tuner(part) for part in model.modules()):
        return model
    try:
        twin = copy.deepcopy(model)
        if _is_tuner(twin):
            return _folded(twin)
        for name, parent, child in _outermost_tuners(twin):
            setattr(parent, name, _folded(child))
    except Exception as error:  # each kind of adapter raises its own error
        raise InputError(
            f"the model's {_kinds(model)} layers cannot be folded into its weights ({error}); {_FOLD}"
        ) from error
    for name in ("peft_config", "peft_type", "active_adapter"):
        twin.__dict__.pop(name, None)
    if getattr(twin, "_hf_peft_config_loaded", False):
        twin._hf_peft_config_loaded = False  # type: ignore[assignment]
    return twin


def refuse_inexact(model: nn.Module, difference: float) -> InputError:
    return InputError(
        f"the model's {_kinds(model)} layers cannot be folded into its weights: the features would differ by "
        f"{difference:.1e}. To use the changed features anyway, {_FOLD}"
    )


def _kinds(model: nn.Module) -> str:
    """Return the kinds of adapter in the model, such as "peft.tuners.lora"."""
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
    if hasattr(layer, "unload_and_optionally_merge_module"):  # such as a module trained beside the original
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
