"""The model inside the wrappers that training and serving put around it, without changing the model that was given."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from cliperase_fast.errors import InputError

# Attribute under which a wrapper holds the model, and the classes (by module and name) that hold it there.
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
_METHODS = ("forward", "encode_image", "encode_text", "get_image_features", "get_text_features")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any nesting of DataParallel, DistributedDataParallel, torch.compile, PeftModel and the like.

    Wrappers around parts of the model are left out too, and so is what accelerate and torch.compile put in the place
    of its methods. `model` is not changed: what has to be taken off comes off a copy that shares the parameters.
    Raises InputError for a model whose parameters are spread over processes.
    """
    model = _outermost(model)
    if any(_step(part) is not part for part in model.modules()):
        model = _bare(model, {})
    return model


def holder_of(model: nn.Module, is_model: Callable[[nn.Module], bool]) -> str | None:
    """The attribute of `model` that holds the one CLIP model in it, such as "model" of a LightningModule."""
    found = [name for name, child in model.named_children() if is_model(_outermost(child))]
    return found[0] if len(found) == 1 else None


def _outermost(model: nn.Module) -> nn.Module:
    seen: set[int] = set()
    while id(model) not in seen:  # a wrapper that holds itself ends the search
        seen.add(id(model))
        model = _step(model)
    return model


def _step(model: nn.Module) -> nn.Module:
    """The model one wrapper further in, or `model` itself."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript program, which cannot be copied and trained as a module: save it, "
            "torch.jit.save(model, 'clip.pt'), and pass its architecture with that file, such as 'ViT-B-32:clip.pt' "
            "(weights of OpenAI: 'ViT-B-32-quickgelu:clip.pt'), or load it without jit"
        )
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel" in classes:
        raise InputError(
            "the model is wrapped in FullyShardedDataParallel, so each process holds a part of its weights only: "
            "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), load them into a plain model and pass that"
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
                f"the PeftModel learns prompts ({type(config).__name__}), which cannot be kept in a CLIP model: pass "
                "the model without them, peft_model.get_base_model()"
            )
        return peft_base(model)
    return _without_patched_methods(model)


def peft_base(model: Any) -> nn.Module:
    """The module that a PeftModel has put its layers into; they stay in it."""
    base = model.base_model
    return base if not hasattr(base, "model") or not hasattr(base, "prefix") else base.model


def _without_patched_methods(model: nn.Module) -> nn.Module:
    """A copy without what accelerate and torch.compile put in the place of a method; `model` itself without such."""
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
    """Whether it is torch.compile of the model's own method of that name."""
    inner = getattr(method, "_torchdynamo_orig_callable", None)
    return isinstance(inner, MethodType) and inner.__func__ is getattr(type(model), name, None)


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A copy of the tree of modules without wrappers; parameters and buffers are the same tensors."""
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
