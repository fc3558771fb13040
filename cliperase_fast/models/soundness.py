"""Whether a model's weights are fit for work: looked at before anything is computed or written."""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.base import ClipAdapter

LARGEST_SCALE = 1e4  # exp(logit_scale) of trained models stays near 100; beyond this float32 losses lose their digits


@torch.no_grad()
def check_weights(adapter: ClipAdapter, what: str) -> None:
    """Raise `InputError` that names a parameter which is not finite, or a `logit_scale` that cannot be used.

    what: "model" or "teacher", for the message.
    """
    parameters = list(adapter.module.named_parameters())
    if not parameters:
        raise InputError(
            f"the {what} is a {type(adapter.module).__name__} without parameters: give a module whose encoders are its "
            "submodules, so that their weights are found"
        )
    _check_scale(adapter, what)
    for name, parameter in parameters:
        if not parameter.is_floating_point() or parameter.itemsize == 1 or bool(torch.isfinite(parameter).all()):
            continue  # what is quantized to a byte is refused where it would be trained
        count = int((~torch.isfinite(parameter)).sum())
        raise InputError(
            f"the {what}'s weights are damaged: {count} of the {parameter.numel()} values of {name} are not finite "
            "(NaN or infinity); load the weights again, or from a checkpoint before they became so"
        )


def _check_scale(adapter: ClipAdapter, what: str) -> None:
    raw: Tensor = adapter._model.logit_scale.detach()
    if raw.numel() != 1:
        raise InputError(f"the {what}'s logit_scale has the shape {list(raw.shape)}; it must be a single number")
    value = float(raw)
    scale = float(raw.float().exp())
    if not 0 < scale <= LARGEST_SCALE:  # false for NaN
        raise InputError(
            f"the {what}'s logit_scale is {value:g}, so that the logits' scale, its exponential, is {scale:g}; it must "
            f"lie between 0 and {LARGEST_SCALE:g}: logit_scale holds the logarithm of the scale, which is 2.66 to 4.61 "
            "in trained models (scale 14.3 to 100)"
        )
