"""transformers' CLIPModel."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models.adapter import ClipAdapter, Tower
from cliperase_fast.models.open_clip_adapter import CLIP_VOCABULARY
from cliperase_fast.models.padding import read_length
from cliperase_fast.models.tokenizing import is_hugging_face

_END_OF_TEXT = 49407  # the last id of CLIP's own vocabulary
_LEGACY_END = 2  # in old configurations; such models pool at the highest id of a row, which is the end mark's

_TAIL = re.compile(r"(vision_model\.post_layernorm|visual_projection|text_model\.final_layer_norm|text_projection)\b")


def is_transformers_model(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.CLIPModel)


class ImageProcessorTransform:
    """A transformers image processor as a function of one PIL image; picklable, for loader processes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:  # -> float32 [3, H, W]
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class TransformersAdapter(ClipAdapter):
    """A transformers CLIPModel.

    Without `transform`: CLIPImageProcessor at the model's image size with CLIP's mean and standard deviation.
    Without `tokenizer`: a model with CLIP's own vocabulary (49,408 entries, end mark 49407) gets open_clip's
    SimpleTokenizer, whose ids give the same features; any other gets none. No attention mask is passed: the
    text tower is causal, pools at the first end mark and so never sees the padding right of it.
    """

    kind = "transformers"
    _marker = "config.json"

    def __init__(
        self,
        module: nn.Module,
        *,
        tokenizer: Any = None,
        transform: Any = None,
        truncate: bool = False,
    ) -> None:
        self.module = module
        if transform is None:
            transform = _default_image_processor(module)
        if tokenizer is None and self._has_clip_vocabulary:
            import open_clip

            tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        super().__init__(module, tokenizer=tokenizer, transform=as_transform(transform), truncate=truncate)

    @property
    def _config(self) -> Any:
        return self._model.config

    @property
    def _has_clip_vocabulary(self) -> bool:
        text = self._config.text_config
        return text.vocab_size == CLIP_VOCABULARY and text.eos_token_id in (_END_OF_TEXT, _LEGACY_END)

    @property
    def context_length(self) -> int:
        return int(self._config.text_config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.text_config.vocab_size)

    def tower(self, name: str) -> Tower | None:
        if name == "logit_scale":
            return "scale"
        return "image" if name.startswith(("vision_model.", "visual_projection.")) else "text"

    def is_tail(self, name: str) -> bool:
        return _TAIL.match(name) is not None

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        owner = self._model.vision_model if tower == "image" else self._model.text_model
        return list(owner.encoder.layers)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self._model.get_image_features(pixel_values=pixels))

    def _text_features(self, tokens: Tensor) -> Tensor:
        return _pooled(self._model.get_text_features(input_ids=tokens))

    def _read_length(self, tokens: Tensor) -> int:
        if type(self._model).get_text_features is not sys.modules["transformers"].CLIPModel.get_text_features:
            return tokens.shape[1]
        end = self._config.text_config.eos_token_id
        if not isinstance(end, int) or getattr(self._config.text_config, "is_causal", True) is False:
            return tokens.shape[1]
        return read_length(tokens, None if end == _LEGACY_END else end)

    def _check_tokens(self, tokens: Tensor) -> None:
        super()._check_tokens(tokens)
        end = self._config.text_config.eos_token_id
        if end != _LEGACY_END and isinstance(end, int) and not (tokens == end).any(dim=1).all():
            raise InputError(
                f"the tokenizer left the end mark (id {end}) out of a caption, and the model reads a "
                "caption's features there; use the tokenizer the model was trained with"
            )

    def _write(self, directory: Path) -> None:
        with quiet():
            self._model.save_pretrained(directory)
        if self.tokenizer is not None and is_hugging_face(self.tokenizer.source):
            self.tokenizer.source.save_pretrained(directory)
        if isinstance(self.transform, ImageProcessorTransform):
            self.transform.processor.save_pretrained(directory)


def as_transform(transform: Any) -> Callable[[Any], Tensor]:
    """A transformers image processor, or a processor with one, as a function of one image; others pass."""
    transformers = sys.modules["transformers"]
    if isinstance(transform, transformers.ProcessorMixin):
        transform = transform.image_processor
    if hasattr(transform, "image_mean") and callable(getattr(transform, "save_pretrained", None)):
        return ImageProcessorTransform(transform)
    return transform


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


def _default_image_processor(module: Any) -> Any:
    import transformers

    size = int(module.config.vision_config.image_size)
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _pooled(output: Any) -> Tensor:  # -> [B, D]
    """transformers 4 returns the projected features, 5 an output that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
