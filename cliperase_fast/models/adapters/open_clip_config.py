"""Infer the configuration of an open_clip model from the model itself, and prove it.

Saving needs it: open_clip loads a folder by building the model that its `open_clip_config.json` describes.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.equivalence import random_pixels, tolerance
from cliperase_fast.models.runtime import evaluating, is_mixed

Config = dict[str, Any]

TEXT_CONFIG = "text_config"  # folder in a saved model with the Hugging Face configuration of its text tower


_BY_NAME = (
    "Pass the model as a string such as 'ViT-B-32:openai' or 'ARCH:/path/to/weights', or save it yourself with an "
    "open_clip_config.json and pass 'local-dir:DIR'"
)


def prove_config(module: nn.Module, failure: str = "saved as an open_clip folder", remedy: str = _BY_NAME) -> Config:
    """Return the `model_cfg` that rebuilds `module` exactly: same state dict, same features on random input.

    Raises `InputError` with what was tried if there is none. failure, remedy: what it cannot be then, and what to do.
    """
    tried = []
    for label, config in _candidates(module, failure, remedy):
        try:
            difference = _difference(module, config)
        except Exception as error:  # a wrong guess: open_clip, timm and transformers raise their own errors
            tried.append(f"{label}: {type(error).__name__}: {_first_line(error)}")
            continue
        if difference <= tolerance(module):
            return config
        tried.append(f"{label}: its features differ by {difference:.1e}")
    reasons = "; ".join(tried) or "none is known"
    raise InputError(
        f"this {type(module).__name__} cannot be {failure}: no configuration rebuilds it ({reasons}). {remedy}"
    )


def build(config: Config) -> nn.Module:
    """Build a model of that configuration with random weights, of the class that `create_model` chooses."""
    import open_clip

    config = copy.deepcopy(config)
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if custom_text and "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)


def is_native(config: Config) -> bool:
    """Return whether both towers are open_clip's own, which can be built without memory for their weights."""
    return not {"timm_model_name", "hf_model_name"} & {*config["vision_cfg"], *config["text_cfg"]}


def build_around(config: Config, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """Build a native model of that configuration that uses the tensors of `state`, without a copy of them."""
    with torch.device("meta"):
        module = build(config)
    module.load_state_dict(state, strict=True, assign=True)
    _fill_causal_masks(module, device)
    return module


@torch.no_grad()
def _difference(module: nn.Module, config: Config) -> float:
    """Return the largest difference between the features of `module` and of a model of `config` with its weights."""
    if is_mixed(module):
        module = copy.deepcopy(module).float()
    state = saved_state(module, config)
    parameter = next(module.parameters())
    with torch.random.fork_rng(devices=[]):  # building a model draws random weights; keep the caller's seed
        if is_native(config):  # spend no memory and time on weights that are replaced at once
            twin = build_around(config, state, parameter.device)
        else:
            with text_config_at_hand(module, config) as found:
                twin = build(found)
            twin.load_state_dict(state, strict=True)
            twin.to(device=parameter.device, dtype=parameter.dtype)
    worst = 0.0
    with evaluating(module), evaluating(twin):
        for method, inputs in (
            ("encode_image", probe_pixels(module)),
            ("encode_text", probe_tokens(module).to(parameter.device)),
        ):
            ours, theirs = (_features(getattr(model, method)(inputs)) for model in (module, twin))
            worst = max(worst, (ours - theirs).abs().max().item())
    return worst


def saved_state(module: nn.Module, config: Config) -> dict[str, Tensor]:
    """Return the state dict in the form that a model of `config` loads.

    Scales of one element get that model's number of dimensions. The pooler in a Hugging Face text tower is left out if
    open_clip's own pooling does not read it.
    """
    state = module.state_dict()
    shape = [1] if config.get("nonscalar_logit_scale") else []
    for name in ("logit_scale", "logit_bias"):
        if name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(shape)
    if "hf_model_name" in config["text_cfg"] and config["text_cfg"].get("hf_pooler_type") != "cls_pooler":
        state = {key: value for key, value in state.items() if not key.startswith("text.transformer.pooler.")}
    return state


@contextmanager
def text_config_at_hand(module: Any, config: Config) -> Iterator[Config]:
    """Yield `config` with its Hugging Face text tower named by a folder with its configuration, not by the hub."""
    if "hf_model_name" not in config["text_cfg"]:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="cliperase-") as folder:
        module.text.config.save_pretrained(folder)
        yield with_text_config(config, Path(folder))


def with_text_config(config: Config, folder: Path) -> Config:
    return {**config, "text_cfg": {**config["text_cfg"], "hf_model_name": str(folder)}}


def _features(output: Any) -> Tensor:
    features = output[0] if isinstance(output, tuple) else output
    return nn.functional.normalize(features.double(), dim=-1)


def _fill_causal_masks(twin: nn.Module, device: torch.device) -> None:
    """Fill the causal masks, which are rebuilt and not saved, so they are empty on the meta device."""
    for owner in twin.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "attn_mask":
                    raise InputError(f"buffer {name} is neither saved nor known")
                mask = torch.full(buffer.shape, float("-inf"), dtype=buffer.dtype, device=device).triu_(1)
                owner.register_buffer(name, mask, persistent=False)


