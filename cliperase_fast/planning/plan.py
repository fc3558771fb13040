"""Build the step of `cliperase-fast plan` from names, and write its cost as text."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.open_clip_config import build
from cliperase_fast.ops.autograd import strip_bytes
from cliperase_fast.planning.cost_model import DEVICES, Model, Step, step_cost

_PAIRS = 2  # encoded to count what one costs
_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def step_of(*, model: str, gpu: str = "h100", strip_mib: int | None = None, **options: Any) -> Step:
    """Build the step of an open_clip architecture on a GPU of `planning.cost_model.DEVICES`.

    strip_mib: memory for a block of dS; None means the kernels' own. options: the other fields of `Step`. Raises
    InputError for unknown names and wrong values.
    """
    if gpu not in DEVICES:
        raise InputError(f"gpu={gpu!r} is not known; use the nearest of {', '.join(DEVICES)}")
    precision = options.get("precision", "bf16")
    unknown = Model(model, 1, 0, 0, 0)
    strip = strip_bytes() if strip_mib is None else strip_mib << 20 if strip_mib > 0 else strip_mib
    Step(model=unknown, device=DEVICES[gpu], strip_bytes=strip, **options)  # refuses before the model is counted
    return Step(model=count_model(model, _DTYPES[precision]), device=DEVICES[gpu], strip_bytes=strip, **options)


def count_model(name: str, dtype: torch.dtype) -> Model:
    """Count the features and parameters of an open_clip architecture ("ViT-B-32"), and the cost of encoding a pair.

    The model has shapes only: no weights are read and no memory is allocated. Arithmetic counts matrix products,
    attention and convolutions (torch's FlopCounterMode). Activations are what autograd saves with weights and images in
    `dtype`, and with attention that does not keep its weights, as on GPUs and CPUs. Raises InputError for a name that
    open_clip does not know, and for an architecture with parts of other libraries.
    """
    import open_clip
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 4)
        hint = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() has all names"
        raise InputError(f"model {name!r} is not an architecture of open_clip (a name without a tag); {hint}")
    if {"timm_model_name", "hf_model_name"} & {
        *config["vision_cfg"],
        *config["text_cfg"],
    } or "multimodal_cfg" in config:
        raise InputError(
            f"model {name!r} has parts of another library, which cannot be counted; use one of open_clip's "
            "own, such as ViT-B-32 or ViT-L-14"
        )
    with torch.device("meta"):
        model: Any = build(config).to(dtype)

    def attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:  # shapes
        return sdpa_flop_count(query, key, value)

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # it is not counted otherwise
    with FakeTensorMode():  # the meta device has no fused attention
        _put_on_cpu(model)
        size = model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        images = torch.empty(_PAIRS, 3, height, width, dtype=dtype, device="cpu")
        tokens = torch.zeros(_PAIRS, model.context_length, dtype=torch.int64, device="cpu")
        of_weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no number is reused

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in of_weights:
                saved[storage._cdata] = storage
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=fused)
        with counter, torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            features = model.encode_image(images)
            model.encode_text(tokens)
    return Model(
        name, features.shape[1], sum(parameter.numel() for parameter in model.parameters()),
        counter.get_total_flops() // _PAIRS, sum(storage.nbytes() for storage in saved.values()) // _PAIRS,
    )  # fmt: skip


def _put_on_cpu(model: nn.Module) -> None:
    """Replace the tensors of a model by empty ones on the CPU."""
    found: dict[Tensor, Tensor] = {}  # shared ones stay shared

    def moved(tensor: Tensor) -> Tensor:
        if tensor not in found:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            found[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
        return found[tensor]

    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved(tensor)


def plan_data(step: Step) -> dict[str, Any]:
    """Return the figures of `plan_text` as JSON data: bytes of a GPU's memory and seconds of a step, part by part."""
    cost, device = step_cost(step), step.device
    needed = sum(cost.memory.values())
    fits = needed <= device.memory
    return {
        "model": step.model.name,
        "batch": step.batch,
        "gpus": step.gpus,
        "gpu": device.name,
        "precision": step.precision,
        "gather": step.gather,
        "chunk": step.chunk,
        "zero": step.zero,
        "cached_teacher": step.cached_teacher,
        "efficiency": step.efficiency,
        "memory_bytes": {**cost.memory, "together": needed},
        "gpu_memory_bytes": device.memory,
        "seconds": {**cost.seconds, "together": sum(cost.seconds.values())},
        "loss": {"flop": cost.sweep.operations, "moved_bytes": cost.sweep.moved, "received_bytes": cost.sweep.received},
        "fits": fits,
        "remedy": None if fits else _remedy(step, cost.memory),
        "source": device.source,
    }


def plan_text(step: Step) -> str:
    """Write the memory of a GPU and the time of a step, part by part, and whether it fits. Nothing is measured."""
    cost, device = step_cost(step), step.device
    needed, available = sum(cost.memory.values()), device.memory
    share = f"{step.sweep.own:,} pairs each" + (f", encoded {step.chunk:,} at a time" if step.chunk else "")
    lines = [
        f"{step.model.name}, {step.batch:,} pairs on {step.gpus} {device.name} ({share}), {step.precision}",
        "",
        "memory of a GPU, GiB",
        *_rows({name: amount / _GIB for name, amount in cost.memory.items()}),
        "",
        "time of a step, ms",
        *_rows({name: seconds * 1e3 for name, seconds in cost.seconds.items()}),
        "",
        f"the loss on a GPU: {cost.sweep.operations:.3g} FLOP of matrix products, {cost.sweep.moved:.3g} bytes moved, "
        f"{cost.sweep.received:.3g} bytes received",
        f"Computed, not measured: {step.efficiency:.0%} of the rates in {device.source}.",
    ]
    if needed > available:
        lines.append(
            f"It does not fit: {needed / _GIB:.1f} GiB of {available / _GIB:.1f}; use {_remedy(step, cost.memory)}."
        )
    return "\n".join(lines)


def _rows(amounts: dict[str, float]) -> list[str]:
    return [f"  {name:<22}{amount:12,.2f}" for name, amount in {**amounts, "together": sum(amounts.values())}.items()]


def _remedy(step: Step, memory: dict[str, float]) -> str:
    """Name the option that shrinks the largest part."""
    largest = max(memory, key=lambda name: memory[name])
    if largest == "activations" and (step.chunk or step.sweep.own) > 1:
        return f"a smaller --chunk than {step.chunk or step.sweep.own}"
    if largest in ("student", "teacher") and step.zero < 3 and step.gpus > 1:
        return "--zero 3"
    if largest == "loss" and step.gather == "all" and step.gpus > 1:
        return "--gather ring"
    return "more or larger GPUs"
