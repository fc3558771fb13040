"""Convert a model for another library: open_clip to transformers and back, and to diffusers.

Every conversion is verified before it is returned: on random pixels and tokens the normalised features of both models
agree to 1e-5 in float32. What the other library cannot express is an `InputError` that names it. The result is a new
model in evaluation mode, with the dtype and device of the weights. The images' mean and standard deviation belong to
the processor, not to the model: keep them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.defaults import plain_torch
from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.open_clip_config import Config, build, prove_config
from cliperase_fast.models.adapters.open_clip_loading import is_open_clip_model
from cliperase_fast.models.requirements import require_no_parametrizations, require_trainable, require_weights
from cliperase_fast.models.runtime import is_mixed
from cliperase_fast.models.unwrapping import fold_tuners, outside_inference, unwrap

__all__ = ["to_diffusers_text_encoder", "to_open_clip", "to_transformers"]


def __dir__() -> list[str]:
    return __all__


TOLERANCE = 1e-5  # of a normalised feature

_LEGACY_END = 2  # a transformers eos_token_id that means: pool at the highest id of a row
_VISION_KEYS = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "act_kwargs", "norm_kwargs"}
_TEXT_KEYS = {
    "context_length", "vocab_size", "width", "layers", "heads", "mlp_ratio", "act_kwargs", "norm_kwargs",
    "pool_type", "eos_id", "pad_id",
}  # fmt: skip
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "nonscalar_logit_scale"}
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")

# open_clip's name in a block, transformers' name; the attention's packed projection is split apart
_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")

State = dict[str, Tensor]


@plain_torch()
def to_transformers(model: nn.Module) -> Any:
    """Convert an open_clip CLIP or CustomTextCLIP of plain transformers to a transformers `CLIPModel`.

    It keeps the activation (GELU, its tanh form, or OpenAI's quick GELU) and the pooling of texts: at the highest id
    (eos_token_id 2 in transformers) or at the end-of-text token.
    Raises InputError for what CLIPModel cannot express: ResNets, timm and Hugging Face towers, attention pooling, ...
    """
    transformers = _transformers()
    model = _plain(model)
    config = _open_clip_config(model, "to_transformers")
    embed_dim, vision = config["embed_dim"], config["vision_cfg"]
    _refuse_others("vision_cfg", vision, _VISION_KEYS)
    _refuse_others("the model", config, _MODEL_KEYS)
    quick = config.get("quick_gelu", False)
    result = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=embed_dim,
            vision_config={
                **_tower_config(vision, vision["width"] // vision["head_width"], quick),
                "image_size": _square("image_size", vision["image_size"]),
                "patch_size": _square("patch_size", vision["patch_size"]),
                "projection_dim": embed_dim,
            },
            text_config=_text_config(config),
        )
    )
    return _filled(result, _transformers_state(_without_text(model)), model)


@plain_torch()
def to_open_clip(model: nn.Module) -> Any:
    """Convert a transformers `CLIPModel` to an open_clip `CLIP` with the same activation and pooling of texts.

    Raises InputError for what open_clip cannot express, such as towers with different activations.
    """
    model = _plain(model)
    config = _transformers_config(model)
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or text.hidden_act not in _ACTIVATIONS:
        raise InputError(
            f"open_clip has one activation for both towers, one of {', '.join(_ACTIVATIONS)}; this model has "
            f"{vision.hidden_act} (images) and {text.hidden_act} (texts)"
        )
    if vision.num_channels != 3:
        raise InputError(f"open_clip's towers take 3 channels, this model takes {vision.num_channels}")
    legacy = text.eos_token_id == _LEGACY_END
    result = build(
        {
            "embed_dim": config.projection_dim,
            "quick_gelu": text.hidden_act == "quick_gelu",
            "vision_cfg": {
                **_open_clip_tower(vision),
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            "text_cfg": {
                **_open_clip_tower(text),
                "heads": text.num_attention_heads,
                "vocab_size": text.vocab_size,
                "context_length": text.max_position_embeddings,
                "pool_type": "argmax" if legacy else "eos",
                "eos_id": text.eos_token_id,
            },
        }
    )
    return _filled(result, _open_clip_state(model.state_dict()), model)


@plain_torch()
def to_diffusers_text_encoder(model: nn.Module, *, projection: bool = False) -> Any:
    """Convert the text tower for Stable Diffusion: `pipeline.text_encoder = to_diffusers_text_encoder(model)`.

    model: an open_clip model, whose image tower may be of any kind, or a transformers CLIPModel. Returns a transformers
    `CLIPTextModel`, or with `projection` a `CLIPTextModelWithProjection` (the second encoder of SDXL). Its width must
    be the one that the denoiser expects.
    """
    transformers = _transformers()
    model = _plain(model)
    weight = next(model.parameters())
    if isinstance(model, transformers.CLIPModel):
        config, state = copy.deepcopy(model.config.text_config), model.state_dict()
        config.projection_dim = model.config.projection_dim
    else:
        source = _open_clip_config(model, "to_diffusers_text_encoder")
        _refuse_others("the model", source, _MODEL_KEYS)
        config, state = transformers.CLIPTextConfig(**_text_config(source)), _text_state(_without_text(model))
        projected = transformers.CLIPTextModelWithProjection(config)
        _load_text(projected.to(device=weight.device, dtype=weight.dtype).eval(), state)
        _require_equal(model, projected, _text_difference(model, projected))
    encoder = (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)
    _load_text(encoder, state)
    return encoder.to(device=weight.device, dtype=weight.dtype).eval()


def _load_text(encoder: Any, state: State) -> None:
    """Load the text tower of a CLIPModel's state dict into one of transformers' text models."""
    tower = {name.removeprefix("text_model."): value for name, value in state.items() if name.startswith("text_model.")}
    getattr(encoder, "text_model", encoder).load_state_dict({name: value.contiguous() for name, value in tower.items()})
    if hasattr(encoder, "text_projection"):
        encoder.text_projection.load_state_dict({"weight": state["text_projection.weight"].contiguous()})


def _plain(model: nn.Module) -> nn.Module:
    """Return the model without wrappers, with its adapters merged."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}; pass a torch module, such as result.model or "
            "cliperase_fast.models.load_model(NAME).module"
        )
    model = unwrap(model)
    require_weights(model)
    require_trainable(model)
    require_no_parametrizations(model)
    return fold_tuners(outside_inference(model))


