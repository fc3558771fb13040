"""Wrap tokenizers (captions -> int64 [B, L]) and transforms (PIL image -> float [3, H, W]) of any library."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError


def clip_tokenizer(context_length: int | None = None) -> Any:
    """Return open_clip's SimpleTokenizer with its default settings, and its context length unless one is given.

    All of them share their tables: building these takes longer than loading a small model.
    """
    tokenizer = copy.copy(_clip_tables())
    tokenizer.context_length = context_length or tokenizer.context_length
    return tokenizer


@functools.cache
def _clip_tables() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


def is_simple(tokenizer: Any) -> bool:
    """Return whether it is open_clip's byte-pair tokenizer."""
    open_clip = sys.modules.get("open_clip")
    return open_clip is not None and isinstance(tokenizer, open_clip.SimpleTokenizer)


def is_open_clip(tokenizer: Any) -> bool:
    """Return whether it is one of open_clip's tokenizers, which take a context length when called."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None:
        return False
    module = open_clip.tokenizer
    return isinstance(tokenizer, (module.SimpleTokenizer, module.HFTokenizer, module.SigLipTokenizer))


def is_hugging_face(tokenizer: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(tokenizer, transformers.PreTrainedTokenizerBase)


class CaptionTokenizer:
    """Wrap a tokenizer; pad or truncate to `context_length` if the tokenizer supports it.

    source: the tokenizer as given. context_length: the most tokens of a caption, start and end tokens included; None if
    unknown. unread_id: the id to pad with if the tokenizer has no padding token, one that the model does not read after
    the end of a caption; None if there is none.
    """

    def __init__(self, source: Any, context_length: int | None, unread_id: int | None = None) -> None:
        open_clip = sys.modules.get("open_clip")
        if open_clip is not None and source is open_clip.tokenize:
            source = clip_tokenizer(
                open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
            )  # the function calls one, and its tokens can be counted
        source = getattr(source, "tokenizer", source) if _is_processor(source) else source
        if isinstance(source, type):
            raise InputError(f"tokenizer is the class {source.__name__}; pass an instance of it")
        if not callable(source):
            raise InputError(
                f"tokenizer is a {type(source).__name__}; pass a function that turns a list of captions into "
                "token ids [B, L], an open_clip tokenizer or a transformers tokenizer"
            )
        self.source = source
        self.unread_id = unread_id
        self.context_length = context_length if context_length is not None else _own_limit(source)

    def __call__(self, captions: Sequence[str]) -> Tensor:  # -> int64 [B, L]
        captions = list(captions)
        if lacks_padding(self.source):
            return self._padded(captions)
        if is_hugging_face(self.source):
            # Causal text towers pool at the end mark and never see what follows: padding goes right.
            encoded = self.source(
                captions,
                padding="max_length" if self.context_length else True,
                truncation=True,
                max_length=self.context_length,
                padding_side="right",
                return_tensors="pt",
            )
        elif is_open_clip(self.source) and self.context_length:
            encoded = self.source(captions, context_length=self.context_length)
        else:
            encoded = self._called(captions)
        return _as_tokens(encoded, len(captions))

    def _called(self, captions: list[str]) -> Any:
        try:
            return self.source(captions)
        except InputError:
            raise
        except Exception as error:  # the caller's own code
            said = str(error).strip().partition("\n")[0]
            raise InputError(
                f"the tokenizer fails for a list of {len(captions)} captions ({type(error).__name__}: {said}); it must "
                "turn a list of strings into token ids [B, L]"
            ) from error

    def _padded(self, captions: list[str]) -> Tensor:
        """Return the token ids [B, L] of a tokenizer that has no padding token."""
        if self.unread_id is None or not is_hugging_face(self.source):
            name = "tokenizer" if is_hugging_face(self.source) else "tokenizer.tokenizer"
            raise InputError(
                "the tokenizer has no padding token, and captions of different lengths need one; set it to a token "
                f"that the model does not read as text, for example {name}.pad_token = {name}.eos_token"
            )
        limit = self.context_length
        rows = self.source(captions, truncation=limit is not None, max_length=limit, padding=False)["input_ids"]
        length = limit or max(map(len, rows), default=0)
        padded = [list(row) + [self.unread_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), length)

    def overlong(self, captions: Sequence[str], tokens: Tensor) -> list[tuple[str, int]]:
        """Return (caption, number of tokens) of each caption that does not fit; empty if that cannot be counted.

        tokens: int64 [B, L], the tokenizer's output for these captions.
        """
        limit = self.context_length
        if limit is None:
            return []
        if is_simple(self.source) and self.source.reduction_fn is None:
            # It pads with 0, so only a row without padding can come from a truncated caption.
            full = [caption for caption, row in zip(captions, tokens, strict=True) if row[-1] != 0]
            counts = [(caption, len(self.source.encode(caption)) + 2) for caption in full]
        elif is_hugging_face(self.source):
            counts = _count(self.source, captions, list(captions))
        elif is_open_clip(self.source) and not is_simple(self.source):
            counts = _count(self.source.tokenizer, captions, _cleaned(self.source, captions))
            if getattr(self.source, "tokenizer_mode", ""):  # it appends a class token
                counts = [(caption, count + 1) for caption, count in counts]
        else:
            return []
        return [(caption, count) for caption, count in counts if count > limit]


def lacks_padding(source: Any) -> bool:
    """Return whether it is a Hugging Face tokenizer, or open_clip's wrapper of one, without a padding token."""
    wraps = is_open_clip(source) or _is_processor(source)
    inner = source if is_hugging_face(source) else getattr(source, "tokenizer", None) if wraps else None
    return is_hugging_face(inner) and inner.pad_token_id is None  # type: ignore[union-attr]


