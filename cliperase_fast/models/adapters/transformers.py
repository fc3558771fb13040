"""What the adapters of transformers' models share, the adapter of its CLIPModel, and loading one from a folder."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.extras import import_extra
from cliperase_fast.models.adapters.base import ClipAdapter, Family, Projection, Tower, first_lines
from cliperase_fast.models.adapters.open_clip import CLIP_VOCABULARY
from cliperase_fast.models.checkpoint_files import read_checkpoint
from cliperase_fast.models.equivalence import feature_difference, random_pixels, tolerance
from cliperase_fast.models.fast_paths.padding import read_length
from cliperase_fast.models.preprocessing import ImageProcessorTransform, clip_tokenizer, is_hugging_face
from cliperase_fast.models.requirements import require_no_parametrizations
from cliperase_fast.models.saving import apart
from cliperase_fast.models.state_names import match_names
from cliperase_fast.reading import user_path

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_END_OF_TEXT = 49407  # the last id of CLIP's own vocabulary
_LEGACY_END = 2  # in old configurations; such models pool at the highest id of a row, which is the end token

_TAIL = re.compile(r"(vision_model\.post_layernorm|visual_projection|text_model\.final_layer_norm|text_projection)\b")


class PretrainedAdapter(ClipAdapter):
    """Wrap a model of transformers. Subclasses name its classes there and say how it encodes.

    model_class, config_class, processor_class: names in transformers. Without `transform` it gets that image processor
    at the model's image size. Without `tokenizer` it gets none.
    """

    library = "transformers"
    _marker = "config.json"
    _number_shapes: ClassVar[dict[str, tuple[int, ...]]] = {"logit_scale": ()}
    model_class: ClassVar[str]
    config_class: ClassVar[str]
    processor_class: ClassVar[str]

    def __init__(
        self,
        module: nn.Module,
        *,
        tokenizer: Any = None,
        transform: Any = None,
        truncate: bool = False,
    ) -> None:
        self.module = module
        self._proved: nn.Module | None = None  # the module that was found to be saveable
        if transform is None:
            transform = self._default_image_processor()
        if tokenizer is None:
            tokenizer = self._default_tokenizer()
        super().__init__(module, tokenizer=tokenizer, transform=transform, truncate=truncate)

    @property
    def _config(self) -> Any:
        return self._model.config

    def _default_tokenizer(self) -> Any:
        return None

    def _default_image_processor(self) -> Any:
        import transformers

        height, width = self._image_size
        return getattr(transformers, self.processor_class)(size={"height": height, "width": width})

    @property
    def _image_size(self) -> tuple[int, int]:
        size = int(self._config.vision_config.image_size)
        return size, size

    @property
    def context_length(self) -> int:
        return int(self._config.text_config.max_position_embeddings)

    @property
    def vocabulary_size(self) -> int:
        return int(self._config.text_config.vocab_size)

    def _blocks_of(self, tower: Tower) -> list[nn.Module]:
        owner = self._model.vision_model if tower == "image" else self._model.text_model
        return list(owner.encoder.layers)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return pooled(self._model.get_image_features(pixel_values=pixels))

    def _text_features(self, tokens: Tensor) -> Tensor:
        return pooled(self._model.get_text_features(input_ids=tokens))

    def check_saveable(self) -> None:
        """Raise `InputError` unless a new model of this configuration with these weights computes the same features."""
        super().check_saveable()
        require_no_parametrizations(self.module)
        if self._proved is not self.module:
            _prove(self)
            self._proved = self.module

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state dict as `from_pretrained` reads it, with numbers in the shapes that it expects."""
        state = self.module.state_dict()
        for name, shape in self._number_shapes.items():
            if name in state and state[name].numel() == 1:
                state[name] = state[name].reshape(shape)
        return state

    def probe(self) -> tuple[Tensor, Tensor]:
        text, vision = self._config.text_config, self._config.vision_config
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (4, self.context_length)
        tokens = torch.randint(0, text.vocab_size, shape, generator=generator, dtype=torch.int64, device="cpu")
        if isinstance(text.eos_token_id, int) and text.eos_token_id < text.vocab_size:
            tokens[:, -1] = text.eos_token_id
        like = next(self.module.parameters())
        return random_pixels(self._image_size, like, int(getattr(vision, "num_channels", 3))), tokens

    def _write(self, directory: Path, final: Path) -> None:
        with _quiet():
            self._model.save_pretrained(directory, state_dict=apart(self.saved_state()))
        if self.tokenizer is not None and is_hugging_face(self.tokenizer.source):
            self.tokenizer.source.save_pretrained(directory)
        processor = self._processor_to_save()
        if processor is not None:
            processor.save_pretrained(directory)

    @classmethod
    def load_image_processor(cls, directory: Path) -> Any:
        """Load the image processor saved beside a model; None if there is none."""
        import transformers

        names = ("preprocessor_config.json", "processor_config.json")
        if not any((directory / name).is_file() for name in names):
            return None
        return transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)

    def _processor_to_save(self) -> Any:
        return self.transform.processor if isinstance(self.transform, ImageProcessorTransform) else None

    def reload(self, directory: Path) -> PretrainedAdapter:
        import transformers

        with _quiet():
            module = getattr(transformers, self.model_class).from_pretrained(directory, local_files_only=True)
        return type(self)(module, transform=self.transform)