def _transformers() -> Any:
    from cliperase_fast.integrations.transformers import check_version

    check_version()
    import transformers

    return transformers


def _open_clip_config(model: nn.Module, function: str) -> Config:
    if not is_open_clip_model(model):
        others = " or a transformers CLIPModel" if function == "to_diffusers_text_encoder" else ""
        raise InputError(f"{function} takes an open_clip model{others}, not a {type(model).__name__}")
    return prove_config(model, "converted", "Only models of open_clip's own parts, unchanged, can be converted")


def _transformers_config(model: nn.Module) -> Any:
    if not isinstance(model, _transformers().CLIPModel):
        raise InputError(f"to_open_clip takes a transformers CLIPModel, not a {type(model).__name__}")
    return model.config


def _refuse_others(where: str, config: Config, known: set[str]) -> None:
    others = sorted(set(config) - known)
    if others:
        raise InputError(
            f"CLIPModel cannot express {', '.join(others)} of {where}; save the model for open_clip instead"
        )


def _square(name: str, size: Any) -> int:
    if not isinstance(size, int):
        raise InputError(f"CLIPModel takes a square {name} only, not {size}")
    return size


def _tower_config(tower: Config, heads: int, quick: bool) -> Config:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower.get("mlp_ratio", 4.0)),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def _text_config(config: Config) -> Config:
    """Return transformers' configuration of the text tower. config: open_clip's of the whole model."""
    text = config["text_cfg"]
    _refuse_others("text_cfg", text, _TEXT_KEYS)
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos") or (pool == "eos" and text.get("eos_id", 2) == _LEGACY_END):
        raise InputError(
            f"CLIPModel cannot pool texts like this one (pool_type {pool!r}, eos_id {text.get('eos_id', 2)})"
        )
    return {
        **_tower_config(text, text["heads"], config.get("quick_gelu", False)),
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "eos_token_id": _LEGACY_END if pool == "argmax" else text["eos_id"],
        "bos_token_id": text["vocab_size"] - 2,
        "pad_token_id": text.get("pad_id", 0),
        "projection_dim": config["embed_dim"],
    }


