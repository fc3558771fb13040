"""Load open_clip models by name: architectures with a tag or a checkpoint, saved folders, the Hugging Face hub."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.base import ClipAdapter, Family, first_lines, hint_of_run
from cliperase_fast.models.adapters.open_clip import OpenClipAdapter
from cliperase_fast.models.adapters.open_clip_files import load_folder, load_weights, offline_if_unreachable
from cliperase_fast.models.adapters.transformers import model_type
from cliperase_fast.models.preprocessing import clip_tokenizer
from cliperase_fast.reading import user_path

_MARKER = OpenClipAdapter._marker
_WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".npy")


def is_open_clip_model(module: nn.Module) -> bool:
    open_clip = sys.modules.get("open_clip")
    if open_clip is None:
        return False
    return isinstance(module, (open_clip.CLIP, open_clip.CustomTextCLIP, open_clip.CoCa))


def opens(text: str) -> bool:
    """Return whether the string has the form of an open_clip model, or is a folder with one."""
    if text.startswith(("local-dir:", "hf-hub:")):
        return True
    folder = user_path(text)
    if folder.is_dir():
        return (folder / _MARKER).is_file()
    import open_clip

    arch = _architecture(text)
    return open_clip.get_model_config(arch) is not None or (not _is_path(text) and bool(_near(arch)))


def _architecture(text: str) -> str:
    return text.partition(":")[0].replace("/", "-")


def _is_path(text: str) -> bool:
    return any(character in text.split(":")[0] for character in "/\\") or bool(Path(text).suffix)


def _near(arch: str) -> list[str]:
    import open_clip

    return difflib.get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.4)


def load(text: str, options: dict[str, Any]) -> ClipAdapter:
    """Load the model that the string names. options: tokenizer, transform and truncate."""
    if text.startswith("hf-hub:"):
        return _load_from_hub(text, options)
    if text.startswith("local-dir:") or user_path(text).is_dir():
        return _load_saved(user_path(text.removeprefix("local-dir:")), options)
    return _load_architecture(text, options)


def _load_architecture(text: str, options: dict[str, Any]) -> ClipAdapter:
    """Load "ARCH:TAG" or "ARCH:/path/to/weights"; the path may contain colons."""
    import open_clip

    name, _, weights = text.partition(":")
    arch = _architecture(text)
    config = open_clip.get_model_config(arch)
    if config is None:
        raise InputError(f"open_clip has no architecture {name!r}; did you mean {', '.join(_near(arch))}?")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not weights:
        example = tags[0] if tags else "/path/to/weights.pt"
        raise InputError(
            f"{text!r} names an architecture but no weights, so the model would be random; pass '{arch}:{example}' "
            f"or '{arch}:/path/to/weights.pt'" + (f"; its tags are {', '.join(tags)}" if tags else "")
        )
    if open_clip.is_pretrained_cfg(arch, weights):
        return _load_tag(arch, weights, config, options)
    path = user_path(weights)
    if path.is_file():
        try:
            module = load_weights(config, path, arch)
        except InputError:
            raise
        except Exception as error:  # from the libraries that build the towers
            raise InputError(f"the checkpoint {path} does not load as {arch}: {first_lines(error)}") from error
        return _wrap(module, arch, config, options)
    if path.is_dir():
        raise InputError(
            f"the checkpoint {weights} for {arch} is a folder; name the file of weights in it, or pass only the "
            "folder if it is a saved model (to convert a folder of torch.distributed.checkpoint: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {weights} weights.pt)"
        )
    if "/" in weights or "\\" in weights or path.suffix in _WEIGHT_FILES:
        raise InputError(f"there is no checkpoint {weights!r} for {arch}: no such file")
    near = difflib.get_close_matches(weights, tags, n=1)
    raise InputError(
        f"open_clip has no weights {weights!r} for {arch}; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + (f"its tags are {', '.join(tags)}" if tags else "it has no weights at all: pass a checkpoint file")
    )


def _load_tag(arch: str, tag: str, config: dict[str, Any], options: dict[str, Any]) -> ClipAdapter:
    import open_clip

    known = open_clip.get_pretrained_cfg(arch, tag)
    quick_gelu = bool(known.get("quick_gelu", False))
    if quick_gelu:
        # open_clip only warns when weights trained with QuickGELU are loaded into a model without it.
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
            f"the weights {tag!r} of {arch} could not be fetched: {first_lines(error)}. Download them by hand"
            + (f" from {source}" if source else "")
            + f" and pass '{by_hand}:/path/to/the/file'"
        ) from error
    return _wrap(module, arch, config, options)


def _load_from_hub(text: str, options: dict[str, Any]) -> ClipAdapter:
    import open_clip

    try:
        with offline_if_unreachable():
            module = open_clip.create_model(text, require_pretrained=True)
            config = open_clip.get_model_config(text)
    except Exception as error:  # network, cache and file errors of several libraries
        repository = text.removeprefix("hf-hub:")
        raise InputError(
            f"the model {text!r} could not be fetched: {first_lines(error)}. Download "
            f"https://huggingface.co/{repository} by hand and pass 'local-dir:DIR'"
        ) from error
    return _wrap(module, text, config, options)


def _load_saved(folder: Path, options: dict[str, Any]) -> ClipAdapter:
    config_file = folder / _MARKER
    if not config_file.is_file():
        hint = hint_of_run(folder, [_MARKER])
        if model_type(str(folder)) is not None:
            hint = f", but a model of transformers: pass {str(folder)!r} without 'local-dir:'"
        raise InputError(f"'local-dir:{folder}' is not an open_clip model: there is no {config_file}{hint}")
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise InputError(f"{folder} holds no weights (open_clip_model.safetensors), so the model would be random")
    name = f"local-dir:{folder}"
    try:
        module, config = load_folder(folder)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{config_file} has no {error}: it must be a file that open_clip saved") from error
    except Exception as error:  # bad JSON, wrong settings
        raise InputError(f"the open_clip model in {folder} does not load: {first_lines(error)}") from error
    return _wrap(module, name, config, options)


def _wrap(module: nn.Module, name: str, config: dict[str, Any], options: dict[str, Any]) -> ClipAdapter:
    """Wrap a loaded module. name: the one open_clip's `get_tokenizer` has for the model."""
    if options["tokenizer"] is None:
        try:
            options = {**options, "tokenizer": _tokenizer(name, config["text_cfg"])}
        except Exception as error:  # network, cache and file errors of several libraries
            folder = name.removeprefix("local-dir:")
            by_hand = f", or save its files into {folder} with tokenizer.save_pretrained" if folder != name else ""
            raise InputError(
                f"the tokenizer of {name} could not be loaded: {first_lines(error)}. Pass tokenizer={by_hand}"
            ) from error
    return OpenClipAdapter(module, model_cfg=config, **options)


def _tokenizer(name: str, text_cfg: dict[str, Any]) -> Any:
    """Return what open_clip's `get_tokenizer` does."""
    import open_clip

    if text_cfg.get("hf_tokenizer_name"):
        with offline_if_unreachable():
            return open_clip.get_tokenizer(name)
    if name.startswith("local-dir:") and not text_cfg.get("tokenizer_kwargs"):
        return clip_tokenizer(text_cfg.get("context_length"))
    return open_clip.get_tokenizer(name)


FAMILY = Family(
    name="open_clip",
    instance="an open_clip model",
    strings=(
        "'ViT-B-32:openai' (an open_clip architecture and its weights)",
        "'ARCH:/path/to/weights.pt'",
        "'local-dir:DIR'",
        "'hf-hub:ORG/NAME'",
        "a folder that open_clip saved",
    ),
    marker=_MARKER,
    matches=is_open_clip_model,
    wrap=OpenClipAdapter,
    opens=opens,
    load=load,
)
