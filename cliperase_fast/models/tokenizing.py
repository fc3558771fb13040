"""Any tokenizer (open_clip's, Hugging Face's, a plain function) as one from captions to int64 [B, L]."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cliperase_fast.errors import InputError


def is_simple(tokenizer: Any) -> bool:
    """Whether it is open_clip's byte-pair tokenizer."""
    open_clip = sys.modules.get("open_clip")
    return open_clip is not None and isinstance(tokenizer, open_clip.SimpleTokenizer)


def is_open_clip(tokenizer: Any) -> bool:
    """Whether it is one of open_clip's: those take a context length when called."""
    open_clip = sys.modules.get("open_clip")
    if open_clip is None:
        return False
    module = open_clip.tokenizer
    return isinstance(tokenizer, (module.SimpleTokenizer, module.HFTokenizer, module.SigLipTokenizer))


def is_hugging_face(tokenizer: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(tokenizer, transformers.PreTrainedTokenizerBase)


class CaptionTokenizer:
    """Wraps a tokenizer and pads or cuts to `context_length` where the tokenizer lets us say so.

    source: the tokenizer as given. context_length: tokens a caption may have, begin and end marks included;
    None where unknown. unread_id: what a tokenizer without a padding token pads with, an id that the model does not
    read behind a caption's end; None where there is no such id.
    """

    def __init__(self, source: Any, context_length: int | None, unread_id: int | None = None) -> None:
        open_clip = sys.modules.get("open_clip")
        if open_clip is not None and source is open_clip.tokenize:
            source = open_clip.SimpleTokenizer()  # what the function calls, and its tokens can be counted
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
                f"the tokenizer fails on a list of {len(captions)} captions ({type(error).__name__}: {said}); it must "
                "turn a list of strings into token ids [B, L]"
            ) from error

    def _padded(self, captions: list[str]) -> Tensor:
        """Token ids of a tokenizer that has no token to pad with."""
        if self.unread_id is None or not is_hugging_face(self.source):
            name = "tokenizer" if is_hugging_face(self.source) else "tokenizer.tokenizer"
            raise InputError(
                "the tokenizer has no padding token, and captions of different lengths need one: set it first, for "
                f"example {name}.pad_token = {name}.eos_token, to a token that the model does not read as text"
            )
        limit = self.context_length
        rows = self.source(captions, truncation=limit is not None, max_length=limit, padding=False)["input_ids"]
        length = limit or max(map(len, rows), default=0)
        padded = [list(row) + [self.unread_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(rows), length)

    def overlong(self, captions: Sequence[str], tokens: Tensor) -> list[tuple[str, int]]:
        """(caption, its number of tokens) for those that do not fit; empty where that cannot be told.

        tokens: int64 [B, L], what calling the tokenizer gave for these captions.
        """
        limit = self.context_length
        if limit is None:
            return []
        if is_simple(self.source) and self.source.reduction_fn is None:
            # It pads with 0, so only a full row can come from a caption that was cut.
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
    """Whether it is Hugging Face's, or open_clip's around one, and has no token to pad with."""
    wraps = is_open_clip(source) or _is_processor(source)
    inner = source if is_hugging_face(source) else getattr(source, "tokenizer", None) if wraps else None
    return is_hugging_face(inner) and inner.pad_token_id is None  # type: ignore[union-attr]


def _own_limit(source: Any) -> int | None:
    """The length a tokenizer cuts captions to by itself, where it says."""
    if is_hugging_face(source):  # which gives an enormous number when none was set
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
    """int64 [B, L] out of a tensor, an array, nested lists, or a mapping with `input_ids`."""
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
            f"the tokenizer returned a {type(encoded).__name__} that is no token table [B, L] ({error}); pad "
            "its rows to one length"
        ) from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"the tokenizer returned {tokens.dtype} values; token ids must be integers")
    if tokens.ndim != 2 or len(tokens) != rows:
        raise InputError(
            f"the tokenizer returned shape {list(tokens.shape)} for {rows} captions; it must be [{rows}, L]"
        )
    return tokens.to(device="cpu", dtype=torch.int64)
