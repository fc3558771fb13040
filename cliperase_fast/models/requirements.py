"""What a model must be so that it can be encoded with, trained and saved; said before any of that begins."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cliperase_fast.errors import InputError

_TRAINED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ENCODERS = ("encode_image", "encode_text", "get_image_features", "get_text_features", "forward")


def require_weights(model: nn.Module) -> None:
    """Raise InputError unless every parameter and buffer has its values in this process."""
    name = type(model).__name__
    for key, tensor in _tensors(model):
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{key} of the {name} has no shape yet: run the model once before you pass it")
        if hasattr(tensor, "ds_id"):
            raise InputError(
                f"{key} of the {name} is sharded by DeepSpeed's ZeRO-3: write the whole model with "
                "engine.save_16bit_model(DIR) or DeepSpeed's zero_to_fp32.py, and load a plain model from that"
            )
        if hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor"):
            raise InputError(
                f"{key} of the {name} is a DTensor, of which each process holds a part: gather the weights with "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load them into a plain model and pass that"
            )
        if tensor.is_meta:
            raise InputError(
                f"the {name} has weights on the meta device ({key}), where they have no values: load them first "
                "(without device_map), or name the model by a string that says where its weights are"
            )


def require_trainable(model: nn.Module) -> None:
    """Raise InputError for weights that cannot be trained or written to a file as they are: quantized ones, say."""
    name = type(model).__name__
    for key, part in model.named_modules():
        kind = type(part)
        if kind.__module__.startswith(("bitsandbytes", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise _quantized(name, key, f"{kind.__module__}.{kind.__name__}")
        for method in _ENCODERS:
            if _is_bound_elsewhere(vars(part).get(method)):
                where = f"{key}.{method}" if key else method
                raise InputError(
                    f"{where} of the {name} was replaced by a function around the model, so a copy would not train "
                    f"its own weights: delete the replacement (del model.{where}) or subclass {kind.__name__}"
                )
    for key, tensor in _tensors(model):
        if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
            raise _quantized(name, key, type(tensor.data).__name__)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype not in _TRAINED:
            raise _quantized(name, key, str(tensor.dtype))
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key} in the state dict of the {name} is a {type(value).__name__} and only tensors can be saved: "
                "replace the module that it comes from with a plain one"
            )
        if value.layout != torch.strided:
            raise InputError(f"{key} of the {name} is a sparse tensor ({value.layout}): make it dense, .to_dense()")


def require_no_parametrizations(model: nn.Module) -> None:
    """Raise InputError for weights that are computed from others, which another library would not rebuild."""
    for key, part in model.named_modules():
        found: list[str] = list(part.parametrizations) if parametrize.is_parametrized(part) else []  # type: ignore[arg-type]
        if found:
            raise InputError(
                f"{key}.{found[0]} is parametrized ({type(part.parametrizations[found[0]][0]).__name__}), and what is "  # type: ignore[index]
                f"saved would not load as a {type(model).__name__}: make it a plain parameter first, "
                f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({key!r}), {found[0]!r})"
            )


def _quantized(model: str, key: str, kind: str) -> InputError:
    return InputError(
        f"{key} of the {model} is quantized ({kind}), which can neither be trained nor saved as plain weights: load "
        "the model without quantization (for a transformers model also: model.dequantize())"
    )


def _is_bound_elsewhere(method: Any) -> bool:
    """Whether it is a function with a model in its closure, which copying a module would not copy."""
    if not isinstance(method, FunctionType):
        return False
    held = [cell.cell_contents for cell in method.__closure__ or () if _is_filled(cell)]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in held)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where it is empty
    except ValueError:
        return False
    return True


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
