"""The adapter of open_clip models: CLIP, CustomTextCLIP, CoCa."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapters.base import ClipAdapter, Projection, Tower, longest_stack
from cliperase_fast.models.adapters.open_clip_config import (
    TEXT_CONFIG,
    Config,
    probe_pixels,
    probe_tokens,
    prove_config,
    saved_state,
    text_limit,
)
from cliperase_fast.models.adapters.open_clip_files import load_folder
from cliperase_fast.models.fast_paths.padding import CausalReader, masked_length, read_length
from cliperase_fast.models.preprocessing import clip_tokenizer, is_hugging_face, is_open_clip, is_simple
from cliperase_fast.models.requirements import require_no_parametrizations
from cliperase_fast.models.runtime import in_fast_layout
from cliperase_fast.models.saving import save_weights

CLIP_VOCABULARY = 49408  # entries of CLIP's byte-pair vocabulary, which open_clip includes

_TAIL = re.compile(
    r"visual\.(ln_post|proj|attn_pool|attn_pool_contrastive|attnpool|head"
    r"|trunk\.(norm|fc_norm|norm_head|final_conv|conv_head|bn2|attn_pool|head))\b"
    r"|(text\.)?(ln_final|text_projection|proj|pooler|transformer\.pooler)\b"
)


class OpenClipAdapter(ClipAdapter):
    """Wrap an open_clip model.

    model_cfg: the configuration it was built from, if known; for a bare instance it is inferred, and proved by
    rebuilding the model, when `check_saveable` or `save` first needs it. Without `tokenizer`, a model with CLIP's own
    vocabulary gets open_clip's SimpleTokenizer and any other model gets none. Without `transform` it gets open_clip's
    evaluation transform for the model's `preprocess_cfg`.
    """

    kind = "open_clip"
    _marker = "open_clip_config.json"

    def __init__(
        self,
        module: nn.Module,
        *,
        tokenizer: Any = None,
        transform: Callable[[Any], Tensor] | None = None,
        truncate: bool = False,
        model_cfg: Config | None = None,
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.model_cfg = model_cfg
        self.module = module
        self._reader: tuple[nn.Module, Tensor | None, CausalReader | None] | None = None
        self._given_context = tokenizer.context_length if is_open_clip(tokenizer) else None
        if transform is None:
            transform = image_transform_v2(PreprocessCfg(**self.preprocess_cfg()), is_train=False)
        if tokenizer is None and self.vocabulary_size == CLIP_VOCABULARY:
            tokenizer = clip_tokenizer(self.context_length)
        super().__init__(module, tokenizer=tokenizer, transform=transform, truncate=truncate)

    @property
    def _text(self) -> Any:
        return getattr(self.module, "text", self.module)

    @property
    def context_length(self) -> int:
        limit = text_limit(self._text)
        if hasattr(self._text, "config"):  # Hugging Face towers only say how many tokens they could read
            known = (self.model_cfg or {}).get("text_cfg", {}).get("context_length", limit)
            return int(self._given_context or known)
        return limit

    @property
    def unread_id(self) -> int | None:
        if hasattr(self._text, "config"):
            return self._text.config.pad_token_id
        reader = self._causal_reader()
        return None if reader is None else 0 if reader.end != 0 else 1

    @property
    def vocabulary_size(self) -> int:
        return int(self._text.vocab_size)

    def preprocess_cfg(self) -> dict[str, Any]:
        """Return the model's preprocessing in open_clip's terms: size, mean, std, interpolation, resize_mode, ..."""
        from open_clip.transform import PreprocessCfg

        visual: Any = self.module.visual
        known = dict(getattr(visual, "preprocess_cfg", None) or {})
        for key, attribute in (("mean", "image_mean"), ("std", "image_std"), ("size", "image_size")):
            if getattr(visual, attribute, None) is not None:
                known.setdefault(key, getattr(visual, attribute))
        fields = {field.name for field in dataclasses.fields(PreprocessCfg)}
        known = {key: value for key, value in known.items() if key in fields}
        return dataclasses.asdict(PreprocessCfg(**known))

    def check_saveable(self) -> None:
        """Infer the configuration of a bare instance; raise `InputError` if none rebuilds it."""
        super().check_saveable()
        require_no_parametrizations(self.module)
        if self.model_cfg is None:
            self.model_cfg = prove_config(self.module)

    def own_options(self) -> dict[str, Any]:
        return {"model_cfg": self.model_cfg}

    def tower(self, name: str) -> Tower | None:
        if name == "logit_scale":
            return "scale"
        if name.startswith("visual."):
            return "image"
        return None if name.startswith(("logit_bias", "text_decoder.")) else "text"

    def is_tail(self, name: str) -> bool:
        return _TAIL.match(name) is not None

    def projection(self, tower: Tower) -> Projection | None:
        if tower == "text":
            if hasattr(self._text, "config"):
                return Projection(self._text, "proj", nn.Identity())
            known = getattr(self._text, "text_projection", None) is not None
            return Projection(self._text, "text_projection") if known else None
        visual: Any = self.module.visual
        if isinstance(getattr(visual, "proj", None), Tensor):
            return Projection(visual, "proj")
        head = getattr(visual, "head", None) if hasattr(visual, "trunk") else None
        for name in ("proj", "mlp"):  # of timm's towers
            if isinstance(head, nn.Module) and isinstance(getattr(head, name, None), nn.Module):
                return Projection(head, name, nn.Identity())
        return None

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        if tower == "text":
            transformer = self._text.transformer
            known = hasattr(transformer, "resblocks")
            return list(transformer.resblocks) if known else longest_stack(transformer.modules())
        visual: Any = self.module.visual
        if hasattr(visual, "transformer"):
            return list(visual.transformer.resblocks)
        trunk = getattr(visual, "trunk", visual)
        for name in ("blocks", "stages", "layers"):
            if isinstance(getattr(trunk, name, None), (nn.Sequential, nn.ModuleList)):
                return list(getattr(trunk, name))
        if hasattr(trunk, "layer4"):
            return [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        return longest_stack(trunk.modules())

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _first(self._model.encode_image(in_fast_layout(self._model.visual, pixels)))

    def _text_features(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] < self.context_length:
            reader = self._causal_reader()
            if reader is not None:
                return reader(tokens)
        return _first(self._model.encode_text(tokens))

    def _read_length(self, tokens: Tensor) -> int:
        if hasattr(self._text, "config"):
            return masked_length(self.module, tokens)
        reader = self._causal_reader()
        return tokens.shape[1] if reader is None else read_length(tokens, reader.end)

    def causal_text(self) -> tuple[nn.Module, int | None] | None:
        reader = self._causal_reader()
        return None if reader is None else (reader.tower.ln_final, reader.end)

    def _causal_reader(self) -> CausalReader | None:
        """Return the reader, built once for each module and mask: a copy of the adapter has other ones."""
        mask = getattr(self._text, "attn_mask", None)
        known = self._reader
        if known is None or known[0] is not self.module or known[1] is not mask:
            known = self._reader = (self.module, mask, CausalReader.of(self.module))
        return known[2]

    def _check_tokens(self, tokens: Tensor) -> None:
        super()._check_tokens(tokens)
        if self._text is self.module and tokens.shape[1] != self.context_length:
            raise InputError(
                f"the tokenizer returned {tokens.shape[1]} tokens per caption; this model needs exactly "
                f"{self.context_length} (its context length), with padding on the right"
            )

    def saved_state(self) -> dict[str, Tensor]:
        self.check_saveable()
        assert self.model_cfg is not None
        return saved_state(self.module, self.model_cfg)

    def probe(self) -> tuple[Tensor, Tensor]:
        return probe_pixels(self.module), probe_tokens(self.module, self.context_length)

    def reload(self, directory: Path) -> OpenClipAdapter:
        assert self.model_cfg is not None
        if "hf_model_name" in self.model_cfg["text_cfg"]:  # open_clip would read its configuration from elsewhere
            module, _ = load_folder(directory)
        else:
            import open_clip

            module = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True)
        return OpenClipAdapter(module, model_cfg=self.model_cfg, transform=self.transform)

    def _write(self, directory: Path, final: Path) -> None:
        model_cfg = copy.deepcopy(self.model_cfg)
        assert model_cfg is not None  # check_saveable came first
        text_cfg = model_cfg["text_cfg"]
        source = self.tokenizer.source if self.tokenizer is not None else None
        if source is not None:
            _describe_tokenizer(text_cfg, source)
            if text_cfg.get("hf_tokenizer_name"):  # open_clip reads the tokenizer of a local folder from that folder
                inner: Any = source if hasattr(source, "save_pretrained") else getattr(source, "tokenizer", None)
                if hasattr(inner, "save_pretrained"):
                    inner.save_pretrained(directory)
        if "hf_model_name" in text_cfg:
            text_cfg["context_length"] = self.context_length
            self._text.config.save_pretrained(directory / TEXT_CONFIG)
            name = text_cfg["hf_model_name"]
            if name == TEXT_CONFIG or Path(name).is_absolute() or Path(name).exists():  # not a name on the hub
                text_cfg["hf_model_name"] = str(final.absolute() / TEXT_CONFIG)
        save_weights(self.saved_state(), directory / "open_clip_model.safetensors")
        config = {"model_cfg": model_cfg, "preprocess_cfg": self.preprocess_cfg()}
        (directory / self._marker).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _describe_tokenizer(text_cfg: Config, source: Any) -> None:
    """Add the settings from which `open_clip.get_tokenizer` makes the same tokenizer; none for a plain function."""
    from open_clip.tokenizer import get_clean_fn

    if not is_open_clip(source) and not is_hugging_face(source):
        return
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    cleaners = {get_clean_fn(name): name for name in ("lower", "whitespace", "canonicalize")}
    clean = cleaners.get(getattr(source, "clean_fn", None))
    if is_simple(source):
        text_cfg.pop("hf_tokenizer_name", None)
        if clean not in (None, "lower") or "clean" in options:
            options["clean"] = clean
        added = [source.decoder[index] for index in source.all_special_ids[2:]]  # after those of start and end
        if added:
            options["additional_special_tokens"] = added
    else:
        inner = source if is_hugging_face(source) else source.tokenizer
        text_cfg["hf_tokenizer_name"] = text_cfg.get("hf_tokenizer_name") or inner.name_or_path or "."
        if clean is not None:
            options["clean"] = clean
        elif is_open_clip(source):  # SigLIP's tokenizer, which has no clean_fn
            options["clean"] = "canonicalize"
        if getattr(source, "strip_sep_token", False):
            options["strip_sep_token"] = True
        if getattr(source, "tokenizer_mode", ""):
            text_cfg["tokenizer_mode"] = source.tokenizer_mode
    if options:
        text_cfg["tokenizer_kwargs"] = options


def _first(output: Any) -> Tensor:
    """Return the pooled features of towers that also return their tokens."""
    return output[0] if isinstance(output, tuple) else output
