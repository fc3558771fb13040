"""Map the names of weights in a checkpoint to the names in a model.

Trainers and wrappers add prefixes (`module.`, `_orig_mod.`, `model.`), put the weights under a key ("model",
"state_dict") and store others beside them (optimizers, averaged weights). The names to find are known, so the prefixes
need not be: a prefix is whatever precedes the names of the model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.models.checkpoint_files import StandIn, describe_module

_log = logging.getLogger(__name__)

# Wrappers around parts of a model; no model has parts with these names.
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_AVERAGED = re.compile(r"ema|averag|teacher|momentum|shadow|swa|target", re.IGNORECASE)
_DROPPED = re.compile(r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$")
_DEPTH = 4
_TOP = "the top level"


@dataclass(frozen=True)
class _Found:
    where: str  # the keys that lead to it and the prefix of its names, for messages
    keys: str  # the keys alone
    prefix: str
    state: dict[str, Tensor]  # without the prefix
    covered: int  # how many of the expected names it has


def match_names(
    content: Any, expected: Mapping[str, Tensor], path: Path, name: str, optional: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Find the weights for `expected` in the content of a checkpoint, with exactly the expected names and shapes.

    expected: the state dict of the model to fill. path, name: the checkpoint and the model, for errors. optional: names
    that may be missing. Raises `InputError` with the format, the names or the shapes that do not fit.
    """
    failed = f"the checkpoint {path} does not load as {name}"
    whole = [value for value in _values(content, _DEPTH) if isinstance(value, StandIn) and value.is_module]
    found = sorted(_candidates(content, expected), key=lambda one: -one.covered)
    needed = [key for key in expected if key not in optional]
    full = [one for one in found if all(key in one.state for key in needed)]
    if not full:
        if whole and not found:
            raise InputError(
                f"the checkpoint {path} does not load as {name}: {describe_module(type(whole[0]).__name__)}"
            )
        raise InputError(f"the checkpoint {path} does not load as {name}: {_missing(content, found, needed)}")
    chosen = _chosen(full, path)
    others = tuple(one.prefix for one in full if one is not chosen and one.keys == chosen.keys)
    state = {
        key: tensor
        for key, tensor in chosen.state.items()
        if key in expected or not (_DROPPED.search(key) or (chosen.prefix + key).startswith(others))
    }
    extra = [key for key in state if key not in expected]
    if extra:
        raise InputError(
            f"{failed}: it also holds {extra[0]!r}"
            + (f" and {len(extra) - 1} more names" if len(extra) > 1 else "")
            + " that this architecture does not have; name the architecture it was made with, or save only the "
            "model's own weights"
        )
    return {key: _shaped(state[key], expected[key], key, path, name) for key in expected if key in state}


def _chosen(full: list[_Found], path: Path) -> _Found:
    """Return the only candidate, or the only one that is not an average of weights."""
    if len(full) > 1:
        plain = [one for one in full if not _AVERAGED.search(one.where)]
        places = ", ".join(repr(one.where) for one in full)
        if len(plain) != 1:
            raise InputError(
                f"the checkpoint {path} holds the model {len(full)} times ({places}); save only the one to use, "
                "with torch.save(state_dict, PATH)"
            )
        _log.warning("%s holds the model %d times (%s); using %r", path, len(full), places, plain[0].where)
        return plain[0]
    return full[0]


