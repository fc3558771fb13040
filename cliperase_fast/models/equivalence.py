"""Compare two models by their features on random input, and a saved model with the one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cliperase_fast.errors import UnlearningError
from cliperase_fast.models.runtime import evaluating, in_float32, is_mixed
from cliperase_fast.models.saving import save_weights

if TYPE_CHECKING:
    from cliperase_fast.models.adapters.base import ClipAdapter

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}

# Bytes of weights up to which `verify_saved` also loads the whole folder with the model's own library to compare the
# features. Above that, a second model in memory is the larger risk; the tensors in the files are compared in any case.
LOADED_WHOLE = 2 * 2**30


def tolerance(module: nn.Module) -> float:
    """Return how far normalised features may differ through rounding alone."""
    return _TOLERANCES.get(next(module.parameters()).dtype, 3e-2)


@torch.no_grad()
def feature_difference(one: ClipAdapter, other: ClipAdapter) -> float | None:
    """Return the largest difference of a normalised feature, or None if no suitable input is known.

    Weights of several dtypes are compared in float32, as such a model may need autocast or half-precision inputs.
    """
    if is_mixed(one.module) or is_mixed(other.module):
        one, other = in_float32(one), in_float32(other)
    probe = one.probe()
    if probe is None:
        return None
    pixels, tokens = probe
    worst = 0.0
    with evaluating(one.module), evaluating(other.module):
        for name, inputs in (("encode_image", pixels), ("encode_text", tokens)):
            found = [getattr(adapter, name)(inputs.to(adapter.device)).double().cpu() for adapter in (one, other)]
            worst = max(worst, (found[0] - found[1]).abs().max().item())
    return worst


def random_pixels(image_size: int | tuple[int, int], like: Tensor, channels: int = 3) -> Tensor:  # [2, 3, H, W]
    """Return two random images with the dtype and device of `like`, the same ones on every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float32, device="cpu").to(like)


def verify_saved(adapter: ClipAdapter, work: Path, directory: Path) -> None:
    """Raise `UnlearningError` unless the files in `work` load as the adapter's model.

    work: the folder with the files. directory: their final folder; on a failure the state dict is written beside it.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # building a model draws random weights; keep the caller's seed
            cause = _find_difference(adapter, work)
    except Exception as error:  # anything that the model's own library raises while it loads
        cause = f"does not load ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    if cause is None:
        return
    safe = directory.parent / f"{directory.name}-state-dict.safetensors"
    save_weights(adapter.module.state_dict(), safe)
    raise UnlearningError(
        f"the model was not saved to {directory}: the folder {cause}. Its weights are safe in {safe}; build the model "
        f"as before and load them with model.load_state_dict(safetensors.torch.load_file({str(safe)!r}))"
    )


def _find_difference(adapter: ClipAdapter, work: Path) -> str | None:
    state = adapter.saved_state()
    wrong = _compare_files(state, work)
    large = sum(tensor.nbytes for tensor in state.values()) > LOADED_WHOLE
    if wrong is not None or large or not adapter.loads_back:
        return wrong
    twin = adapter.reload(work)
    if twin is None:  # only the caller's own code can build such a model
        return None
    parameter = next(adapter.module.parameters())
    loaded = twin.saved_state()
    if parameter.dtype != torch.float64:  # the libraries load float64 as float32
        for name, tensor in state.items():
            if name not in loaded or not _same_bits(loaded[name].to(tensor.dtype), tensor):
                return f"loads with a different {name}"
    dtype = torch.float32 if is_mixed(adapter.module) else parameter.dtype
    twin.module.to(device=parameter.device, dtype=dtype)
    difference = feature_difference(adapter, twin)
    if difference is not None and difference > tolerance(adapter.module):
        return f"loads as a model whose features differ by {difference:.1e}"
    return None


def _compare_files(state: dict[str, Tensor], folder: Path) -> str | None:
    from safetensors import safe_open

    left = dict(state)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in left:
                    return f"holds {name}, which the model does not have"
                if not _same_bits(file.get_tensor(name), left.pop(name)):
                    return f"holds a different {name} than the model"
    return f"lacks {next(iter(left))}" if left else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
