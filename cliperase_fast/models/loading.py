"""From whatever names a model to an adapter: strings, folders, instances."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.models.adapters.base import ClipAdapter, GenericAdapter
from cliperase_fast.models.adapters.open_clip import OpenClipAdapter, is_open_clip_model
from cliperase_fast.models.adapters.transformers import TransformersAdapter, is_transformers_model
from cliperase_fast.models.hub import offline_if_unreachable
from cliperase_fast.models.open_clip_files import load_folder, load_weights
from cliperase_fast.models.proving import feature_difference, tolerance
from cliperase_fast.models.requirements import require_weights
from cliperase_fast.models.runtime import pick_device
from cliperase_fast.models.transformers_files import load_clip_model, load_image_processor, load_tokenizer
from cliperase_fast.models.tuners import fold_tuners, refuse_inexact
from cliperase_fast.models.unwrapping import holder_of, unwrap

_WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".npy")
_FORMS = (
    "'ViT-B-32:openai' (an open_clip architecture and its weights), 'ARCH:/path/to/weights.pt', "
    "'local-dir:DIR', 'hf-hub:ORG/NAME', or a folder that holds open_clip_config.json or a transformers "
    "CLIPModel"
)


@torch_defaults()
def load_model(
    model: Any,
    *,
    tokenizer: Any = None,
    transform: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    truncate: bool = False,
) -> ClipAdapter:
    """The adapter of `model`.

    model: an open_clip model, a transformers CLIPModel, a module with `encode_image`, `encode_text` and
    `logit_scale`, an adapter, or a string: "ARCH:TAG" (open_clip's pretrained weights and cache),
    "ARCH:/path/to/weights" (.pt, .bin, .safetensors; a state dict or open_clip's training checkpoint),
    "local-dir:DIR", "hf-hub:ORG/NAME", or a folder with open_clip_config.json (open_clip) or config.json
    (transformers). Loaded models are in evaluation mode.
    tokenizer: captions -> integer ids [B, L], an open_clip tokenizer or a transformers tokenizer.
    transform: PIL image -> float tensor [3, H, W]. Both come with the model where it has them.
    device: None leaves an instance where it is and puts a loaded model on the CPU; an instance on another
    device is copied there, never moved.
    truncate: cut captions longer than the context instead of refusing them.

    Raises `InputError` naming what is wrong and the remedy; weights are never left random.
    """
    options = {"tokenizer": tokenizer, "transform": transform, "truncate": truncate}
    if isinstance(model, (str, Path)):
        adapter = _from_string(str(model), options)
        adapter.module.eval()
        if device is not None:
            adapter.module.to(pick_device(device))
        return adapter
    if isinstance(model, ClipAdapter):
        model, options = model.module, _given_or_kept(model, options)
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch module or one of {_FORMS}")
    return _from_module(model, options, None if device is None else pick_device(device))


def _from_module(model: nn.Module, options: dict[str, Any], device: torch.device | None) -> ClipAdapter:
    model = unwrap(model)
    require_weights(model)
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        model = copy.deepcopy(model)  # what was built under inference_mode can neither be trained nor assigned
    folded = fold_tuners(model)
    if folded is not model:
        difference = feature_difference(_adapter(model, options), _adapter(folded, options))
        if difference is not None and difference > 10 * tolerance(model):  # adding weights up rounds otherwise
            raise refuse_inexact(model, difference)
    if device is not None:
        wanted = torch.empty(0, dtype=torch.uint8, device=device).device  # with its number: cuda is cuda:0
        if any(tensor.device != wanted for tensor in chain(folded.parameters(), folded.buffers())):
            if len(set((getattr(folded, "hf_device_map", None) or {}).values())) > 1:
                raise InputError(
                    f"the {type(folded).__name__} is spread over several devices: load it without device_map"
                )
            folded = copy.deepcopy(folded).to(wanted)
    return _adapter(folded, options)


def _adapter(model: nn.Module, options: dict[str, Any]) -> ClipAdapter:
    if is_open_clip_model(model):
        return OpenClipAdapter(model, **options)
    options = {name: value for name, value in options.items() if name != "model_cfg"}
    if is_transformers_model(model):
        return TransformersAdapter(model, **options)
    held = holder_of(model, lambda inner: is_open_clip_model(inner) or is_transformers_model(inner))
    if held is not None and not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise InputError(
            f"the {type(model).__name__} is not a CLIP model itself but holds one: pass its attribute, model.{held}"
        )
    return GenericAdapter(model, **options)


def _given_or_kept(adapter: ClipAdapter, options: dict[str, Any]) -> dict[str, Any]:
    source = adapter.tokenizer.source if adapter.tokenizer is not None else None
    kept = {
        "tokenizer": source if options["tokenizer"] is None else options["tokenizer"],
        "transform": adapter.transform if options["transform"] is None else options["transform"],
        "truncate": options["truncate"] or adapter.truncate,
    }
    return kept | ({"model_cfg": adapter.model_cfg} if isinstance(adapter, OpenClipAdapter) else {})


def _from_string(text: str, options: dict[str, Any]) -> ClipAdapter:
    if text.startswith("local-dir:"):
        return _open_clip_folder(Path(text.removeprefix("local-dir:")), options)
    if text.startswith("hf-hub:"):
        return _open_clip_hub(text, options)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return _open_clip_folder(folder, options)
        if (folder / "config.json").is_file():
            return _transformers_folder(folder, options)
        raise InputError(
            f"the folder {text} holds neither open_clip_config.json (open_clip) nor config.json "
            "(transformers), so it is no saved model"
        )
    return _open_clip_architecture(text, options)


def _open_clip_architecture(text: str, options: dict[str, Any]) -> ClipAdapter:
    """ "ARCH:TAG" or "ARCH:/path/to/weights"; the path may hold colons itself."""
    import open_clip

    name, _, weights = text.partition(":")
    arch = name.replace("/", "-")
    config = open_clip.get_model_config(arch)
    if config is None:
        if any(character in text.split(":")[0] for character in "/\\") or Path(text).suffix:
            raise InputError(f"there is no model at {text!r}: no such folder. Pass {_FORMS}")
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see open_clip.list_models()."
        raise InputError(f"open_clip knows no architecture {name!r}; {hint} A model is one of {_FORMS}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not weights:
        example = tags[0] if tags else "/path/to/weights.pt"
        raise InputError(
            f"{text!r} names an architecture but no weights, so it would be random: pass '{arch}:{example}' "
            f"or '{arch}:/path/to/weights.pt'" + (f"; its tags are {', '.join(tags)}" if tags else "")
        )
    if open_clip.is_pretrained_cfg(arch, weights):
        return _open_clip_tag(arch, weights, config, options)
    path = Path(weights).expanduser()
    if path.is_file():
        try:
            module = load_weights(config, path, arch)
        except InputError:
            raise
        except Exception as error:  # of the libraries that build the towers
            raise InputError(f"the checkpoint {path} does not load as {arch}: {_cause(error)}") from error
        return _open_clip_adapter(module, arch, config, options)
    if path.is_dir():
        raise InputError(
            f"the checkpoint {weights} for {arch} is a folder: name the file of weights in it, or pass the folder "
            "alone if it is a saved model (what torch.distributed.checkpoint wrote becomes a file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {weights} weights.pt)"
        )
    if "/" in weights or "\\" in weights or path.suffix in _WEIGHT_FILES:
        raise InputError(f"there is no checkpoint {weights!r} for {arch}: no such file")
    near = difflib.get_close_matches(weights, tags, n=1)
    raise InputError(
        f"open_clip has no weights {weights!r} for {arch}; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + (f"its tags are {', '.join(tags)}" if tags else "it has none at all: pass a checkpoint file")
    )


def _open_clip_tag(arch: str, tag: str, config: dict[str, Any], options: dict[str, Any]) -> ClipAdapter:
    import open_clip

    known = open_clip.get_pretrained_cfg(arch, tag)
    quick_gelu = bool(known.get("quick_gelu", False))
    if quick_gelu:
        # open_clip only warns when weights trained with QuickGELU go into a model without it.
        config["quick_gelu"] = True
    try:
        with offline_if_unreachable():
            module = open_clip.create_model(arch, pretrained=tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    except Exception as error:  # network, cache and file errors of several libraries
        hub, url = known.get("hf_hub", ""), known.get("url", "")
        source = f"https://huggingface.co/{hub.rstrip('/')}" if hub else url
        quick = f"{arch}-quickgelu"
        by_hand = quick if quick_gelu and quick in open_clip.list_models() else arch
        raise InputError(
            f"the weights {tag!r} of {arch} could not be fetched: {_cause(error)}. Download them by hand"
            + (f" from {source}" if source else "")
            + f" and pass '{by_hand}:/path/to/the/file'"
        ) from error
    return _open_clip_adapter(module, arch, config, options)


def _open_clip_hub(text: str, options: dict[str, Any]) -> ClipAdapter:
    import open_clip

    try:
        with offline_if_unreachable():
            module = open_clip.create_model(text, require_pretrained=True)
            config = open_clip.get_model_config(text)
    except Exception as error:  # network, cache and file errors of several libraries
        repository = text.removeprefix("hf-hub:")
        raise InputError(
            f"the model {text!r} could not be fetched: {_cause(error)}. Download "
            f"https://huggingface.co/{repository} by hand and pass 'local-dir:DIR'"
        ) from error
    return _open_clip_adapter(module, text, config, options)


def _open_clip_folder(folder: Path, options: dict[str, Any]) -> ClipAdapter:
    folder = folder.expanduser()
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        raise InputError(f"'local-dir:{folder}' is no open_clip model: there is no {config_file}")
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise InputError(f"{folder} holds no weights (open_clip_model.safetensors), so the model would be random")
    name = f"local-dir:{folder}"
    try:
        module, config = load_folder(folder)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{config_file} has no {error}: it must be what open_clip saves") from error
    except Exception as error:  # bad JSON, wrong settings
        raise InputError(f"the open_clip model in {folder} does not load: {_cause(error)}") from error
    return _open_clip_adapter(module, name, config, options)


def _open_clip_adapter(module: nn.Module, name: str, config: dict[str, Any], options: dict[str, Any]) -> ClipAdapter:
    """name: what open_clip's `get_tokenizer` knows the model by."""
    import open_clip

    if options["tokenizer"] is None:
        try:
            with offline_if_unreachable() if config["text_cfg"].get("hf_tokenizer_name") else nullcontext():
                options = {**options, "tokenizer": open_clip.get_tokenizer(name)}
        except Exception as error:  # network, cache and file errors of several libraries
            folder = name.removeprefix("local-dir:")
            by_hand = f", or put its files (tokenizer.save_pretrained) into {folder}" if folder != name else ""
            raise InputError(
                f"the tokenizer of {name} could not be loaded: {_cause(error)}. Pass one with tokenizer={by_hand}"
            ) from error
    return OpenClipAdapter(module, model_cfg=config, **options)


def _transformers_folder(folder: Path, options: dict[str, Any]) -> ClipAdapter:
    import_extra("transformers", f"{folder} holds a model that")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} is not readable JSON: {error}") from error
    if kind != "clip":
        raise InputError(f"{folder} holds a transformers model of type {kind!r}; only CLIPModel ('clip') is supported")
    try:
        module = load_clip_model(folder)
        if options["tokenizer"] is None:
            options = {**options, "tokenizer": load_tokenizer(folder)}
        if options["transform"] is None:
            options = {**options, "transform": load_image_processor(folder)}
    except InputError:
        raise
    except Exception as error:  # missing or damaged files, wrong shapes
        raise InputError(f"the transformers model in {folder} does not load: {_cause(error)}") from error
    return TransformersAdapter(module, **options)


def _cause(error: BaseException) -> str:
    """The first lines of the error that tell, without the long lists that follow them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400].rstrip(".") or type(error).__name__