def probe_pixels(module: Any) -> Tensor:  # [2, 3, H, W]
    return random_pixels(_pair(module.visual.image_size), next(module.visual.parameters()))


def probe_tokens(module: Any, length: int | None = None) -> Tensor:  # [4, L]; two rows end in padding
    """Return random token ids. length: the tokens per caption if the model does not say."""
    generator = torch.Generator("cpu").manual_seed(0)
    text = getattr(module, "text", module)
    length = length or min(int(text.context_length), text_limit(text))
    tokens = torch.randint(
        1, max(int(text.vocab_size), 2), (4, length), generator=generator, dtype=torch.int64, device="cpu"
    )
    pad = text.config.pad_token_id if hasattr(text, "config") else getattr(text, "pad_id", 0)
    tokens[:2, length - length // 3 :] = 0 if pad is None else pad
    return tokens


def text_limit(text: Any) -> int:
    """Return the most tokens that a text tower reads; at most 77, open_clip's default, for Hugging Face towers."""
    if not hasattr(text, "config"):
        return int(text.context_length)
    positions = int(getattr(text.config, "max_position_embeddings", 0) or 0)
    if "roberta" in text.config.model_type:  # its positions start after the padding id
        positions -= int(text.config.pad_token_id) + 1
    return min(positions, 77) if positions > 0 else 77


def _candidates(module: nn.Module, failure: str, remedy: str) -> Iterator[tuple[str, Config]]:
    import open_clip

    if isinstance(module, open_clip.CoCa):  # its decoder cannot be inferred; only known configurations are tried
        for name in open_clip.list_models():
            config = open_clip.get_model_config(name)
            if "multimodal_cfg" in config:
                yield name, config
        return
    try:
        for config in _inferred(module):
            towers = [config["vision_cfg"].get("timm_model_name"), config["text_cfg"].get("hf_model_name")]
            named = ", ".join(name for name in towers if name)
            yield "inferred from the model" + (f" with {named}" if named else ""), config
    except (AttributeError, IndexError, TypeError) as error:
        raise InputError(
            f"this {type(module).__name__} is not built as open_clip builds it ({error}), so it cannot be {failure}. "
            f"{remedy}"
        ) from error


def _inferred(module: Any) -> Iterator[Config]:
    import open_clip

    is_custom = isinstance(module, open_clip.CustomTextCLIP)
    text: Any = module.text if is_custom else module
    text_config = _hf_text(text) if hasattr(text, "config") else _native_text(text)
    for vision_config in _vision(module.visual):
        config: Config = {
            "embed_dim": _embed_dim(module, text),
            "vision_cfg": vision_config,
            "text_cfg": text_config,
        }
        if _uses_quick_gelu(module):
            config["quick_gelu"] = True
        if is_custom:
            config["custom_text"] = True
        if getattr(module, "logit_bias", None) is not None:
            config["init_logit_bias"] = float(module.logit_bias.detach().flatten()[0])
        if module.logit_scale.ndim:
            config["nonscalar_logit_scale"] = True
        yield config


def _embed_dim(module: Any, text: Any) -> int:
    projection = getattr(text, "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if projection is not None:
        return projection.shape[1]
    for owner in (text, module.visual):
        if getattr(owner, "output_dim", None):
            return int(owner.output_dim)
    return int(text.ln_final.weight.shape[0])


def _uses_quick_gelu(module: nn.Module) -> bool:
    from open_clip.transformer import QuickGELU

    return any(isinstance(child, QuickGELU) for child in module.modules())


def _vision(visual: Any) -> Iterator[Config]:
    if hasattr(visual, "trunk"):
        yield from _timm(visual)
    elif hasattr(visual, "layer4"):
        width, heads = visual.layer1[0].conv1.out_channels, visual.attnpool.num_heads
        yield {
            "image_size": _single(visual.image_size),
            "layers": [len(getattr(visual, f"layer{index}")) for index in (1, 2, 3, 4)],
            "width": width,
            "head_width": width * 32 // heads,
            "patch_size": None,
        }
    else:
        yield _vision_transformer(visual)


def _vision_transformer(visual: Any) -> Config:
    import open_clip

    width = visual.conv1.out_channels
    pool = visual.attn_pool
    config = {
        "image_size": _single(visual.image_size),
        "patch_size": _single(visual.conv1.kernel_size),
        "width": width,
        "layers": len(visual.transformer.resblocks),
        "head_width": width // visual.transformer.resblocks[0].attn.num_heads,
        **_transformer(visual.transformer, width),
        "patch_dropout": getattr(visual.patch_dropout, "prob", 0.0),
        "no_ln_pre": isinstance(visual.ln_pre, nn.Identity),
        "pool_type": visual.pool_type,
        "final_ln_after_pool": visual.final_ln_after_pool,
        "output_tokens": visual.output_tokens,
        "norm_kwargs": _norm_options(visual.ln_post),
    }
    if pool is not None:
        config["attentional_pool"] = visual.attn_pool_type or True
        config["attn_pooler_queries"] = len(pool.query)
        config["attn_pooler_heads"] = pool.attn.num_heads
        if visual.attn_pool_type:
            del config["pool_type"]
    return _without_defaults(config, open_clip.CLIPVisionCfg())


def _native_text(text: Any) -> Config:
    import open_clip

    width = text.token_embedding.embedding_dim
    projection = text.text_projection
    config = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": width,
        "heads": text.transformer.resblocks[0].attn.num_heads,
        "layers": len(text.transformer.resblocks),
        **_transformer(text.transformer, width),
        "embed_cls": getattr(text, "cls_emb", None) is not None,
        "pad_id": getattr(text, "pad_id", 0),
        "eos_id": getattr(text, "eos_id", getattr(text, "text_eos_id", 2)),
        "no_causal_mask": text.attn_mask is None,
        "pool_type": getattr(text, "pool_type", None) or text.text_pool_type,
        "proj_type": "none" if projection is None else "linear",
        "proj_bias": isinstance(projection, nn.Linear),
        "output_tokens": getattr(text, "output_tokens", False),
        "norm_kwargs": _norm_options(text.ln_final),
    }
    return _without_defaults(config, open_clip.CLIPTextCfg())


def _transformer(transformer: Any, width: int) -> Config:
    """Return the settings of the blocks that vision and text configurations share."""
    block = transformer.resblocks[0]
    hidden = block.mlp.c_fc.out_features
    ratio = hidden / width
    config: Config = {
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,  # open_clip rounds down
        "ls_init_value": 1e-5 if hasattr(block.ls_1, "gamma") else None,  # the value itself is in the weights
        "act_kwargs": {"approximate": "tanh"} if getattr(block.mlp.gelu, "approximate", "none") == "tanh" else None,
    }
    if hasattr(block, "ln_attn"):  # a custom block (plain blocks of open_clip 4 have their own attention too)
        config |= {
            "block_type": "custom",
            "qk_norm": not isinstance(block.attn.ln_q, nn.Identity),
            "scaled_cosine_attn": block.attn.scaled_cosine,
            "scale_heads": block.attn.scale_heads,
            "scale_attn_inner": not isinstance(block.attn.ln_inner, nn.Identity),
            "scale_attn": not isinstance(block.ln_attn, nn.Identity),
            "scale_fc": not isinstance(block.mlp.ln, nn.Identity),
        }
    return config


def _hf_text(text: Any) -> Config:
    """Return the settings of a text tower from transformers, whose configuration is saved in `TEXT_CONFIG`."""
    projection = {nn.Linear: "linear", nn.Sequential: "mlp"}.get(type(text.proj))
    name = text.config._name_or_path or TEXT_CONFIG
    return {
        "hf_model_name": name,
        "hf_tokenizer_name": text.config._name_or_path or ".",
        "hf_proj_type": projection,
        "hf_pooler_type": re.sub(r"(?<!^)(?=[A-Z])", "_", type(text.pooler).__name__).lower(),
        "output_tokens": text.output_tokens,
    }


def _timm(visual: Any) -> Iterator[Config]:
    """Yield configurations of a timm trunk with the usual poolings: not every model shows which one it has."""
    head = dict(visual.head.named_children())
    no_head = "" if visual.trunk.num_classes else "none"  # either the trunk's classifier projects or nothing does
    config: Config = {
        "timm_model_name": visual.trunk.default_cfg["architecture"],
        "timm_proj": "mlp" if "mlp" in head else "linear" if "proj" in head else no_head,
        "image_size": _single(visual.image_size),
    }
    if "proj" in head:
        config["timm_proj_bias"] = head["proj"].bias is not None
        config["timm_drop"] = head["drop"].p
    elif "mlp" in head:
        config["timm_proj_bias"] = head["mlp"].fc2.bias is not None
    pools = [getattr(visual.trunk, "global_pool", ""), "", "avg", "token", "map", "abs_attn", "rot_attn"]
    if "pool" in head:
        pools.reverse()
    for pool in dict.fromkeys(pool for pool in pools if isinstance(pool, str)):
        yield {**config, "timm_pool": pool}


def _norm_options(norm: nn.Module) -> Config | None:
    eps = getattr(norm, "eps", 1e-5)
    return None if eps == 1e-5 else {"eps": eps}


def _without_defaults(config: Config, defaults: Any) -> Config:
    """Return the sizes, and the other settings that differ from open_clip's defaults."""
    always = {
        "image_size",
        "patch_size",
        "width",
        "layers",
        "head_width",
        "context_length",
        "vocab_size",
        "heads",
    }
    usual = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    known = {key: value for key, value in config.items() if key in usual}  # older versions have fewer
    return {key: value for key, value in known.items() if key in always or value != usual[key]}


def _single(size: Any) -> Any:
    """Return 16 for (16, 16), and a list for two different sizes."""
    pair = _pair(size)
    return pair[0] if pair[0] == pair[1] else list(pair)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]
