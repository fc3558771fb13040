"""One interface over open_clip models, transformers' CLIPModel and any module with two encoders."""

from __future__ import annotations

import copy
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models.requirements import require_trainable
from cliperase_fast.models.saving import save_weights, write_directory
from cliperase_fast.models.tokenizing import CaptionTokenizer, lacks_padding
from cliperase_fast.models.transforming import as_transform
from cliperase_fast.models.verifying import verify_saved

Tower = Literal["image", "text", "scale"]

# Shorter features are scaled as if this long, so that a zero vector has finite values and gradients.
SMALLEST_NORM = 1e-6
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


class ClipAdapter(ABC):
    """A CLIP model with its tokenizer and its evaluation transform; not a module itself.

    module: the wrapped model; its device, dtype and training mode are the caller's business.
    transform: PIL image -> float tensor [3, H, W], deterministic; None where unknown (images must then be
    tensors).
    tokenizer: captions -> int64 [B, L]; None where unknown (captions must then be token ids).
    truncate: cut captions longer than the model's context instead of refusing them.
    """

    kind: ClassVar[Literal["open_clip", "transformers", "generic"]]
    _marker: ClassVar[str]  # the file without which a folder is no saved model of this kind

    def __init__(
        self,
        module: nn.Module,
        *,
        tokenizer: Any = None,
        transform: Callable[[Any], Tensor] | None = None,
        truncate: bool = False,
    ) -> None:
        transform = as_transform(transform)
        if transform is not None and not callable(transform):
            raise InputError(
                f"transform is a {type(transform).__name__}; pass a function from a PIL image to [3, H, W]"
            )
        self.module = module
        self.transform = transform
        self.truncate = truncate
        self.cut_captions: dict[str, int] = {}  # captions that were cut to the context, with their number of tokens
        self.tokenizer = None
        if tokenizer is not None:
            unread = self.unread_id if lacks_padding(tokenizer) else None
            self.tokenizer = CaptionTokenizer(tokenizer, self.context_length, unread)
        self._widths: dict[str, int] = {}

    @property
    def unread_id(self) -> int | None:
        """A token id that captions can be padded with and that is never read; None where none is known."""
        return None

    @property
    def context_length(self) -> int | None:
        """Tokens a caption may have, begin and end marks included; None where unknown."""
        return None

    @property
    def vocabulary_size(self) -> int | None:
        return None

    @property
    def _model(self) -> Any:
        """The module, for what its own class has and nn.Module has not."""
        return self.module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch_defaults()
    def tokenize(self, captions: Sequence[str], *, truncate: bool | None = None) -> Tensor:
        """Token ids int64 [B, L] of `captions`, on the CPU.

        truncate: overrides the adapter's own. Raises `InputError` for a caption longer than the context
        (unless it is to be cut, and where the tokenizer's tokens can be counted), and for tokens the model
        cannot read.
        """
        captions = list(captions)
        if self.tokenizer is None:
            raise InputError("the captions need a tokenizer and the model brings none: pass tokenizer=")
        tokens = self.tokenizer(captions)
        self._check_tokens(tokens)
        too_long = self.tokenizer.overlong(captions, tokens)
        if self.truncate if truncate is None else truncate:
            self.cut_captions.update(too_long)
        elif too_long:
            caption, count = too_long[0]
            raise InputError(
                f"caption {_shortened(caption)!r} has {count} tokens (begin and end marks included) and "
                f"the model's context holds {self.tokenizer.context_length}; {len(too_long)} of "
                f"{len(captions)} captions are too long. "
                'Shorten them, or pass long_captions="truncate" to cut them'
            )
        return tokens

    def token_ids(self, captions: Sequence[Any]) -> Tensor:
        """Token ids int64 [B, L] of captions that are all strings (see `tokenize`) or all token ids [L]."""
        if isinstance(captions[0], str):
            return self.tokenize(captions)
        tokens = [torch.as_tensor(caption, device="cpu") for caption in captions]
        if len({caption.shape for caption in tokens}) > 1:
            lengths = sorted({len(caption) for caption in tokens})
            raise InputError(
                f"token captions have different lengths ({lengths[0]} to {lengths[-1]}): pad them to one length"
            )
        stacked = torch.stack(tokens)
        try:
            self._check_tokens(stacked)
        except InputError as error:
            said = str(error).replace("the tokenizer returned", "there are")
            raise InputError(f"the token captions do not fit the model: {said}") from error
        return stacked

    @torch_defaults()
    def encode_image(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        """L2-normalised image features, float32 (float64 for a float64 model); differentiable."""
        if pixels.ndim != 4:
            raise InputError(f"images must be [B, 3, H, W], not {list(pixels.shape)}")
        first = next(self.module.parameters(), None)
        if pixels.dtype in _OTHER_FLOATS and first is not None and first.dtype == torch.float32:
            pixels = pixels.float()  # of a transform or a dataset with a type of its own
        return normalise(self._checked(self._image_features(pixels), "encode_image", len(pixels)))

    @torch_defaults()
    def encode_text(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, D]
        """L2-normalised text features, float32 (float64 for a float64 model); differentiable.

        Give `tokens` on the CPU: where padding cannot matter it is then left out, and the rest goes to the model's
        device.
        """
        if tokens.ndim != 2:
            raise InputError(f"token ids must be [B, L], not {list(tokens.shape)}")
        if tokens.device.type == "cpu":  # elsewhere, finding the longest caption would wait for the device
            tokens = tokens[:, : self._read_length(tokens)]
            first = next(self.module.parameters(), None)
            if first is not None:
                tokens = tokens.to(first.device, non_blocking=True)
        return normalise(self._checked(self._text_features(tokens), "encode_text", len(tokens)))

    def logit_scale(self) -> Tensor:
        """exp of the model's `logit_scale` parameter, a differentiable 0-d tensor."""
        return self._model.logit_scale.exp().reshape(())

    def clone(self) -> ClipAdapter:
        """An independent copy with weights of its own; tokenizer and transform are shared."""
        twin = copy.copy(self)
        try:
            twin.module = copy.deepcopy(self.module)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"the {type(self.module).__name__} cannot be copied, and it is a copy that is changed "
                f"({str(error).strip().partition(chr(10))[0]}): build a fresh one and load its state dict"
            ) from error
        return twin

    @torch_defaults()
    def save(self, directory: str | Path) -> None:
        """Write the model to a folder its own library loads, all of it or nothing. After `merge_lora`.

        What was written is loaded back and compared before the folder appears: every tensor's bits, and the features
        on random input (of models up to 2 GiB; see `models/verifying.py`). `UnlearningError` where it differs.
        """
        if any(".lora_A." in name for name, _ in self.module.named_parameters()):
            raise InputError("the model holds LoRA layers: fold them in with merge_lora(adapter) before saving it")
        self.check_saveable()
        directory = Path(directory)

        def write(work: Path) -> None:
            self._write(work, directory)
            verify_saved(self, work, directory)

        write_directory(directory, self._marker, write)

    def check_saveable(self) -> None:
        """Raise `InputError` now if `save` could not work later. Call it before long work."""
        require_trainable(self.module)

    def saved_state(self) -> dict[str, Tensor]:
        """The state dict as it is saved: what the model's own library expects it to be called and shaped."""
        return self.module.state_dict()

    def probe(self) -> tuple[Tensor, Tensor] | None:
        """Random pixels [2, 3, H, W] and token ids [4, L] that the model can encode; None where that is unknown."""
        return None

    def identity(self) -> str:
        """Hex digest of the class name and of every parameter's and saved buffer's name, shape and values."""
        digest = hashlib.sha256(type(self.module).__name__.encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The repeated blocks of (image tower, text tower), in order; empty where none are known."""
        return self._blocks_of("image"), self._blocks_of("text")

    @abstractmethod
    def tower(self, name: str) -> Tower | None:
        """Which part the parameter of that name belongs to; None for parts the two encoders do not use."""

    @abstractmethod
    def is_tail(self, name: str) -> bool:
        """Whether that parameter comes after its tower's blocks: final norm, pooling, projection."""

    @abstractmethod
    def _blocks_of(self, tower: Tower) -> list[nn.Module]: ...

    def _read_length(self, tokens: Tensor) -> int:
        """How many positions of these captions [B, L] can change their features or gradients."""
        return tokens.shape[1]

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, tokens: Tensor) -> Tensor: ...

    def reload(self, directory: Path) -> ClipAdapter | None:
        """The model saved in `directory`, as its own library loads it; None where only the caller can build it."""
        return None

    @abstractmethod
    def _write(self, directory: Path, final: Path) -> None:
        """Write the files into `directory`, which is moved to `final` afterwards."""

    def _checked(self, features: Any, method: str, rows: int) -> Tensor:
        """The features, if they are [rows, D] floating-point numbers with one D for both encoders."""
        name = f"{type(self.module).__name__}.{method}"
        if not isinstance(features, Tensor) or features.ndim != 2:
            what = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{name} must return features [B, D], not {what}")
        if len(features) != rows:
            raise InputError(f"{name} returned {len(features)} rows for {rows} inputs; it must return one row for each")
        if not features.is_floating_point():
            raise InputError(f"{name} returned {features.dtype} values; features must be floating-point numbers")
        self._widths[method] = features.shape[1]
        if len(set(self._widths.values())) > 1:
            raise InputError(
                f"the encoders of the {type(self.module).__name__} disagree: encode_image returns "
                f"{self._widths['encode_image']} features and encode_text {self._widths['encode_text']}; both must "
                "have the same width"
            )
        return features

    def _check_tokens(self, tokens: Tensor) -> None:
        limit, size = self.context_length, self.vocabulary_size
        if limit is not None and tokens.shape[1] > limit:
            raise InputError(
                f"the tokenizer returned {tokens.shape[1]} tokens a caption and the model's context holds "
                f"{limit}; give it that context length"
            )
        if tokens.numel() and (tokens.min() < 0 or (size is not None and tokens.max() >= size)):
            raise InputError(
                f"the tokenizer returned ids from {int(tokens.min())} to {int(tokens.max())} and the model's "
                f"vocabulary has {size} entries; use the tokenizer the model was trained with"
            )


