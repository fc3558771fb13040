"""Changes of weights, as they are stored: rows, single entries or factors where that loses nothing, else whole tensors.

A stored delta holds for each changed tensor, by its name and a form:

    NAME:add               the change of every weight
    NAME:rows, :index      the changes of some rows of the first dimension
    NAME:entries, :index   the changes of some entries of the flattened tensor
    NAME:left, :right      factors [m, r] and [r, n] of the change of a matrix; later dimensions count as one
    NAME:set               the new values of a tensor of integers or booleans

Weights are float32. Factors are multiplied in float64, one rank after another with separate products and sums, and a
change is added to its weight in float32. All of this is rounded alike on every processor, so the digest of the weights
does not depend on where they are computed.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError

State = dict[str, Tensor]

TOLERANCE = 1e-4  # largest error of a factorised change, in parts of the largest change of its tensor
_SMALLEST_SIDE = 8  # of a matrix that is worth factorising
_FORMS = ("add", "rows", "entries", "index", "left", "right", "set")


def state_of(module: nn.Module) -> State:
    """Return a copy of the module's state on the CPU, floating-point tensors in float32."""
    return {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).cpu().clone()
        for name, tensor in module.state_dict().items()
    }


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_delta(before: State, after: State, tolerance: float = TOLERANCE) -> State:
    """Return the tensors of the delta from one state to another.

    tolerance: largest error of a change that is stored in factors, in parts of the largest change of its tensor; 0
    stores none in factors. All other forms are exact up to the rounding of the change to float32.

    Raises `InputError` for states of different models.
    """
    stored: State = {}
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        raise InputError("the weights before and after have other names or shapes: a delta needs the same model")
    for name, old in before.items():
        new = after[name]
        if not old.is_floating_point():
            if not torch.equal(old, new):
                stored[f"{name}:set"] = new.clone()
            continue
        change = new - old
        if bool(change.any()):
            stored.update({f"{name}:{form}": part for form, part in _smallest(change, tolerance).items()})
    return stored


def apply_delta(state: State, stored: Mapping[str, Tensor]) -> None:
    """Add a stored delta to the state, in place. Raises `ValueError` for a delta that does not fit."""
    for name, forms in _by_name(stored).items():
        if name not in state:
            raise ValueError(f"the delta changes {name!r}, which the model does not have")
        if "set" in forms:
            state[name] = forms["set"].clone()
        else:
            state[name] = state[name] + _change(forms, state[name].shape)


def merge_undone(before: State, after: State, current: State) -> State:
    """Return the current weights without the change from `before` to `after`, which others followed.

    The change is subtracted and what followed is kept, whatever the signs. Rules that look at signs were worse: see
    docs/ledger.md.
    """
    return {
        name: before[name] + (now - after[name]) if now.is_floating_point() else now.clone()
        for name, now in current.items()
    }


def describe_delta(stored: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the number of changed tensors by form, and the size of the stored and of the whole tensors in bytes."""
    forms: dict[str, int] = {}
    whole = 0
    for name, found in _by_name(stored).items():
        form = "factors" if "left" in found else next(iter(sorted(found.keys() - {"index"})))
        forms[form] = forms.get(form, 0) + 1
        whole += state[name].numel() * state[name].element_size()
    return {"forms": forms, "bytes": sum(part.nbytes for part in stored.values()), "whole_bytes": whole}


def _by_name(stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, part in stored.items():
        name, _, form = key.rpartition(":")
        if form not in _FORMS:
            raise ValueError(f"the delta has an unknown part {key!r}")
        found.setdefault(name, {})[form] = part
    return found


def _smallest(change: Tensor, tolerance: float) -> dict[str, Tensor]:
    """Return the smallest of the forms of a change that lose nothing."""
    forms = [{"add": change}]
    if change.ndim > 0:
        flat = change.reshape(-1)
        (index,) = flat.nonzero(as_tuple=True)
        forms.append({"entries": flat[index], "index": _compact(index)})
        by_row = change.reshape(len(change), -1)
        (rows,) = by_row.any(1).nonzero(as_tuple=True)
        forms.append({"rows": change[rows], "index": _compact(rows)})
        if change.ndim > 1 and tolerance > 0 and len(rows) == len(change):
            forms += _factors(by_row, tolerance)
    return min(forms, key=_size)


def _compact(index: Tensor) -> Tensor:
    return index.to(torch.int32) if index.numel() == 0 or int(index[-1]) < 2**31 else index


def _size(form: Mapping[str, Tensor]) -> int:
    return sum(part.nbytes for part in form.values())


def _factors(change: Tensor, tolerance: float) -> list[dict[str, Tensor]]:
    """Return factors of a matrix [m, n] with the least rank that holds the tolerance, if that saves half of it.

    The columns are projected on random ones: a matrix whose rank is too high is known after two products.
    """
    rows, columns = change.shape
    most = rows * columns // (2 * (rows + columns))
    if min(rows, columns) < _SMALLEST_SIDE or most < 1:
        return []
    wide = change.double()
    limit = tolerance * float(wide.abs().max())
    generator = torch.Generator("cpu").manual_seed(0)
    probes = torch.randn(columns, min(most + 4, columns), generator=generator, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(wide @ probes)  # [m, k]
    within = basis.T @ wide  # [k, n]
    if float((wide - basis @ within).abs().max()) > limit:
        return []
    left, values, right = torch.linalg.svd(within, full_matrices=False)
    left = basis @ left

    def at(rank: int) -> dict[str, Tensor]:
        return {"left": (left[:, :rank] * values[:rank]).float(), "right": right[:rank].float()}

    def holds(rank: int) -> bool:
        found = at(rank)
        return float((_product(found["left"], found["right"]).double() - wide).abs().max()) <= limit

    highest = min(most, len(values))
    rank = bisect_left(range(1, highest + 1), True, key=holds) + 1  # the error falls with the rank
    return [at(rank)] if rank <= highest and holds(rank) else []


def _change(forms: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Return the change of a tensor from its stored form. Raises `ValueError` where it does not fit the shape."""
    try:
        if "add" in forms:
            change = forms["add"]
        elif "left" in forms:
            change = _product(forms["left"], forms["right"]).reshape(shape)
        else:
            change = torch.zeros(shape, dtype=torch.float32, device="cpu")
            if "rows" in forms:
                change[forms["index"].long()] = forms["rows"]
            else:
                change.view(-1)[forms["index"].long()] = forms["entries"]
        if change.shape != shape:
            raise ValueError(f"the delta has a change of shape {list(change.shape)} for a tensor {list(shape)}")
        return change
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"the delta does not fit the model ({error})") from error


def _product(left: Tensor, right: Tensor) -> Tensor:  # [m, r], [r, n] -> [m, n]
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64, device="cpu")
    for rank in range(left.shape[1]):
        total.add_(left[:, rank, None].double() * right[rank].double())
    return total.float()