def _own_limit(source: Any) -> int | None:
    """Return the length that the tokenizer itself truncates captions to, or None if unknown."""
    if is_hugging_face(source):  # an enormous number stands for no limit
        return source.model_max_length if source.model_max_length < 10**6 else None
    return source.context_length if is_open_clip(source) else None


def _count(tokenizer: Any, captions: Sequence[str], texts: list[str]) -> list[tuple[str, int]]:
    rows = tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
    return [(caption, len(row)) for caption, row in zip(captions, rows, strict=True)]


def _cleaned(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    from open_clip.tokenizer import get_clean_fn

    # SigLIP's tokenizer names no cleaning of its own.
    clean = getattr(tokenizer, "clean_fn", None) or get_clean_fn("canonicalize")
    return [clean(caption) for caption in captions]


def _is_processor(source: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(source, transformers.ProcessorMixin)


def _as_tokens(encoded: Any, rows: int) -> Tensor:
    """Convert a tensor, an array, nested lists or a mapping with `input_ids` to int64 [B, L]."""
    if isinstance(encoded, Mapping):
        if "input_ids" not in encoded:
            raise InputError(f"the tokenizer returned {', '.join(map(str, encoded))} but no input_ids")
        mask = encoded.get("attention_mask")
        if mask is not None and rows and (torch.as_tensor(mask, device="cpu")[:, 0] == 0).any():
            raise InputError("the tokenizer pads on the left; CLIP needs padding on the right (padding_side='right')")
        encoded = encoded["input_ids"]
    if isinstance(encoded, list | tuple):
        encoded = [row.tolist() if isinstance(row, Tensor) else row for row in encoded]
    try:
        tokens = torch.as_tensor(encoded, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the tokenizer returned a {type(encoded).__name__} that is not a [B, L] table of token ids "
            f"({error}); pad its rows to one length"
        ) from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"the tokenizer returned {tokens.dtype} values; token ids must be integers")
    if tokens.ndim != 2 or len(tokens) != rows:
        raise InputError(
            f"the tokenizer returned shape {list(tokens.shape)} for {rows} captions; it must be [{rows}, L]"
        )
    return tokens.to(device="cpu", dtype=torch.int64)


class ImageProcessorTransform:
    """Wrap a transformers image processor as a function of one PIL image; picklable, for loader processes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:  # -> float32 [3, H, W]
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def as_transform(transform: Any) -> Any:
    """Wrap a transformers image processor, or the one of a processor; return anything else as it is."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(transform, transformers.ProcessorMixin):
        transform = transform.image_processor
    if hasattr(transform, "image_mean") and callable(getattr(transform, "save_pretrained", None)):
        return ImageProcessorTransform(transform)
    return transform