def _candidates(content: Any, expected: Mapping[str, Tensor]) -> Iterator[_Found]:
    names = list(expected)
    anchors = {names[0], names[len(names) // 2], names[-1], "logit_scale"} & set(names)
    seen: set[tuple[int, ...]] = set()
    for where, mapping in _mappings(content, "", _DEPTH):
        tensors = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}
        for state in _spellings(tensors, names):
            prefixes = {key[: -len(anchor)] for anchor in anchors for key in state if _ends_with(key, anchor)}
            for prefix in sorted(prefixes, key=len):
                own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
                covered = sum(key in own for key in names)
                if covered:
                    identity = tuple(sorted(id(own[key]) for key in names if key in own))
                    if identity not in seen:  # the same tensors under another spelling
                        seen.add(identity)
                        shown = ".".join(filter(None, (where, prefix.rstrip(".")))) or _TOP
                        yield _Found(shown, where, prefix, own, covered)


def _spellings(tensors: dict[str, Tensor], names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors without the names of wrappers around parts of the model."""
    if not tensors:
        return
    plain = {_WRAPPERS.sub("", key): value for key, value in tensors.items()}
    yield plain
    if not any("module." in name for name in names) and any(".module." in key for key in plain):
        yield {key.replace(".module.", "."): value for key, value in plain.items()}


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _mappings(content: Any, where: str, depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if not isinstance(content, Mapping):
        return
    yield where, content
    for key, value in content.items():
        if depth > 0 and isinstance(key, str) and not key.startswith("optimizer"):
            yield from _mappings(value, f"{where}.{key}" if where else key, depth - 1)


def _values(content: Any, depth: int) -> Iterator[Any]:
    yield content
    if isinstance(content, Mapping) and depth > 0:
        for value in content.values():
            yield from _values(value, depth - 1)


def _shaped(tensor: Tensor, like: Tensor, key: str, path: Path, name: str) -> Tensor:
    if tensor.layout != like.layout or tensor.is_meta:
        raise InputError(f"the checkpoint {path} does not load as {name}: {key} has no values in it")
    if like.is_floating_point() and not tensor.is_floating_point():
        raise InputError(
            f"the checkpoint {path} does not load as {name}: {key} holds {tensor.dtype} values where the model has "
            "floating-point numbers, so it is quantized or of another model; save the weights before quantization"
        )
    if tensor.shape == like.shape:
        return tensor
    if tensor.numel() == like.numel() == 1:  # a scale, with or without a dimension
        return tensor.reshape(like.shape)
    sizes = f"size mismatch of {key}: {list(tensor.shape)} in the checkpoint, {list(like.shape)} in the architecture"
    failed = f"the checkpoint {path} does not load as {name}"
    if "visual" in key and re.search(r"pos(itional)?_embed", key):
        raise InputError(
            f"{failed}: it was made for images of another size ({sizes}); name the architecture of that size, or let "
            f"open_clip resize it, open_clip.create_model({name!r}, pretrained={str(path)!r}), and pass that model"
        )
    if re.search(r"(^|\.)positional_embedding$", key):
        failed += ": it was made for another context length"
    raise InputError(f"{failed}: {sizes}; name the architecture it was made with")


def _missing(content: Any, found: list[_Found], needed: list[str]) -> str:
    """Return why no weights fit, with the fix if the names tell what the file is."""
    names = [
        key for _, mapping in _mappings(content, "", _DEPTH) for key, value in mapping.items() if _is_entry(key, value)
    ]
    if any(".lora_" in name or "lora_A" in name for name in names):
        return (
            "it holds LoRA layers of peft; load the model with them, fold them in (peft_model.merge_and_unload()), and "
            "pass that model or a checkpoint of it"
        )
    if any("vision_model.embeddings" in name for name in names) and not any("vision_model" in name for name in needed):
        return (
            "its names are those of a transformers CLIPModel (vision_model.…); put the file as model.safetensors or "
            "pytorch_model.bin into a folder with that model's config.json and pass the folder, or convert the model "
            "with cliperase_fast.export.to_open_clip"
        )
    if any("visual.conv1" in name for name in names) and any("vision_model" in name for name in needed):
        return "its names are those of an open_clip model (visual.…); pass 'ARCH:PATH', such as 'ViT-B-32:/weights.pt'"
    if any(name.startswith(("vision_model.", "text_model.", "text.")) for name in names) and not found:
        return f"its names ({names[0]}, ...) are those of another library's model"
    if any(isinstance(value, StandIn) and value.is_array for value in _values(content, _DEPTH)) and not names:
        return (
            "its weights are NumPy arrays, and only tensors are read; save them with "
            "torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, PATH)"
        )
    if not names:
        return f"it holds no named tensors ({_described(content)}); use torch.save(model.state_dict(), PATH)"
    if not found:
        return (
            f"none of its {len(names)} tensors has a name of this architecture (its first is {names[0]!r}, the "
            f"architecture's {needed[0]!r})"
        )
    lacking = [key for key in needed if key not in found[0].state]
    under = "" if found[0].where == _TOP else f" under {found[0].where!r}"
    return (
        f"it lacks {len(lacking)} of the {len(needed)} weights{under} (Missing: "
        f"{', '.join(map(repr, lacking[:3]))}{', ...' if len(lacking) > 3 else ''}), which would be random; name the "
        "architecture it was made with"
    )


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        return "its keys: " + ", ".join(map(str, list(content)[:5])) if content else "it is empty"
    return f"it is a {type(content).__name__}"
