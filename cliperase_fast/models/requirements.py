"""Check before any work that a model can encode, be trained and be saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cliperase_fast.errors import InputError

if TYPE_CHECKING:
    from cliperase_fast.models.adapters.base import ClipAdapter

LARGEST_SCALE = 1e4  # trained models have an exp(logit_scale) near 100; above this, float32 losses lose their digits
_TRAINED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features", "forward")


def require_weights(model: nn.Module) -> None:
    """Raise `InputError` unless all values of every parameter and buffer are in this process."""
    name = type(model).__name__
    for key, tensor in _tensors(model):
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{key} of the {name} has no shape yet; run the model once before you pass it")
        if hasattr(tensor, "ds_id"):
            raise InputError(
                f"{key} of the {name} is sharded by DeepSpeed's ZeRO-3; write the whole model with "
                "engine.save_16bit_model(DIR) or DeepSpeed's zero_to_fp32.py and load a plain model from it"
            )
        if hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor"):
            raise InputError(
                f"{key} of the {name} is a DTensor, sharded over the processes; gather the weights with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load them into a plain model and pass that one"
            )
        if tensor.is_meta:
            raise InputError(
                f"the {name} has weights on the meta device ({key}), where they have no values; load them first "
                "(without device_map), or pass a string that names the model and its weights"
            )


def require_trainable(model: nn.Module) -> None:
    """Raise `InputError` for weights that cannot be trained or saved as they are, such as quantized ones."""
    name = type(model).__name__
    for key, part in model.named_modules():
        kind = type(part)
        if kind.__module__.startswith(("bitsandbytes", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise _quantized(name, key, f"{kind.__module__}.{kind.__name__}")
        for method in _ENCODERS:
            if _is_bound_elsewhere(vars(part).get(method)):
                where = f"{key}.{method}" if key else method
                raise InputError(
                    f"{where} of the {name} was replaced by a function that calls the model, so a copy would not "
                    f"train its own weights; delete the replacement (del model.{where}) or subclass {kind.__name__}"
                )
    for key, tensor in _tensors(model):
        if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
            raise _quantized(name, key, type(tensor.data).__name__)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype not in _TRAINED:
            raise _quantized(name, key, str(tensor.dtype))
        if tensor.is_complex() and tensor.requires_grad:
            raise InputError(
                f"{key} of the {name} is complex, and only real parameters are trained; hold it as a real one and use "
                f"torch.view_as_complex on it, or leave it as it is with model.{key}.requires_grad_(False)"
            )
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key} in the state dict of the {name} is a {type(value).__name__} and only tensors can be saved; "
                "replace the module it comes from with a plain one"
            )
        if value.layout != torch.strided:
            raise InputError(f"{key} of the {name} is a sparse tensor ({value.layout}); make it dense with .to_dense()")
    held = {value.data_ptr() for value in state.values()}  # a hook may have renamed them
    for key, parameter in model.named_parameters():
        if key not in state and parameter.is_floating_point() and parameter.data_ptr() not in held:
            raise InputError(
                f"{key} of the {name} is not in the model's state dict, so it would be trained but not saved; let "
                "model.state_dict() return every weight (a hook or a method of its own leaves it out)"
            )


def require_dense_gradients(model: nn.Module) -> None:
    """Raise `InputError` for embeddings whose gradients are sparse tensors, which Adam does not take."""
    for key, part in model.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise InputError(
                f"{key} of the {type(model).__name__} has sparse=True, and Adam cannot use its sparse gradients; set "
                f"model.{key}.sparse = False, which changes neither weights nor features"
            )


def require_no_parametrizations(model: nn.Module) -> None:
    """Raise `InputError` for weights computed from other weights, which another library would not rebuild."""
    for key, name, kind, remedy in computed_weights(model):
        raise InputError(
            f"{key}.{name} is parametrized ({kind}), so a saved copy would not load as a {type(model).__name__}; make "
            f"it a plain parameter first: {remedy}"
        )


def computed_weights(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """Yield each weight that a parametrization, or one of torch's hooks before them, computes from other weights.

    (module, name, kind, call that makes it plain): pruned weights and those of the older weight and spectral norms too.
    """
    for key, part in model.named_modules():
        found: list[tuple[str, Any, str]] = []
        if parametrize.is_parametrized(part):
            steps: Any = part.parametrizations
            found += [(name, steps[name][0], "parametrize.remove_parametrizations") for name in steps]
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                found.append((hook._tensor_name, hook, "prune.remove"))
            elif isinstance(hook, (WeightNorm, SpectralNorm)):
                remove = "remove_weight_norm" if isinstance(hook, WeightNorm) else "remove_spectral_norm"
                found.append((hook.name, hook, remove))
        for name, step, remove in found:
            yield key, name, type(step).__name__, f"torch.nn.utils.{remove}(model.get_submodule({key!r}), {name!r})"


def copy_of(model: nn.Module, copied: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy. copied: what takes the place of objects, by their ids. Raises `InputError` if it fails."""
    try:
        return copy.deepcopy(model, copied)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        said, remedy = str(error).strip().partition("\n")[0], "build a new one and load its state dict"
        for key, name, kind, call in computed_weights(model):
            said, remedy = f"{kind} computes {key}.{name} from other weights", f"make it a plain parameter: {call}"
        raise InputError(
            f"the {type(model).__name__} cannot be copied, and only a copy is ever changed ({said}); {remedy}"
        ) from error


