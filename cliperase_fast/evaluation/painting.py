"""Paint with a diffusers pipeline: the same seeds for each prompt, and any text encoder in place of the pipeline's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.coercion import shortly, whole
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.errors import InputError, UnlearningError, is_out_of_memory
from cliperase_fast.models.runtime import evaluating
from cliperase_fast.progress import Steps

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# What must agree, with its name in transformers' configurations.
_SIZES = {"hidden size": "hidden_size", "vocabulary": "vocab_size", "context length": "max_position_embeddings"}
_OURS = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict")


def encoder_name(pipeline: Any, name: str | None = None) -> str:
    """Return the attribute of the pipeline's text encoder. name: which one, of several.

    Raises InputError for a pipeline without one, for one of several that is not named, and for an unknown name.
    """
    what = type(pipeline).__name__
    known = [each for each in _ENCODERS if isinstance(getattr(pipeline, each, None), nn.Module)]
    if not callable(pipeline) or not known:
        raise InputError(
            f"pipeline is a {what} without a text encoder; pass a diffusers pipeline that paints from text, with its "
            "text_encoder loaded"
        )
    if name is None and len(known) > 1:
        raise InputError(f"the {what} has several text encoders, {', '.join(known)}: name one, encoder={known[0]!r}")
    if name is not None and name not in known:
        raise InputError(f"encoder={name!r} is not a text encoder of the {what}, which has {', '.join(known)}")
    return name or known[0]


def check_encoder(own: nn.Module, encoder: Any) -> None:
    """Raise InputError unless `encoder` can stand in for the pipeline's own."""
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "config"):
        raise InputError(
            f"the text encoder is a {type(encoder).__name__}, not a text model of transformers; convert a CLIP with "
            "cf.export.to_diffusers_text_encoder(model)"
        )
    projected = hasattr(own, "text_projection")
    if projected and not hasattr(encoder, "text_projection"):
        raise InputError(
            f"the pipeline's text encoder is a {type(own).__name__}, and the {type(encoder).__name__} has no "
            "projection; convert it with cf.export.to_diffusers_text_encoder(model, projection=True)"
        )
    sizes = dict(_SIZES, projection="projection_dim") if projected else _SIZES
    for name, field in sizes.items():
        wanted, given = (getattr(model.config, field, None) for model in (own, encoder))
        if wanted != given:
            raise InputError(
                f"the text encoder has {name} {given}, but that of the pipeline has {wanted}: unlearn the CLIP whose "
                "text tower the pipeline was trained with"
            )


def check_seeds(images: int, seeds: Sequence[int] | None) -> list[int]:
    """Return the seeds, one for each picture of a prompt."""
    if seeds is None:
        return list(range(whole("images", images, 1)))
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise InputError(f"seeds={shortly(seeds)} must be a list of whole numbers")
    found = [seed.item() if isinstance(seed, (np.generic, Tensor)) else seed for seed in seeds]
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            raise InputError(f"seeds has {shortly(seed)}: give whole numbers of at most 64 bits")
    if not found:
        raise InputError("seeds is empty: give one for each picture of a prompt")
    if len(set(found)) < len(found):
        twice = next(seed for at, seed in enumerate(found) if seed in found[:at])
        raise InputError(f"seeds has {twice} twice, which would count the same picture twice: give different seeds")
    return found


