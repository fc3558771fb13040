"""Build open_clip models from folders and checkpoint files, whatever wrapped them when they were saved."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.open_clip_config import (
    TEXT_CONFIG,
    Config,
    build,
    build_around,
    is_native,
    with_text_config,
)
from cliperase_fast.models.checkpoint_files import read_checkpoint
from cliperase_fast.models.state_names import match_names

_OWN_FORMATS = (".npz", ".npy")  # big_vision's arrays; open_clip reads them without running code
_OF_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # beside the weights in OpenAI's archives only
_PROBE_SECONDS = 5.0  # to wait for the hub


_CPU = torch.device("cpu")
_in_file: ContextVar[bool] = ContextVar("in_file", default=False)


@contextmanager
def weights_in_file() -> Iterator[None]:
    """Leave the weights of models that are loaded in their file, which is mapped into memory, where possible.

    So processes of a machine share them, and none has a copy of its own. The file must not change meanwhile.
    """
    token = _in_file.set(True)
    try:
        yield
    finally:
        _in_file.reset(token)


def load_folder(folder: Path) -> tuple[nn.Module, Config]:
    """Load the model in a folder with open_clip_config.json; also returns its `model_cfg`.

    A Hugging Face text tower is configured from the folder itself if its configuration was saved there.
    """
    from open_clip import factory

    saved = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config: Config = saved["model_cfg"]
    if (folder / TEXT_CONFIG / "config.json").is_file():
        config = with_text_config(config, folder / TEXT_CONFIG)
    path = factory._find_checkpoint_in_dir(folder)
    assert path is not None  # the caller has checked
    module = load_weights(config, Path(path), f"the model of {folder}", saved.get("preprocess_cfg"))
    return module, config


def load_weights(config: Config, path: Path, name: str, preprocess: dict[str, Any] | None = None) -> nn.Module:
    """Build a model of `config` with the weights in the file `path`, in evaluation mode.

    name: the architecture, for errors. preprocess: its known preprocessing, in open_clip's terms.
    """
    from open_clip import factory
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    own = path.suffix in _OWN_FORMATS
    if own:
        _require_arrays(config, path, name)
    content = None if own else read_checkpoint(path, name)  # fail before a model is built
    if isinstance(content, dict) and content.keys() >= _OF_OPENAI and not config.get("quick_gelu"):
        raise InputError(
            f"the checkpoint {path} does not load as {name}: it is one of OpenAI's, which were trained with QuickGELU, "
            f"and {name} has GELU, so the features would differ; name the architecture with it, such as "
            f"'{name}-quickgelu:{path}'"
        )
    needs_hub = "hf_model_name" in config["text_cfg"] and not Path(config["text_cfg"]["hf_model_name"]).is_dir()
    module: Any
    if _in_file.get() and not own and not _is_mobile_clip(content) and is_native(config):
        with torch.device("meta"):
            form = build(config)
        state = _matched(form, content, path, name)
        module = build_around(config, {key: state[key].to(of.dtype) for key, of in form.state_dict().items()}, _CPU)
    else:
        with torch.random.fork_rng(devices=[]), offline_if_unreachable() if needs_hub else nullcontext():
            module = build(config)
        if own or _is_mobile_clip(content):
            factory.load_checkpoint(module, str(path))
        else:
            module.load_state_dict(_matched(module, content, path, name))
    settings = merge_preprocess_dict(PreprocessCfg(), preprocess or {})
    settings["size"] = getattr(module.visual, "image_size", settings["size"])
    factory.set_model_preprocess_cfg(module, settings)
    return module.eval()


def _require_arrays(config: Config, path: Path, name: str) -> None:
    """Raise `InputError` unless it is an archive of arrays and open_clip reads such files for this model."""
    failed = f"the checkpoint {path} does not load as {name}"
    if "timm_model_name" not in config["vision_cfg"]:
        raise InputError(
            f"{failed}: open_clip reads {path.suffix} files only for big_vision's SigLIP models; save the weights as "
            "tensors with torch.save(model.state_dict(), PATH)"
        )
    with path.open("rb") as file:
        if not file.read(2) == b"PK":
            raise InputError(f"{failed}: it is not an archive of NumPy arrays (.npz); copy or download it again")


def _matched(module: Any, content: Any, path: Path, name: str) -> dict[str, Tensor]:
    expected = module.state_dict()
    # Frozen batch norms have no counter, which changes nothing.
    counters = {key for key in expected if key.endswith(".num_batches_tracked")}
    optional = frozenset(({"logit_bias"} & set(expected)) | counters)
    renamed = {key.removeprefix("text."): key for key in expected}
    try:
        state = match_names(content, expected, path, name, optional)
    except InputError:
        # In older checkpoints the names of the text tower's weights do not start with `text.`.
        if "text.positional_embedding" not in expected or len(renamed) < len(expected):
            raise
        older = {key.removeprefix("text."): tensor for key, tensor in expected.items()}
        try:
            found = match_names(content, older, path, name, optional)
        except InputError:
            found = None
        if found is None:
            raise
        state = {renamed[key]: tensor for key, tensor in found.items()}
    for key in optional - state.keys():
        state[key] = torch.zeros(expected[key].shape, dtype=expected[key].dtype, device="cpu")
    return state


def _is_mobile_clip(content: Any) -> bool:
    """Return whether the weights have Apple's names, which open_clip converts."""
    names = (
        "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight",
        "image_encoder.model.patch_emb.0.block.conv.weight",
    )
    return isinstance(content, dict) and any(name in content for name in names)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Make the hub's client use only its cache while the hub does not answer.

    Otherwise each file costs about 20 seconds of retries, even one that is in the cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def is_reachable(address: str) -> bool:
    """Return whether `address` answers within a few seconds, be it with an error page."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