@torch.no_grad()
def check_weights(adapter: ClipAdapter, what: str) -> None:
    """Raise `InputError` for a parameter with NaN or infinite values, or for an unusable `logit_scale`.

    what: "model" or "teacher", for the message.
    """
    parameters = list(adapter.module.named_parameters())
    if not parameters:
        raise InputError(
            f"the {what} is a {type(adapter.module).__name__} without parameters; pass a module that has its encoders "
            "as submodules, so that their weights are found"
        )
    _check_scale(adapter, what)
    for name, parameter in parameters:
        if not parameter.is_floating_point() or parameter.itemsize == 1 or bool(torch.isfinite(parameter).all()):
            continue  # `require_trainable` refuses weights quantized to a byte
        count = int((~torch.isfinite(parameter)).sum())
        raise InputError(
            f"the {what}'s weights are damaged: {count} of the {parameter.numel()} values of {name} are not finite "
            "(NaN or infinity); load the weights again, or use an earlier checkpoint"
        )


def _quantized(model: str, key: str, kind: str) -> InputError:
    return InputError(
        f"{key} of the {model} is quantized ({kind}) and can neither be trained nor saved as plain weights; load "
        "the model without quantization (or, for a transformers model, call model.dequantize())"
    )


def _is_bound_elsewhere(method: Any) -> bool:
    """Return whether `method` is a function with a model in its closure, which a copy of the module would share."""
    if not isinstance(method, FunctionType):
        return False
    held = [cell.cell_contents for cell in method.__closure__ or () if _is_filled(cell)]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in held)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises if it is empty
    except ValueError:
        return False
    return True


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _check_scale(adapter: ClipAdapter, what: str) -> None:
    raw = adapter.log_scale().detach()
    if raw.numel() != 1:
        raise InputError(f"the {what}'s logit_scale has shape {list(raw.shape)}; it must be a single number")
    value = float(raw)
    scale = float(raw.float().exp())
    if not 0 < scale <= LARGEST_SCALE:  # false for NaN
        raise InputError(
            f"the {what}'s logit_scale is {value:g}, so the scale of the logits, exp(logit_scale), is {scale:g}; it "
            f"must be between 0 and {LARGEST_SCALE:g}. logit_scale is the logarithm of the scale, 2.66 to 4.61 in "
            "trained models (scale 14.3 to 100)"
        )
