"""`ClipAdapter`, the interface of every model, and `Family`, what a kind of model says of itself."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.defaults import plain_torch, torch_defaults
from cliperase_fast.errors import InputError
from cliperase_fast.models.equivalence import verify_saved
from cliperase_fast.models.preprocessing import CaptionTokenizer, as_transform, lacks_padding
from cliperase_fast.models.requirements import copy_of, require_trainable
from cliperase_fast.models.saving import write_directory
from cliperase_fast.storage import output_folder

Tower = Literal["image", "text", "scale"]

# Shorter features are divided by this norm instead of their own, so that a zero vector has finite gradients.
SMALLEST_NORM = 1e-6
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Projection:
    """The matrix or module `owner.name` that a tower ends with.

    without: what to put in its place for the tower to return its own features.
    """

    owner: nn.Module
    name: str
    without: nn.Module | None = None

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Let the tower return its own features inside the block."""
        held: Any = self.owner._modules if self.name in self.owner._modules else self.owner._parameters
        own = held[self.name]
        held[self.name] = self.without
        try:
            yield
        finally:
            held[self.name] = own

    def __call__(self, features: Tensor) -> Tensor:  # [B, W] -> [B, D]
        own: Any = getattr(self.owner, self.name)
        return features @ own if isinstance(own, Tensor) else own(features)