class TransformersAdapter(PretrainedAdapter):
    """Wrap a transformers CLIPModel.

    Without `transform` it gets CLIPImageProcessor at the model's image size with CLIP's mean and standard deviation.
    Without `tokenizer`, a model with CLIP's own vocabulary (49,408 entries, end token 49407) gets open_clip's
    SimpleTokenizer, whose ids give the same features; any other model gets none. No attention mask is passed: the text
    tower is causal and pools at the first end token, so it never sees the padding after it.
    """

    kind = "transformers"
    model_class, config_class, processor_class = "CLIPModel", "CLIPConfig", "CLIPImageProcessor"

    def _default_image_processor(self) -> Any:
        import transformers

        height, width = self._image_size
        return transformers.CLIPImageProcessor(
            size={"shortest_edge": height}, crop_size={"height": height, "width": width}
        )

    def _default_tokenizer(self) -> Any:
        text = self._config.text_config
        if text.vocab_size != CLIP_VOCABULARY or text.eos_token_id not in (_END_OF_TEXT, _LEGACY_END):
            return None
        return clip_tokenizer(self.context_length)

    @property
    def unread_id(self) -> int | None:
        """Any id but the end token's: padding follows the end token, where a causal tower does not look."""
        text = self._config.text_config
        if not isinstance(text.eos_token_id, int) or getattr(text, "is_causal", True) is False:
            return None
        return 0 if text.eos_token_id != 0 else 1

    def tower(self, name: str) -> Tower | None:
        if name == "logit_scale":
            return "scale"
        return "image" if name.startswith(("vision_model.", "visual_projection.")) else "text"

    def is_tail(self, name: str) -> bool:
        return _TAIL.match(name) is not None

    def projection(self, tower: Tower) -> Projection | None:
        return Projection(self.module, "visual_projection" if tower == "image" else "text_projection", nn.Identity())

    def causal_text(self) -> tuple[nn.Module, int | None] | None:
        if type(self._model).get_text_features is not sys.modules["transformers"].CLIPModel.get_text_features:
            return None
        end = self._config.text_config.eos_token_id
        if not isinstance(end, int) or getattr(self._config.text_config, "is_causal", True) is False:
            return None
        return self._model.text_model.final_layer_norm, None if end == _LEGACY_END else end

    def _read_length(self, tokens: Tensor) -> int:
        known = self.causal_text()
        return tokens.shape[1] if known is None else read_length(tokens, known[1])

    def _check_tokens(self, tokens: Tensor) -> None:
        super()._check_tokens(tokens)
        end = self._config.text_config.eos_token_id
        if end != _LEGACY_END and isinstance(end, int) and not (tokens == end).any(dim=1).all():
            raise InputError(
                f"the tokenizer returned a caption without the end token (id {end}), where the model reads a "
                "caption's features; use the tokenizer the model was trained with"
            )


