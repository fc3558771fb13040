"""Folders with a transformers CLIPModel, its tokenizer and its image processor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.checkpoint_files import read_checkpoint
from cliperase_fast.models.state_names import match_names

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_clip_model(folder: Path) -> nn.Module:
    """The CLIPModel in a folder with config.json, in float32, whatever wrapped it when it was saved."""
    import transformers

    content = _read_weights(folder)
    with quiet():
        config = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            expected = transformers.CLIPModel(config).state_dict()
        state = match_names(content, expected, folder, "CLIPModel")
        # Half-precision files widen exactly; training needs float32 weights.
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        module: Any = transformers.CLIPModel.from_pretrained(None, config=config, state_dict=state)
    return module.float().eval()


def _read_weights(folder: Path) -> dict[str, Any]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_checkpoint(folder / name, "CLIPModel")
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    raise InputError(
        f"the transformers model in {folder} does not load: there is neither {' nor '.join(_WEIGHTS)} nor an index of "
        "their shards"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, Any]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a readable index of shards: {error}") from error
    state: dict[str, Any] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names the shard {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is missing: copy it into {folder} too")
        state.update(read_checkpoint(folder / name, "CLIPModel"))
    return state


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which it shows even where there is no terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer saved beside a model, or None."""
    import transformers

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def load_image_processor(directory: Path) -> Any:
    """The image processor saved beside a model, or None."""
    import transformers

    names = ("preprocessor_config.json", "processor_config.json")
    if not any((directory / name).is_file() for name in names):
        return None
    return transformers.CLIPImageProcessor.from_pretrained(directory, local_files_only=True)