_IMAGE_WORDS = {"visual", "vision", "image", "images", "img", "pixel", "pixels"}
_TEXT_WORDS = {"text", "texts", "txt", "token", "tokens", "transformer", "language", "caption", "captions"}
_TAIL_WORDS = {"proj", "projection", "head", "norm", "ln", "layernorm", "final", "post", "pool", "pooler"}
_BODY_WORDS = {"pre", "embed", "embedding", "embeddings", "pos", "position", "positional", "patch", "stem"}


class GenericAdapter(ClipAdapter):
    """Any module with `encode_image(pixels)`, `encode_text(tokens)` (both -> [B, D]) and `logit_scale`.

    logit_scale: the log of the scale, a parameter, buffer or plain tensor. Towers and blocks are guessed from
    parameter names when they are asked for.
    """

    kind = "generic"
    _marker = "model.safetensors"

    def __init__(self, module: nn.Module, **options: Any) -> None:
        methods = ("encode_image", "encode_text")
        missing = [f"{name}()" for name in methods if not callable(getattr(module, name, None))]
        if not isinstance(getattr(module, "logit_scale", None), Tensor):
            missing.append("logit_scale (a parameter or tensor that holds the log of the scale)")
        if missing:
            raise InputError(
                f"{type(module).__name__} is neither an open_clip model nor a transformers CLIPModel, and it "
                f"has no {' and no '.join(missing)}; wrap it in a module that has"
            )
        super().__init__(module, **options)

    def tower(self, name: str) -> Tower | None:
        if name in ("logit_scale", "logit_bias"):
            return "scale" if name == "logit_scale" else None
        for word in _words(name):  # the outermost one decides: image_encoder.transformer is the image's
            if word in _IMAGE_WORDS:
                return "image"
            if word in _TEXT_WORDS:
                return "text"
        return None

    def is_tail(self, name: str) -> bool:
        words = set(_words(name))
        return bool(words & _TAIL_WORDS) and not words & _BODY_WORDS

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        return longest_stack(child for name, child in self.module.named_modules() if self.tower(name) == tower)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.encode_image(pixels)

    def _text_features(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens)

    def _write(self, directory: Path, final: Path) -> None:
        save_weights(self.saved_state(), directory / "model.safetensors")


def normalise(features: Tensor) -> Tensor:  # [B, D] -> [B, D]
    """Rows of length 1. Half-precision rows are widened to float32 first; a zero row stays zero."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=-1, eps=SMALLEST_NORM)


def longest_stack(modules: Iterator[nn.Module]) -> list[nn.Module]:
    """The longest list of same-class children with parameters among `modules`: a tower's repeated blocks."""
    best: list[nn.Module] = []
    for module in modules:
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = list(module)
        is_stack = len({type(child) for child in children}) == 1 and all(
            any(True for _ in child.parameters()) for child in children
        )
        if is_stack and len(children) > len(best):
            best = children
    return best


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def _shortened(caption: str, length: int = 60) -> str:
    return caption if len(caption) <= length else caption[: length - 1] + "…"