class ClipAdapter(ABC):
    """Give a CLIP model, its tokenizer and its evaluation transform one interface. Not a module itself.

    module: the wrapped model; the caller controls its device, dtype and training mode.
    transform: PIL image -> float tensor [3, H, W], deterministic; None if unknown (then images must be tensors).
    tokenizer: captions -> int64 [B, L]; None if unknown (then captions must be token ids).
    truncate: truncate captions longer than the model's context instead of raising an error.
    """

    kind: ClassVar[str]  # the name of its family
    library: ClassVar[str] = ""  # that loads its saved models; "": as `kind`
    _marker: ClassVar[str]  # the file that makes a folder a saved model of this kind
    loads_back = True  # whether `save` loads the files as a model again, which takes the memory of another one
    in_step = False  # whether the ranks share the weights, so that all must encode together, equally often

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
        self.cut_captions: dict[str, int] = {}  # truncated captions and their number of tokens
        self.tokenizer = None
        if tokenizer is not None:
            unread = self.unread_id if lacks_padding(tokenizer) else None
            self.tokenizer = CaptionTokenizer(tokenizer, self.context_length, unread)
        self._widths: dict[str, int] = {}

    @property
    def unread_id(self) -> int | None:
        """A token id to pad captions with, which the model never reads; None if unknown."""
        return None

    @property
    def context_length(self) -> int | None:
        """The most tokens of a caption, start and end tokens included; None if unknown."""
        return None

    @property
    def vocabulary_size(self) -> int | None:
        return None

    @property
    def _model(self) -> Any:
        """The module, typed so that attributes of its own class can be used."""
        return self.module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch_defaults()
    def tokenize(self, captions: Sequence[str], *, truncate: bool | None = None) -> Tensor:
        """Return the token ids int64 [B, L] of `captions`, on the CPU.

        truncate: overrides the adapter's own setting. Raises `InputError` for a caption longer than the context (unless
        it may be truncated, and if its tokens can be counted) and for ids outside the vocabulary.
        """
        captions = list(captions)
        if self.tokenizer is None:
            raise InputError("the captions need a tokenizer and the model has none; pass tokenizer=")
        tokens = self.tokenizer(captions)
        self._check_tokens(tokens)
        too_long = self.tokenizer.overlong(captions, tokens)
        if self.truncate if truncate is None else truncate:
            self.cut_captions.update(too_long)
        elif too_long:
            caption, count = too_long[0]
            raise InputError(
                f"caption {_shortened(caption)!r} has {count} tokens (start and end tokens included) and "
                f"the model's context holds {self.tokenizer.context_length}; {len(too_long)} of "
                f"{len(captions)} captions are too long. "
                'Shorten them, or pass long_captions="truncate" to cut them'
            )
        return tokens

    def token_ids(self, captions: Sequence[Any]) -> Tensor:
        """Return the token ids int64 [B, L] of captions that are all strings (see `tokenize`) or all token ids [L]."""
        if isinstance(captions[0], str):
            return self.tokenize(captions)
        tokens = [torch.as_tensor(caption, device="cpu") for caption in captions]
        if len({caption.shape for caption in tokens}) > 1:
            lengths = sorted({len(caption) for caption in tokens})
            raise InputError(
                f"token captions have different lengths ({lengths[0]} to {lengths[-1]}); pad them to one length"
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
        """Return L2-normalised image features, float32 (float64 for a float64 model); differentiable."""
        if pixels.ndim != 4:
            raise InputError(f"images must be [B, 3, H, W], not {list(pixels.shape)}")
        return normalise(self._checked(self.image_output(pixels), "encode_image", len(pixels)))

    @torch_defaults()
    def encode_text(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, D]
        """Return L2-normalised text features, float32 (float64 for a float64 model); differentiable.

        Pass `tokens` on the CPU: padding that cannot matter is then dropped, and the rest is moved to the model's
        device.
        """
        if tokens.ndim != 2:
            raise InputError(f"token ids must be [B, L], not {list(tokens.shape)}")
        return normalise(self._checked(self.text_output(tokens), "encode_text", len(tokens)))

    def image_output(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, D]
        """Return what the image tower computes, as `text_output` does. See `encode_image`."""
        first = next(self.module.parameters(), None)
        if pixels.dtype in _OTHER_FLOATS and first is not None and first.dtype == torch.float32:
            pixels = pixels.float()  # from a transform or a dataset with another dtype
        return self._image_features(pixels)

    def text_output(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, D]
        """Return what the text tower computes: in its own dtype, and with rows of any length. See `encode_text`."""
        if tokens.device.type == "cpu":  # on a GPU, finding the longest caption would synchronise
            tokens = tokens[:, : self._read_length(tokens)]
            first = next(self.module.parameters(), None)
            if first is not None:
                tokens = tokens.to(first.device, non_blocking=True)
        return self._text_features(tokens)

    def logit_scale(self) -> Tensor:
        """Return exp of the model's `logit_scale` parameter, a differentiable 0-d tensor."""
        return self.log_scale().exp().reshape(())

    def log_scale(self) -> Tensor:
        """Return the logarithm of the scale, as the model holds it."""
        return self._model.logit_scale

    def logit_bias(self) -> Tensor | None:
        """Return the bias of the logits of a model that was trained with the sigmoid loss, 0-d; None for others."""
        bias = getattr(self._model, "logit_bias", None)
        return bias.reshape(()) if isinstance(bias, Tensor) else None

    def share(self) -> ClipAdapter:
        """Return a copy whose parameters are other objects in the same memory; buffers are copied."""
        return self._copy({id(p): nn.Parameter(p.data, p.requires_grad) for p in self.module.parameters()})

    def clone(self) -> ClipAdapter:
        """Return a copy with its own weights; tokenizer and transform are shared."""
        return self._copy({})

    def _copy(self, copied: dict[int, Any]) -> ClipAdapter:
        twin = copy.copy(self)
        twin.module = copy_of(self.module, copied)
        return twin

    @plain_torch()
    def save(self, directory: str | Path) -> None:
        """Write the model to a folder that its own library loads: all of it or nothing. Call `merge_lora` first.

        The files are loaded back and compared before the folder appears: the bits of every tensor, and, for models up
        to 2 GiB, the features of random input. Raises `UnlearningError` if anything differs.
        """
        if any(".lora_A." in name for name, _ in self.module.named_parameters()):
            raise InputError("the model holds LoRA layers; fold them in with merge_lora(adapter) before saving it")
        self.check_saveable()
        directory = output_folder(directory)

        def write(work: Path) -> None:
            self._write(work, directory)
            verify_saved(self, work, directory)

        write_directory(directory, self._marker, write)

    def check_saveable(self) -> None:
        """Raise `InputError` if `save` would fail later. Call it before long work."""
        require_trainable(self.module)

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict with the names and shapes that the model's own library expects."""
        return self.module.state_dict()

    def probe(self) -> tuple[Tensor, Tensor] | None:
        """Return random pixels [2, 3, H, W] and token ids [4, L] that the model can encode; None if unknown."""
        return None

    def identity(self) -> str:
        """Return a hex digest of the class name and of each parameter's and saved buffer's name, shape and values."""
        digest = hashlib.sha256(type(self.module).__name__.encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
        return digest.hexdigest()

    def own_options(self) -> dict[str, Any]:
        """Return what another adapter of the same module must be given besides tokenizer, transform and truncate."""
        return {}

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the repeated blocks of (image tower, text tower) in order; empty if unknown."""
        return self._blocks_of("image"), self._blocks_of("text")

    def projection(self, tower: Tower) -> Projection | None:
        """Return the last projection of a tower, from its own features to the common space; None if unknown."""
        return None

    def causal_text(self) -> tuple[nn.Module, int | None] | None:
        """Return the final norm of a causal text tower and the id of the end token, see `end_position`.

        None for towers that are not known to be causal and to take a caption's feature at its end token.
        """
        return None

    @abstractmethod
    def tower(self, name: str) -> Tower | None:
        """Return the part that the parameter belongs to; None if neither encoder uses it."""

    @abstractmethod
    def is_tail(self, name: str) -> bool:
        """Return whether the parameter comes after its tower's blocks: final norm, pooling, projection."""

    @abstractmethod
    def _blocks_of(self, tower: Tower) -> list[nn.Module]: ...

    def _read_length(self, tokens: Tensor) -> int:
        """Return how many positions of these captions [B, L] can affect their features or gradients."""
        return tokens.shape[1]

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, tokens: Tensor) -> Tensor: ...

    def reload(self, directory: Path) -> ClipAdapter | None:
        """Load the model saved in `directory` with its own library; None if only the caller can build it."""
        return None

    @abstractmethod
    def _write(self, directory: Path, final: Path) -> None:
        """Write the files into `directory`, which is then moved to `final`."""

    def _checked(self, features: Any, method: str, rows: int) -> Tensor:
        """Check that the features are floating-point [rows, D], with the same D for both encoders."""
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
                f"the encoders of the {type(self.module).__name__} have different widths: encode_image returns "
                f"{self._widths['encode_image']} features and encode_text {self._widths['encode_text']}; both must "
                "return the same number"
            )
        return features

    def _check_tokens(self, tokens: Tensor) -> None:
        limit, size = self.context_length, self.vocabulary_size
        if limit is not None and tokens.shape[1] > limit:
            raise InputError(
                f"the tokenizer returned {tokens.shape[1]} tokens per caption and the model's context holds "
                f"{limit}; pad and truncate them to that length"
            )
        if tokens.numel() and (tokens.min() < 0 or (size is not None and tokens.max() >= size)):
            known = "token ids are at least 0" if size is None else f"the model's vocabulary has {size} entries"
            raise InputError(
                f"the tokenizer returned ids from {int(tokens.min())} to {int(tokens.max())} and {known}; use the "
                "tokenizer the model was trained with"
            )


