"""SLUG: one step on one layer.

    g_f = gradient of the mean cosine of the forget pairs, g_r = gradient of the retain pairs' CLIP loss
    importance of a layer = |g_f| / |weight|,  alignment = |cos(g_f, g_r)|
    layers to try: in each tower those that no other one beats in both, more important and less aligned
    weight -= step * g_f,  step from |weight| / (10 |g_f|), doubled, then bisected until no forget pair is recognised

Gradients are means over joint batches, one pass over the forget pairs. A layer is one weight tensor of at least two
dimensions; biases, norms, the scale, positions and embeddings are left out. A forget pair is recognised if its class or
caption is among the first five, and with fewer than 50 classes or captions if it is the first. Each layer has
`evaluations` (10) evaluations on the validation split, and the best of all of them, by the rule of `retain_floor`, is
kept: exactly one tensor differs from the original.

Source: "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025.

Limits: the gradient is taken once, so a long step follows a straight line that the loss may not. Each layer of the
fronts costs ten passes over the validation split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.unlearning.methods.clip_losses import retain_clip_loss
from cliperase_fast.unlearning.methods.gradients import GradientMethod, forget_batches, gradients
from cliperase_fast.unlearning.methods.strength import EVALUATIONS, search_strength
from cliperase_fast.unlearning.objective import BatchFeatures
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate

_FEW = 50  # classes or captions, below which only the first one counts as recognised
_POSITIONS = ("pos", "embed")  # in names of parameters


@dataclass(frozen=True)
class SLUGOptions:
    """evaluations: on the validation split, of each layer."""

    evaluations: int = EVALUATIONS

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise InputError(f"evaluations={self.evaluations} must be at least 1")


class Layer(NamedTuple):
    """A weight tensor with its scores. tower: image, text, or None if its name does not tell."""

    name: str
    tower: str | None
    importance: float
    alignment: float


class SingleLayerUnlearningGradient(GradientMethod):
    """A step on one layer, see the module."""

    name = "slug"
    summary = "one gradient step on one layer, chosen by importance and alignment"
    source = "SLUG, ICML 2025"
    Options = SLUGOptions

    def edit(self, run: Run, evaluate: Callable[[], Candidate]) -> None:
        step_of, retain = mean_gradients(run)
        names = [name for name, _ in run.parameters]
        weights = dict(run.parameters)
        chosen = set(layer_names(run.student)) & set(names)
        layers = [
            measure_layer(name, run.student.tower(name), weights[name], step_of[name], retain[name])
            for name in names
            if name in chosen and float(step_of[name].norm()) > 0 and float(weights[name].norm()) > 0
        ]
        fronts = pareto_fronts(layers)
        if not fronts:
            raise UnlearningError("no weight matrix of the towers has a gradient of the forget pairs' cosine")
        run.say("trying %d layers: %s", len(fronts), ", ".join(layer.name for layer in fronts))
        for layer in fronts:
            self._try(run, weights[layer.name], step_of[layer.name], evaluate)

    def _try(self, run: Run, weight: Tensor, gradient: Tensor, evaluate: Callable[[], Candidate]) -> None:
        """Search for the step on one layer, and put its weight back."""
        original = weight.detach().clone()

        def evaluate_at(step: float) -> Candidate:
            weight.copy_(original - step * gradient)
            return evaluate()

        first = float(original.norm() / (10 * gradient.norm()))
        search_strength(
            evaluate_at,
            lambda candidate: recognised(run, candidate) > 0,
            first=first,
            evaluations=self.options.evaluations,
        )
        weight.copy_(original)


def mean_gradients(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return g_f and g_r by the names of `run.parameters`."""
    names, batches = [name for name, _ in run.parameters], forget_batches(run)
    sums = [[torch.zeros_like(parameter) for _, parameter in run.parameters] for _ in range(2)]
    for found in gradients(run, run.loader, range(batches), [forget_cosine, retain_clip_loss]):
        for total, parts in zip(sums, found, strict=True):
            for into, part in zip(total, parts, strict=True):
                into.add_(part, alpha=1 / batches)
    return dict(zip(names, sums[0], strict=True)), dict(zip(names, sums[1], strict=True))


def forget_cosine(features: BatchFeatures) -> Tensor:
    """Return the mean cosine of the forget pairs of all ranks."""
    whole = features.gather()
    return (whole.forget_image * whole.forget_text).sum(1).mean()


def layer_names(model: ClipAdapter) -> list[str]:
    """Return the names of the weights that count as layers."""
    embeddings = {
        id(parameter)
        for part in model.module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters()
    }
    return [
        name
        for name, parameter in model.module.named_parameters()
        if parameter.ndim > 1
        and model.tower(name) != "scale"
        and id(parameter) not in embeddings
        and not any(word in name.lower() for word in _POSITIONS)
    ]


def measure_layer(name: str, tower: str | None, weight: Tensor, forget: Tensor, retain: Tensor) -> Layer:
    """Compute a layer's importance and alignment from its gradients. forget, weight: not zero."""
    across = float(forget.norm() * retain.norm())
    alignment = abs(float((forget * retain).sum())) / across if across > 0 else 0.0
    return Layer(name, tower, float(forget.norm() / weight.norm()), alignment)


def pareto_fronts(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers that no other layer of the same tower beats: more important and less aligned."""

    def beats(one: Layer, other: Layer) -> bool:
        no_worse = one.importance >= other.importance and one.alignment <= other.alignment
        return no_worse and one[2:] != other[2:] and one.tower == other.tower

    return [layer for layer in layers if not any(beats(other, layer) for other in layers)]


def recognised(run: Run, candidate: Candidate) -> float:
    """Return the share of validation forget pairs recognised by the student that the candidate was made from."""
    part = run.data.validation
    if len(part.pairs.classes or part.pairs.different_captions()[0]) < _FEW:
        return candidate.forget
    encoded = run.evaluator.encode(run.student, part)
    if part.pairs.classes is None:
        found: float = run.evaluator.score(encoded, part)["forget"]["image_to_text_r@5"]
        return found
    assert encoded.class_features is not None and part.pairs.labels is not None
    member = np.flatnonzero(part.forget_mask)
    images, labels = encoded.image_features[member], part.pairs.labels[member]
    return own_class_among_first(images, encoded.class_features, labels, part.pairs.class_kinds)


def own_class_among_first(
    images: Tensor, classes: Tensor, labels: np.ndarray, kinds: np.ndarray | None = None, first: int = 5
) -> float:
    """Return the share of images [n, D] with their class among the nearest of the classes [C, D] of its kind.

    labels: int64 [n]. kinds: int64 [C]; None if all classes are of one kind. first: how many classes count.
    """
    similarities = images @ classes.T  # [n, C]
    own = similarities.gather(1, torch.as_tensor(labels, dtype=torch.int64, device=images.device)[:, None])
    if kinds is not None:
        others = torch.as_tensor(kinds[labels][:, None] != kinds, dtype=torch.bool, device=images.device)
        similarities = similarities.masked_fill(others, -torch.inf)
    return float(((similarities > own).sum(1) < first).double().mean())