def _open_clip_tower(tower: Any) -> Config:
    config = {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": (tower.intermediate_size + 0.5) / tower.hidden_size,  # open_clip rounds down
    }
    if tower.hidden_act == "gelu_pytorch_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if tower.layer_norm_eps != 1e-5:
        config["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return config


def _renamed(layers: dict[str, int]) -> list[tuple[str, str]]:
    """Return (open_clip's, transformers') names of what is only renamed. layers: numbers for 'vision' and 'text'."""
    pairs = [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ]
    for ours, theirs, kind in (("visual.", "vision_model.", "vision"), ("", "text_model.", "text")):
        for layer in range(layers[kind]):
            old, new = f"{ours}transformer.resblocks.{layer}.", f"{theirs}encoder.layers.{layer}."
            pairs += [(old + left, new + right) for left, right in _BLOCK]
    return [(f"{left}.{part}", f"{right}.{part}") for left, right in pairs for part in ("weight", "bias")]


_SINGLE = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
)


def _attention_names(layers: dict[str, int]) -> list[tuple[str, str]]:
    """Return (open_clip's, transformers') prefixes of each attention."""
    return [
        (f"{ours}transformer.resblocks.{layer}.attn.", f"{theirs}encoder.layers.{layer}.self_attn.")
        for ours, theirs, kind in (("visual.", "vision_model.", "vision"), ("", "text_model.", "text"))
        for layer in range(layers[kind])
    ]


def _layers(state: State, vision: str, text: str) -> dict[str, int]:
    return {
        kind: len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
        for kind, prefix in (("vision", vision), ("text", text))
    }


_NO_PROJECTION = "CLIPModel projects the features of both towers, but this model has a tower without projection"


def _transformers_state(state: State) -> State:
    result = {**_renamed_state(state, "vision_model."), **_text_state(state)}
    if "visual.proj" not in state:
        raise InputError(_NO_PROJECTION)
    result["visual_projection.weight"] = state["visual.proj"].T
    result["logit_scale"] = state["logit_scale"].reshape(())
    return result


def _text_state(state: State) -> State:
    """Return the text tower's part of the state. The image tower may be any."""
    result = _renamed_state(state, "text_model.")
    linear = state.get("text_projection.weight")
    if linear is None and "text_projection" not in state:
        raise InputError(_NO_PROJECTION)
    result["text_projection.weight"] = state["text_projection"].T if linear is None else linear
    return result


def _renamed_state(state: State, tower: str) -> State:
    """Return a tower's blocks, embeddings and norms under transformers' names. tower: their prefix."""
    layers = _layers(state, "visual.transformer.resblocks.", "transformer.resblocks.")
    names = (*_SINGLE, *_renamed(layers))
    result = {theirs: state[ours] for ours, theirs in names if theirs.startswith(tower)}
    for ours, theirs in _attention_names(layers):
        for kind in ("weight", "bias") if theirs.startswith(tower) else ():
            for part, tensor in zip(_PARTS, state[f"{ours}in_proj_{kind}"].chunk(3), strict=True):
                result[f"{theirs}{part}.{kind}"] = tensor
    return result


def _without_text(model: nn.Module) -> State:
    """Return the state dict of an open_clip model with the names of a CLIP: a CustomTextCLIP's start with "text."."""
    return {name.removeprefix("text."): value for name, value in model.state_dict().items()}