def normalise(features: Tensor) -> Tensor:  # [B, D] -> [B, D]
    """Scale rows to length 1. Half-precision rows are widened to float32 first; a zero row stays zero."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return F.normalize(features, dim=-1, eps=SMALLEST_NORM)


def longest_stack(modules: Iterator[nn.Module]) -> list[nn.Module]:
    """Return the longest list of children of one class with parameters in `modules`: a tower's repeated blocks."""
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


def _shortened(caption: str, length: int = 60) -> str:
    return caption if len(caption) <= length else caption[: length - 1] + "…"


@dataclass(frozen=True)
class Family:
    """A kind of model that `load_model` accepts.

    name: as in `ClipAdapter.kind`. instance: what to call one of its models in a message.
    strings: the strings that name its models, each with an example where it has one. marker: the file that makes a
    folder one of its saved models. model_type: of a transformers folder, the "model_type" in its config.json.
    matches: whether a module is one of its models. wrap: the adapter of such a module; takes tokenizer, transform and
    truncate as keywords. opens: whether a string names one of its models. load: the adapter of that string.
    """

    name: str
    instance: str
    strings: tuple[str, ...]
    marker: str
    matches: Callable[[nn.Module], bool]
    wrap: Callable[..., ClipAdapter]
    opens: Callable[[str], bool]
    load: Callable[[str, dict[str, Any]], ClipAdapter]
    model_type: str | None = None


def first_lines(error: BaseException) -> str:
    """Return the first three lines of an error's text; some libraries add long lists after them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400].rstrip(".") or type(error).__name__


def hint_of_run(folder: Path, markers: Sequence[str]) -> str:
    """Name the saved model in a run's folder, which is often given in its place; empty if there is none."""
    model = folder.expanduser() / "model"
    return f"; did you mean {folder / 'model'}?" if any((model / marker).is_file() for marker in markers) else ""