@torch.no_grad()
def _prove(adapter: PretrainedAdapter) -> None:
    """Raise `InputError` unless a new model of the class takes the weights and computes the same features."""
    import transformers

    module, name, kind = adapter.module, type(adapter.module).__name__, adapter.model_class
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin: Any = getattr(transformers, kind)(copy.deepcopy(adapter._config))
    expected, state = twin.state_dict(), adapter.saved_state()
    wrong = [f"{key}, which the configuration does not have" for key in state if key not in expected]
    wrong += [f"{key}, which it lacks" for key in expected if key not in state]
    wrong += [
        f"{key}, which is {list(state[key].shape)} where the configuration says {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    remedy = "update model.config, or save it yourself and wrap it in a module with encode_image and encode_text"
    if wrong:
        raise InputError(
            f"this {name} cannot be saved as a {kind}: its weights do not fit its configuration ({wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + f"); {remedy}"
        )
    twin.load_state_dict(state, assign=True)
    device = next(module.parameters()).device
    for owner in twin.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:  # ids of positions and of token types: rebuilt, not saved
                numbers = torch.arange(buffer.shape[-1], device=device, dtype=buffer.dtype).expand(buffer.shape)
                rebuilt = torch.zeros_like(numbers) if key == "token_type_ids" else numbers
                owner.register_buffer(key, rebuilt, persistent=False)
    difference = feature_difference(adapter, type(adapter)(twin, transform=adapter.transform))
    if difference is not None and difference > tolerance(module):
        raise InputError(
            f"this {name} cannot be saved as a {kind}: a {kind} with its weights computes features that "
            f"differ by {difference:.1e}; {remedy}"
        )


def pooled(output: Any) -> Tensor:  # -> [B, D]
    """Return the projected features: transformers 4 returns them, 5 an output that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def model_type(text: str) -> str | None:
    """Return the "model_type" in a folder's config.json; None if the string names no folder with that file."""
    file = user_path(text) / PretrainedAdapter._marker
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from error


def load(text: str, options: dict[str, Any], adapter: type[PretrainedAdapter]) -> ClipAdapter:
    """Load the model in a folder. options: tokenizer, transform and truncate."""
    folder = user_path(text)
    import_extra("transformers", f"{folder} holds a model that")
    try:
        module = _load_model(folder, adapter)
        if options["tokenizer"] is None:
            options = {**options, "tokenizer": _load_tokenizer(folder)}
        if options["transform"] is None:
            options = {**options, "transform": adapter.load_image_processor(folder)}
    except InputError:
        raise
    except Exception as error:  # missing or damaged files, wrong shapes
        raise InputError(f"the transformers model in {folder} does not load: {first_lines(error)}") from error
    return adapter(module, **options)


def _load_model(folder: Path, adapter: type[PretrainedAdapter]) -> nn.Module:
    """Load the model of a folder in float32, whatever wrapped it when it was saved."""
    import transformers

    kind = getattr(transformers, adapter.model_class)
    content = _read_weights(folder, adapter.model_class)
    with _quiet():
        config = getattr(transformers, adapter.config_class).from_pretrained(folder, local_files_only=True)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            expected = kind(config).state_dict()
        state = match_names(content, expected, folder, adapter.model_class)
        # Half-precision files widen exactly; training needs float32 weights.
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        module: Any = kind.from_pretrained(None, config=config, state_dict=state)
    return module.float().eval()


def _read_weights(folder: Path, kind: str) -> dict[str, Any]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_checkpoint(folder / name, kind)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index, kind)
    raise InputError(
        f"the transformers model in {folder} does not load: it has neither {' nor '.join(_WEIGHTS)} nor an index of "
        "their shards"
    )


def _read_shards(folder: Path, index: Path, kind: str) -> dict[str, Any]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a readable index of shards: {error}") from error
    state: dict[str, Any] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names the shard {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name!r}, which is missing; copy it into {folder}")
        state.update(read_checkpoint(folder / name, kind))
    return state


def _load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer saved beside a model; None if there is none."""
    import transformers

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars, which it shows even without a terminal, and keep standard output clean.

    It imports further libraries, and DeepSpeed's log goes to the standard output that it finds at its import.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def family_of(adapter: type[PretrainedAdapter], kind: str) -> Family:
    """Return the family of an adapter. kind: the "model_type" in the config.json of its folders."""

    def matches(module: nn.Module) -> bool:
        transformers = sys.modules.get("transformers")
        return transformers is not None and isinstance(module, getattr(transformers, adapter.model_class))

    return Family(
        name=adapter.kind,
        instance=f"a transformers {adapter.model_class}",
        strings=(f"a folder with a transformers {adapter.model_class}",),
        marker=adapter._marker,
        matches=matches,
        wrap=adapter,
        opens=lambda text: model_type(text) == kind,
        load=lambda text, options: load(text, options, adapter),
        model_type=kind,
    )


FAMILY = family_of(TransformersAdapter, "clip")
