"""Patch open_clip, and so its trainer, to use the fused losses."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.integrations import open_clip_losses as fused
from cliperase_fast.integrations.patching import Patch

_STOCK: dict[str, type] = {
    "ClipLoss": fused.StockClipLoss,
    "DistillClipLoss": fused.StockDistillClipLoss,
    "SigLipLoss": fused.StockSigLipLoss,
}
_FUSED: dict[str, type] = {name: getattr(fused, name) for name in _STOCK}


def patch_open_clip() -> Patch:
    """Make open_clip create the fused losses, from now on or for a `with` block.

    Replaces ClipLoss, DistillClipLoss and SigLipLoss in `open_clip.loss`, from which newer versions import them late,
    in `open_clip.factory`, whose `create_loss` serves `open_clip_train`, and in every loaded module of the two packages
    that holds them. Only open_clip's own classes are replaced, not subclasses put in their place, nor CoCaLoss.
    Patching twice has no further effect, and the inner of two `with` blocks then undoes nothing.

    Raises `InputError`, with nothing replaced, if open_clip's losses take other arguments than the fused ones.
    """
    fused.check_version()
    for name, stock in _STOCK.items():
        for method in ("__init__", "forward"):
            if not _takes_all(_parameters(_FUSED[name], method), _parameters(stock, method)):
                raise InputError(
                    f"open_clip's {name}.{method} takes other arguments than in open_clip_torch 3.0 to 3.3: "
                    'pip install "open_clip_torch>=3.0,<=3.3"'
                )
    in_force = any(fused.stock.__dict__[name] is kind for name, kind in _FUSED.items())
    replaced = _swap(_STOCK, _FUSED)
    return Patch([] if in_force else replaced, unpatch_open_clip)


def unpatch_open_clip() -> None:
    """Restore open_clip's own losses, also in modules loaded since. Does nothing if nothing is patched."""
    _swap(_FUSED, _STOCK)


def import_trainer() -> Any:
    """Import `open_clip_train.main`; raise `InputError` with what to install if it is missing."""
    return import_extra("open-clip-training", "open_clip's trainer")


def train_open_clip(arguments: Sequence[str]) -> int:
    """Run `open_clip_train.main` with its own arguments and the fused losses; return an exit code."""
    trainer = import_trainer()
    if any(".tar" in word for word in arguments) and _reader_marks_shard_ends():
        raise InputError(
            "open_clip's shard reader does not support the installed webdataset, which marks the ends of shards: "
            'pip install "webdataset<=0.2.86", or pass a CSV'
        )
    with patch_open_clip():
        return 0 if trainer.main(list(arguments)) is None else 1


def _reader_marks_shard_ends() -> bool:
    """Return whether open_clip's grouping of files would fail (KeyError: 'fname') on webdataset's end marks."""
    from open_clip_train import data

    expand = getattr(data, "tar_file_expander", None)
    marks = expand is not None and "eof_value" in inspect.signature(expand).parameters
    return marks and hasattr(data, "group_by_keys_nothrow")


def _parameters(kind: type, method: str) -> list[inspect.Parameter]:
    return list(inspect.signature(getattr(kind, method)).parameters.values())


def _takes_all(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> bool:
    """Return whether `ours` accepts the arguments of `theirs`; extra ones must have defaults and go to **options."""
    named = [parameter for parameter in ours if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    same = [(parameter.name, parameter.default) for parameter in named] == [
        (parameter.name, parameter.default) for parameter in theirs[: len(named)]
    ]
    added = theirs[len(named) :]
    optional = all(parameter.default is not inspect.Parameter.empty for parameter in added)
    return same and (not added or (len(named) < len(ours) and optional))


def _swap(found: dict[str, type], replacement: dict[str, type]) -> list[str]:
    """Replace the classes by name in all of open_clip's modules; return 'module.name' of each."""
    swapped = []
    for module_name, module in list(sys.modules.items()):
        if module is not None and module_name.split(".")[0] in ("open_clip", "open_clip_train"):
            for name, kind in found.items():
                if vars(module).get(name) is kind:
                    setattr(module, name, replacement[name])
                    swapped.append(f"{module_name}.{name}")
    return sorted(swapped)
