"""Measure whether a text-to-image pipeline still paints a concept with an unlearned text encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.evaluation.painting import Painter, check_encoder, check_seeds
from cliperase_fast.models import load_model
from cliperase_fast.models.runtime import inference

__all__ = ["FORGET", "Generation", "Judge", "Painted", "compare_generation"]

FORGET = "forget"  # the group of the prompts that ask for the concept
_Z = 1.959964  # of a normal distribution, for intervals of 95 %


@dataclass(frozen=True)
class Judge:
    """Name what a picture shows.

    score: pictures float32 [B, 3, H, W] from 0 to 1, on the CPU -> scores [B, C], the largest for the class that is
    seen. classes: the names of the C classes. It must be frozen: neither trained nor unlearned with the text encoder.
    """

    score: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    name: str = "a classifier"

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise InputError(f"a judge needs at least two different classes, not {list(self.classes)}")

    @classmethod
    def zero_shot(
        cls, model: Any, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}",), *, device: str = "cpu"
    ) -> Judge:
        """Return a judge that compares pictures with captions of the classes.

        model: a CLIP, as for `load_model`: the original, not the unlearned one. templates: captions with {} for the
        class.
        """
        adapter = load_model(model, device=device)
        if adapter.transform is None:
            raise InputError(f"the judge {type(adapter.module).__name__} has no image transform: pass a function")
        transform = adapter.transform
        captions = [template.replace("{}", name) for name in classes for template in templates]
        with inference(adapter.module, adapter.device, "fp32"):
            features = adapter.encode_text(adapter.tokenize(captions)).unflatten(0, (len(classes), len(templates)))
        of_class = F.normalize(features.mean(1), dim=-1)  # [C, D]

        def score(images: Tensor) -> Tensor:
            pictures = [Image.fromarray(picture) for picture in _bytes(images).permute(0, 2, 3, 1).numpy()]
            pixels = torch.stack([transform(picture) for picture in pictures]).to(adapter.device)
            with inference(adapter.module, adapter.device, "fp32"):
                return (adapter.encode_image(pixels) @ of_class.T).cpu()

        return cls(score, tuple(classes), f"zero-shot {type(adapter.module).__name__}")

    @torch.no_grad()
    def see(self, pictures: Tensor, batch_size: int = 64) -> np.ndarray:  # uint8 [n, 3, H, W] -> int64 [n]
        """Return the class of each picture."""
        found = []
        for part in pictures.split(batch_size):
            scores = torch.as_tensor(self.score(part.float() / 255), dtype=torch.float32, device="cpu")
            if scores.shape != (len(part), len(self.classes)):
                raise InputError(
                    f"the judge returned scores {list(scores.shape)} for {len(part)} pictures and {len(self.classes)} "
                    "classes: return [B, C]"
                )
            if not scores.isfinite().all():
                raise UnlearningError("the judge's scores are not finite")
            found.append(scores.argmax(1))
        return torch.cat(found).numpy()


@dataclass(frozen=True)
class Painted:
    """The pictures of a prompt, uint8 [N, 3, H, W], and what the judge sees in each."""

    group: str
    prompt: str
    asked: str
    before: Tensor
    after: Tensor
    seen_before: list[str]
    seen_after: list[str]
    hidden_before: np.ndarray  # bool [N], made black by a safety checker
    hidden_after: np.ndarray

    @property
    def blocked(self) -> np.ndarray:  # bool [N]
        return self.hidden_before | self.hidden_after


@dataclass(frozen=True)
class Generation:
    """What was found. content: the figures, ready for JSON, see `compare_generation`. concept: its classes."""

    content: dict[str, Any]
    painted: list[Painted]

    @property
    def concept(self) -> list[str]:
        return list(self.content["concept"])


def compare_generation(
    pipeline: Any,
    after: Any,
    judge: Judge,
    forget: Mapping[str, str],
    neighbours: Mapping[str, Mapping[str, str]] | None = None,
    *,
    before: Any = None,
    concept: Sequence[str] | None = None,
    images: int = 8,
    seeds: Sequence[int] | None = None,
    encoder: str | None = None,
    batch_size: int = 8,
    options: Mapping[str, Any] | None = None,
    painted_before: Generation | None = None,
    progress: bool = False,
) -> Generation:
    """Paint the same prompts with the same seeds before and after unlearning, and let a frozen judge look.

    pipeline: of diffusers, or anything that is called like it. Its own text encoder is in place again afterwards.
    after: the unlearned text encoder, as `cf.export.to_diffusers_text_encoder` returns it. It is not changed; a copy
        takes the pipeline's dtype and device.
    forget: {prompt: the judge's class that it asks for} of the concept.
    neighbours: {group: {prompt: class}} of other classes, whose pictures should stay as they are.
    before: the text encoder before; the pipeline's own if None.
    concept: the classes of the concept; those that `forget` asks for if None.
    images: pictures of each prompt, with the seeds 0, 1, ...; or `seeds`, all different.
    encoder: which text encoder to replace, such as "text_encoder_2", where the pipeline has several.
    options: more arguments of the pipeline's call, such as {"num_inference_steps": 30}.
    painted_before: an earlier result with the same pipeline, prompts and seeds, whose pictures before are used again.

    The content is {"concept", "classes", "judge", "seeds", "options", "groups": {group: scores}, "prompts": [scores],
    "notes"}. Scores hold `pictures`, those that are judged; `blocked`, pictures that are black before or after, because
    a safety checker hid them, which are not judged; `asked` and `concept`, the shares of pictures that show the class
    asked for, or any class of the concept, as {"before", "after", "change"} with {"value", "low", "high"} each, and
    `lost` and `gained`, the pairs that differ; `identical`, pairs with equal pixels; `pixel_change`, the mean absolute
    difference, from 0 to 1. Intervals are 95 %: Wilson's of a share, Newcombe's of the change of paired pictures
    (Statistics in Medicine 17, 1998).

    Raises InputError before anything is painted, UnlearningError if every picture of the concept was hidden.
    """
    groups = {FORGET: dict(forget), **{name: dict(of) for name, of in (neighbours or {}).items()}}
    concept = list(concept) if concept is not None else list(dict.fromkeys(forget.values()))
    _check(groups, neighbours or {}, concept, judge)
    painter = Painter(pipeline, check_seeds(images, seeds), encoder=encoder, options=options, batch_size=batch_size)
    for given in (before, after):
        if given is not None:
            check_encoder(painter.own, given)
    if after is None:
        raise InputError("after is None: pass the unlearned text encoder")
    asks = [(group, prompt, asked) for group, of in groups.items() for prompt, asked in of.items()]
    prompts = list(dict.fromkeys(prompt for _, prompt, _ in asks))
    if painted_before is None:
        first, hidden = painter.paint(before, prompts, what="painting before", progress=progress)
    else:
        first, hidden = _earlier(painted_before, prompts, painter)
    second, hidden_too = painter.paint(after, prompts, what="painting after", progress=progress)
    if first.shape != second.shape:
        raise UnlearningError(f"the pictures changed their size, {list(first.shape)} to {list(second.shape)}")
    names = [
        [[judge.classes[seen] for seen in row] for row in judge.see(pictures.flatten(0, 1)).reshape(hidden.shape)]
        for pictures in (first, second)
    ]
    row = {prompt: at for at, prompt in enumerate(prompts)}
    painted = [
        Painted(group, prompt, asked, first[at], second[at], names[0][at], names[1][at], hidden[at], hidden_too[at])
        for group, prompt, asked in asks
        for at in (row[prompt],)
    ]
    content: dict[str, Any] = {
        "concept": concept,
        "classes": len(judge.classes),
        "judge": judge.name,
        "seeds": painter.seeds,
        "options": _printable(painter.options),
        "groups": {name: _scores([one for one in painted if one.group == name], concept) for name in groups},
        "prompts": [
            {"group": one.group, "prompt": one.prompt, "class": one.asked, **_scores([one], concept)} for one in painted
        ],
        "notes": _notes(painted),
    }
    if content["groups"][FORGET]["pictures"] == 0:
        raise UnlearningError(
            "every picture of the concept is black before or after: the pipeline's safety checker hides them; load the "
            "pipeline with safety_checker=None to measure it"
        )
    return Generation(content, painted)


def _check(
    groups: Mapping[str, Mapping[str, str]], neighbours: Mapping[str, Any], concept: Sequence[str], judge: Judge
) -> None:
    if FORGET in neighbours:
        raise InputError(f"a group of neighbours is named {FORGET!r}: give it another name")
    for name, of in groups.items():
        if not of:
            raise InputError(f"{name!r} has no prompts: give {{prompt: class}}")
    unknown = sorted({*concept, *(asked for of in groups.values() for asked in of.values())} - set(judge.classes))
    if unknown:
        raise InputError(
            f"the judge cannot name {unknown[0]!r}: its classes are {', '.join(list(judge.classes)[:10])}"
            f"{', ...' if len(judge.classes) > 10 else ''}"
        )
    if not concept:
        raise InputError("concept is empty: name the judge's classes that show it")
    if not set(groups[FORGET].values()) & set(concept):
        raise InputError(f"no prompt of {FORGET!r} asks for a class of the concept ({', '.join(concept)})")


def _printable(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if isinstance(value, (int, float, str))}


def _earlier(found: Generation, prompts: Sequence[str], painter: Painter) -> tuple[Tensor, np.ndarray]:
    """Return the pictures before of an earlier result."""
    known = {one.prompt: one for one in found.painted}
    same = found.content["seeds"] == painter.seeds and found.content["options"] == _printable(painter.options)
    if not same or any(prompt not in known for prompt in prompts):
        raise InputError("painted_before has other prompts, seeds or options: leave it out")
    pictures = torch.stack([known[prompt].before for prompt in prompts])
    return pictures, np.stack([known[prompt].hidden_before for prompt in prompts])


def _scores(painted: Sequence[Painted], concept: Sequence[str]) -> dict[str, Any]:
    """Return the scores of some prompts."""
    shown = np.concatenate([~one.blocked for one in painted])
    before, after = (torch.cat([getattr(one, when) for one in painted])[shown] for when in ("before", "after"))
    difference = (before.float() - after.float()).abs().flatten(1) / 255  # [n, pixels]
    seen = [[(one, name) for one in painted for name in getattr(one, when)] for when in ("seen_before", "seen_after")]
    as_asked = [np.array([name == one.asked for one, name in of]) for of in seen]
    as_concept = [np.array([name in concept for _, name in of]) for of in seen]
    return {
        "pictures": int(shown.sum()),
        "blocked": int((~shown).sum()),
        "asked": _paired(as_asked[0][shown], as_asked[1][shown]),
        "concept": _paired(as_concept[0][shown], as_concept[1][shown]),
        "identical": int((difference == 0).all(1).sum()),
        "pixel_change": float(difference.mean()) if len(difference) else None,
    }


def _paired(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return the shares of two bool arrays [n] whose elements belong together, and their difference."""
    count = len(before)
    if count == 0:
        nothing = {"value": None, "low": None, "high": None}
        return {"before": nothing, "after": nothing, "change": nothing, "lost": 0, "gained": 0}
    first, second = _share(int(before.sum()), count), _share(int(after.sum()), count)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    margins = math.sqrt((both + lost) * (gained + neither) * (both + gained) * (lost + neither))
    excess: float = both * neither - lost * gained
    if excess > 0:  # the correction that makes the correlation smaller
        excess = max(excess - count / 2, 0)
    correlation = excess / margins if margins else 0.0

    def width(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * correlation * one * other + other * other, 0.0))

    change = second["value"] - first["value"]
    below = width(second["value"] - second["low"], first["high"] - first["value"])
    above = width(second["high"] - second["value"], first["value"] - first["low"])
    return {
        "before": first,
        "after": second,
        "change": {"value": change, "low": change - below, "high": change + above},
        "lost": lost,
        "gained": gained,
    }


def _share(hits: int, count: int) -> dict[str, float]:
    """Return a share with Wilson's interval."""
    share, square = hits / count, _Z * _Z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return {"value": share, "low": max(0.0, min(centre - half, share)), "high": min(1.0, max(centre + half, share))}


def _notes(painted: Sequence[Painted]) -> list[str]:
    hidden, count = sum(int(one.blocked.sum()) for one in painted), sum(len(one.blocked) for one in painted)
    if hidden == 0:
        return []
    return [
        f"{hidden} of {count} pairs of pictures contain a black picture, as returned by a safety checker for "
        "flagged content; they are not judged"
    ]


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