class Painter:
    """Paint with a pipeline.

    encoder: the attribute of its text encoder, if it has several. seeds: of the pictures of each prompt. options: more
    arguments of the pipeline's call, such as num_inference_steps. batch_size: pictures at a time. Each picture has a
    generator of its own on the CPU, so that it depends on neither the batch nor the device, up to rounding.
    """

    def __init__(
        self,
        pipeline: Any,
        seeds: Sequence[int],
        *,
        encoder: str | None = None,
        options: Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> None:
        self.pipeline, self.seeds = pipeline, list(seeds)
        self.name = encoder_name(pipeline, encoder)
        self.own: Any = getattr(pipeline, self.name)
        self.options, self.batch_size = dict(options or {}), whole("batch_size", batch_size, 1)
        taken = sorted(set(self.options) & set(_OURS))
        if taken:
            raise InputError(f"options must not set {', '.join(taken)}, which the prompts and seeds decide")
        unknown = _not_taken(pipeline, [*_OURS[:3], *self.options])
        if unknown:
            raise InputError(f"the {type(pipeline).__name__} cannot be called with {', '.join(unknown)}=")
        if any(hasattr(part, "_hf_hook") for part in _modules(pipeline)):
            raise InputError(
                "the pipeline offloads its models; load it without offloading, or call its remove_all_hooks(), and "
                "move it with .to(device)"
            )

    @torch_defaults()
    def paint(
        self, encoder: Any, prompts: Sequence[str], *, what: str = "painting", progress: bool = False
    ) -> tuple[Tensor, np.ndarray]:
        """Paint every prompt with every seed. encoder: the text encoder to use; None for the pipeline's own.

        Returns pictures uint8 [P, N, 3, H, W] and which of them a safety checker made black, bool [P, N].
        Raises UnlearningError if the pipeline fails or a picture is not finite.
        """
        jobs = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        pictures, blocked = [], []
        with self._prepared(encoder), Steps(len(jobs), what, "picture", bar=progress) as steps:
            for start in range(0, len(jobs), self.batch_size):
                part = jobs[start : start + self.batch_size]
                found, hidden = self._call(part)
                pictures.append(found)
                blocked += hidden
                steps.update(len(part))
        shape = (len(prompts), len(self.seeds))
        return torch.cat(pictures).unflatten(0, shape), np.array(blocked, dtype=bool).reshape(shape)

    def _call(self, jobs: Sequence[tuple[str, int]]) -> tuple[Tensor, list[bool]]:
        generators = [torch.Generator(device="cpu").manual_seed(seed) for _, seed in jobs]
        try:
            output = self.pipeline(
                prompt=[prompt for prompt, _ in jobs], generator=generators, output_type="np", **self.options
            )
        except (RuntimeError, ValueError, TypeError) as error:
            remedy = "; use a smaller batch_size" if is_out_of_memory(error) else ""
            raise UnlearningError(f"the pipeline failed for {jobs[0][0]!r}: {error}{remedy}") from error
        images = getattr(output, "images", None)
        values = np.asarray(images if images is not None else [], dtype=np.float32)
        if values.shape[:1] != (len(jobs),) or values.ndim != 4 or values.shape[-1] != 3:
            raise InputError(
                f"the {type(self.pipeline).__name__} returned images of shape {list(values.shape)} for {len(jobs)} "
                "prompts, not [B, H, W, 3]: pass a pipeline that paints coloured pictures"
            )
        if not np.isfinite(values).all():
            raise UnlearningError(
                f"the pictures of {jobs[0][0]!r} are not finite: the pipeline's precision overflows; use bfloat16 or "
                "float32"
            )
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(jobs)
        black = (values.reshape(len(jobs), -1) == 0).all(1)
        pixels = torch.from_numpy(np.rint(values.clip(0, 1) * 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        return pixels, [bool(flag) or bool(dark) for flag, dark in zip(flags, black, strict=True)]

    @contextmanager
    def _prepared(self, encoder: Any) -> Iterator[None]:
        """Put the encoder in, everything in evaluation mode and the pipeline's own bar away; undo it on exit."""
        pipeline, bar = self.pipeline, getattr(self.pipeline, "_progress_bar_config", None)
        with ExitStack() as stack:
            if encoder is not None:
                stack.callback(setattr, pipeline, self.name, self.own)
                setattr(pipeline, self.name, _like(encoder, self.own))
            for module in {id(part): part for part in (*_modules(pipeline), self.own)}.values():
                stack.enter_context(evaluating(module))
            if hasattr(pipeline, "set_progress_bar_config"):
                stack.callback(_set_bar, pipeline, bar)
                pipeline.set_progress_bar_config(disable=True)
            with torch.no_grad():
                yield


def _not_taken(pipeline: Any, names: Sequence[str]) -> list[str]:
    """Return those of the names that the pipeline's call has no argument for."""
    known = inspect.signature(type(pipeline).__call__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return []
    return [name for name in names if name not in known]


def _set_bar(pipeline: Any, config: dict[str, Any] | None) -> None:
    if config is None:
        vars(pipeline).pop("_progress_bar_config", None)
    else:
        pipeline._progress_bar_config = config


def _modules(pipeline: Any) -> list[nn.Module]:
    parts = getattr(pipeline, "components", None)
    found = parts.values() if isinstance(parts, Mapping) else vars(pipeline).values()
    return [part for part in found if isinstance(part, nn.Module)]


def _like(encoder: nn.Module, own: nn.Module) -> nn.Module:
    """Return the encoder with the dtype and device of the pipeline's own; a copy if they differ."""
    wanted, given = next(own.parameters()), next(encoder.parameters())
    if (given.dtype, given.device) != (wanted.dtype, wanted.device):
        encoder = copy.deepcopy(encoder).to(device=wanted.device, dtype=wanted.dtype)
    return encoder