def _open_clip_state(state: State) -> State:
    layers = _layers(state, "vision_model.encoder.layers.", "text_model.encoder.layers.")
    result = {ours: state[theirs] for ours, theirs in (*_SINGLE, *_renamed(layers))}
    for ours, theirs in _attention_names(layers):
        for kind in ("weight", "bias"):
            result[f"{ours}in_proj_{kind}"] = torch.cat([state[f"{theirs}{part}.{kind}"] for part in _PARTS])
    result["visual.proj"] = state["visual_projection.weight"].T
    result["text_projection"] = state["text_projection.weight"].T
    result["logit_scale"] = state["logit_scale"].reshape(())
    return result


def _filled(result: nn.Module, state: State, source: nn.Module) -> Any:
    """Load the weights into `result`, and verify it against `source`."""
    weight = next(source.parameters())
    result.to(device=weight.device, dtype=weight.dtype)
    result.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    result.eval()
    _require_equal(source, result, _difference(source, result))
    return result


def _require_equal(source: nn.Module, result: nn.Module, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise InputError(
            f"this {type(source).__name__} cannot be converted: the features of the {type(result).__name__} differ "
            f"by {difference:.1e}; it has a part that the other library computes differently"
        )


@torch.no_grad()
def _difference(source: nn.Module, result: nn.Module) -> float:
    """Return the largest difference between the normalised features of both on random input, in float32."""
    functions = [_features(_exact(model)) for model in (source, result)]
    clip: Any = source if hasattr(source, "visual") else result  # the one of open_clip knows its sizes
    text = getattr(clip, "text", clip)
    device = next(source.parameters()).device
    generator = torch.Generator("cpu").manual_seed(0)
    size = clip.visual.image_size
    shape = (2, 3, *((size, size) if isinstance(size, int) else size))
    pixels = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    images, texts = pixels.to(device), _random_tokens(text, generator).to(device)
    ours, theirs = ([image(images), write(texts)] for image, write in functions)
    return max((left - right).abs().max().item() for left, right in zip(ours, theirs, strict=True))


@torch.no_grad()
def _text_difference(source: Any, encoder: nn.Module) -> float:
    """Return the largest difference between normalised text features. encoder: a CLIPTextModelWithProjection."""
    tokens = _random_tokens(getattr(source, "text", source), torch.Generator("cpu").manual_seed(0))
    tokens = tokens.to(next(source.parameters()).device)
    exact: Any = _exact(source)
    ours, theirs = exact.encode_text(tokens), _exact(encoder)(input_ids=tokens).text_embeds
    ours, theirs = (nn.functional.normalize(features.float(), dim=-1) for features in (ours, theirs))
    return float((ours - theirs).abs().max())


def _random_tokens(text: Any, generator: torch.Generator) -> Tensor:
    """Return captions int64 [4, L], each with an end mark. text: an open_clip text tower, or a model that is one."""
    shape = (4, text.context_length)
    tokens = torch.randint(1, text.vocab_size - 1, shape, generator=generator, dtype=torch.int64, device="cpu")
    end = text.vocab_size - 1
    if (getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax")) == "eos":
        end = getattr(text, "eos_id", getattr(text, "text_eos_id", end))
    rows = torch.arange(4, dtype=torch.int64, device="cpu")
    tokens[tokens == end] = 1
    tokens[rows, text.context_length // 2 + rows.clamp_max(text.context_length // 2 - 1)] = end
    tokens[0, -1] = end  # the first end mark counts
    return tokens


def _exact(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy, in evaluation mode."""
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64) and not is_mixed(model)
    if exact and not model.training:
        return model
    return copy.deepcopy(model).float().eval()


def _features(model: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    def normal(output: Any) -> Tensor:
        features = getattr(output, "pooler_output", output)
        features = features[0] if isinstance(features, tuple) else features
        return nn.functional.normalize(features.float(), dim=-1)

    if hasattr(model, "encode_image"):
        return lambda images: normal(model.encode_image(images)), lambda texts: normal(model.encode_text(texts))
    return (
        lambda images: normal(model.get_image_features(pixel_values=images)),
        lambda texts: normal(model.get_text_features(input_ids=texts)),
    )
