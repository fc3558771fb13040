"""What was saved, read back and compared before anybody is told that it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cliperase_fast.errors import UnlearningError
from cliperase_fast.models.proving import feature_difference, tolerance
from cliperase_fast.models.saving import save_weights

if TYPE_CHECKING:
    from cliperase_fast.models.adapters.base import ClipAdapter

# Bytes of weights up to which the folder is also loaded as a whole, as its library does it, for its features. Beyond
# that a second model in memory would be the larger risk; the files' bits are compared tensor by tensor all the same.
LOADED_WHOLE = 2 * 2**30


def verify_saved(adapter: ClipAdapter, work: Path, directory: Path) -> None:
    """Raise UnlearningError unless the files in `work` give the adapter's model back.

    work: where the files are now. directory: where they would go. On a failure the state dict is written beside it.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # building draws random weights; the caller's seed stays
            cause = _found_wrong(adapter, work)
    except Exception as error:  # whatever the model's own library raises while it loads
        cause = f"does not load ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    if cause is None:
        return
    safe = directory.parent / f"{directory.name}-state-dict.safetensors"
    save_weights(adapter.module.state_dict(), safe)
    raise UnlearningError(
        f"the model was not saved to {directory}: the folder {cause}. Its weights are safe in {safe}; build the model "
        f"as before and load them with model.load_state_dict(safetensors.torch.load_file({str(safe)!r}))"
    )


def _found_wrong(adapter: ClipAdapter, work: Path) -> str | None:
    state = adapter.saved_state()
    wrong = _files_differ(state, work)
    if wrong is not None or sum(tensor.nbytes for tensor in state.values()) > LOADED_WHOLE:
        return wrong
    twin = adapter.reload(work)
    if twin is None:  # only the caller's own code can build such a model
        return None
    parameter = next(adapter.module.parameters())
    loaded = twin.saved_state()
    if parameter.dtype != torch.float64:  # which the libraries load as float32
        for name, tensor in state.items():
            if name not in loaded or not _same_bits(loaded[name].to(tensor.dtype), tensor):
                return f"loads with another {name}"
    twin.module.to(device=parameter.device, dtype=parameter.dtype)
    difference = feature_difference(adapter, twin)
    if difference is not None and difference > tolerance(adapter.module):
        return f"loads as a model whose features differ by {difference:.1e}"
    return None


def _files_differ(state: dict[str, Tensor], folder: Path) -> str | None:
    from safetensors import safe_open

    left = dict(state)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in left:
                    return f"holds {name}, which the model does not have"
                if not _same_bits(file.get_tensor(name), left.pop(name)):
                    return f"holds another {name} than the model"
    return f"lacks {next(iter(left))}" if left else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
