"""The size of an architecture, from a model that has shapes only: no weights are read and no memory is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.open_clip_config import build
from cliperase_fast.planning.cost_model import Model

_PAIRS = 2


def count_model(name: str, dtype: torch.dtype) -> Model:
    """Features, parameters, and what encoding a pair costs, of an architecture of open_clip ("ViT-B-32").

    Arithmetic is that of the matrix products, attention and convolutions (torch's FlopCounterMode); activations are
    what autograd saves with weights and images in `dtype`. Raises InputError for a name that open_clip does not know,
    or an architecture whose parts come from other libraries.
    """
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    config = open_clip.get_model_config(name)
    if config is None:
        from difflib import get_close_matches

        near = get_close_matches(name, open_clip.list_models(), 4)
        hint = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() has all names"
        raise InputError(f"model {name!r} is not an architecture of open_clip (a name without a tag); {hint}")
    if {"timm_model_name", "hf_model_name"} & {
        *config["vision_cfg"],
        *config["text_cfg"],
    } or "multimodal_cfg" in config:
        raise InputError(
            f"model {name!r} is made of parts of another library, which cannot be counted; take open_clip's own, "
            "such as ViT-B-32 or ViT-L-14"
        )
    with torch.device("meta"):
        model: Any = build(config).to(dtype)
        size = model.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        images = torch.empty(_PAIRS, 3, height, width, dtype=dtype, device="meta")
        tokens = torch.zeros(_PAIRS, model.context_length, dtype=torch.int64, device="meta")
        of_weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no number stands for two

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in of_weights:
                saved[storage._cdata] = storage
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            features = model.encode_image(images)
            model.encode_text(tokens)
    return Model(
        name, features.shape[1], sum(parameter.numel() for parameter in model.parameters()),
        counter.get_total_flops() // _PAIRS, sum(storage.nbytes() for storage in saved.values()) // _PAIRS,
    )  # fmt: skip
