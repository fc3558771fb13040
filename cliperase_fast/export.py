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

from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.open_clip_config import Config, build, prove_config
from cliperase_fast.models.requirements import require_no_parametrizations, require_trainable, require_weights
from cliperase_fast.models.unwrapping import fold_tuners, unwrap

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


@torch_defaults()
def to_transformers(model: nn.Module) -> Any:
    """Convert an open_clip CLIP or CustomTextCLIP of plain transformers to a transformers `CLIPModel`.

    It keeps the activation (GELU, its tanh form, or OpenAI's quick GELU) and the pooling of texts: at the highest id
    (eos_token_id 2 in transformers) or at the end-of-text token.
    Raises InputError for what CLIPModel cannot express: ResNets, timm and Hugging Face towers, attention pooling, ...
    """
    transformers = _transformers()
    model = _plain(model)
    config = prove_config(model)
    embed_dim, vision, text = config["embed_dim"], config["vision_cfg"], config["text_cfg"]
    _refuse_others("vision_cfg", vision, _VISION_KEYS)
    _refuse_others("text_cfg", text, _TEXT_KEYS)
    _refuse_others("the model", config, _MODEL_KEYS)
    quick = config.get("quick_gelu", False)
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos") or (pool == "eos" and text.get("eos_id", 2) == _LEGACY_END):
        raise InputError(
            f"CLIPModel cannot pool texts like this one (pool_type {pool!r}, eos_id {text.get('eos_id', 2)})"
        )
    result = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=embed_dim,
            vision_config={
                **_tower_config(vision, vision["width"] // vision["head_width"], quick),
                "image_size": _square("image_size", vision["image_size"]),
                "patch_size": _square("patch_size", vision["patch_size"]),
                "projection_dim": embed_dim,
            },
            text_config={
                **_tower_config(text, text["heads"], quick),
                "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "eos_token_id": _LEGACY_END if pool == "argmax" else text["eos_id"],
                "bos_token_id": text["vocab_size"] - 2,
                "pad_token_id": text.get("pad_id", 0),
                "projection_dim": embed_dim,
            },
        )
    )
    state = {name.removeprefix("text."): value for name, value in model.state_dict().items()}
    return _filled(result, _transformers_state(state), model)


@torch_defaults()
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


@torch_defaults()
def to_diffusers_text_encoder(model: nn.Module, *, projection: bool = False) -> Any:
    """Convert the text tower for Stable Diffusion: `pipeline.text_encoder = to_diffusers_text_encoder(model)`.

    model: an open_clip model or a transformers CLIPModel. Returns a transformers `CLIPTextModel`, or with `projection`
    a `CLIPTextModelWithProjection` (the second encoder of SDXL). Its width must be the one that the denoiser expects.
    """
    transformers = _transformers()
    model = _plain(model)
    clip: Any = model if isinstance(model, transformers.CLIPModel) else to_transformers(model)
    config = copy.deepcopy(clip.config.text_config)
    config.projection_dim = clip.config.projection_dim
    encoder = (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)
    getattr(encoder, "text_model", encoder).load_state_dict(clip.text_model.state_dict())
    if projection:
        encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    weight = next(clip.parameters())
    return encoder.to(device=weight.device, dtype=weight.dtype).eval()


def _plain(model: nn.Module) -> nn.Module:
    """Return the model without wrappers, with its adapters merged."""
    model = unwrap(model)
    require_weights(model)
    require_trainable(model)
    require_no_parametrizations(model)
    return fold_tuners(model)


def _transformers() -> Any:
    from cliperase_fast.integrations.transformers import check_version

    check_version()
    import transformers

    return transformers


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


def _transformers_state(state: State) -> State:
    layers = _layers(state, "visual.transformer.resblocks.", "transformer.resblocks.")
    result = {theirs: state[ours] for ours, theirs in (*_SINGLE, *_renamed(layers))}
    for ours, theirs in _attention_names(layers):
        for kind in ("weight", "bias"):
            for part, tensor in zip(_PARTS, state[f"{ours}in_proj_{kind}"].chunk(3), strict=True):
                result[f"{theirs}{part}.{kind}"] = tensor
    if "visual.proj" not in state or ("text_projection" not in state and "text_projection.weight" not in state):
        raise InputError(
            "CLIPModel projects the features of both towers, but this model has a tower without projection"
        )
    result["visual_projection.weight"] = state["visual.proj"].T
    linear = state.get("text_projection.weight")
    result["text_projection.weight"] = state["text_projection"].T if linear is None else linear
    result["logit_scale"] = state["logit_scale"].reshape(())
    return result


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
    difference = _difference(source, result)
    if not difference <= TOLERANCE:
        raise InputError(
            f"this {type(source).__name__} cannot be converted: the features of the {type(result).__name__} differ "
            f"by {difference:.1e}; it has a part that the other library computes differently"
        )
    return result


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
    shape = (4, text.context_length)
    tokens = torch.randint(1, text.vocab_size - 1, shape, generator=generator, dtype=torch.int64, device="cpu")
    end = text.vocab_size - 1
    if (getattr(text, "pool_type", None) or getattr(text, "text_pool_type", "argmax")) == "eos":
        end = getattr(text, "eos_id", getattr(text, "text_eos_id", end))
    rows = torch.arange(4, dtype=torch.int64, device="cpu")
    tokens[tokens == end] = 1
    tokens[rows, text.context_length // 2 + rows.clamp_max(text.context_length // 2 - 1)] = end
    tokens[0, -1] = end  # the first end mark counts
    images, texts = pixels.to(device), tokens.to(device)
    ours, theirs = ([image(images), write(texts)] for image, write in functions)
    return max((left - right).abs().max().item() for left, right in zip(ours, theirs, strict=True))


def _exact(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy, in evaluation mode."""
    if not model.training and next(model.parameters()).dtype in (torch.float32, torch.float64):
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
