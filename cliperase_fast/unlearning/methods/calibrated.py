"""Calibrated forgetting: push forget pairs to their background level, and hold everything else in place.

The loss is `functional.calibrated_loss` plus two terms over single pairs, O((M + N) D):

    level = mean over the forget pairs of |C_mm - C*_mm|,    C*_mm the pair's background level
    held  = mean |I_m - I°_m|² over the forget pairs + mean (|I_i - I°_i|² + |T_i - T°_i|²) over the retain pairs

The loss alone stops above the background where concepts share their parts, as "red circle" shares red with other
shapes: its squared distance fades near the target and balances with the anchor. Nor does it lift forget pairs that have
fallen below the background, as digits do in the first steps. The absolute distance does both.

Cosines say little about what a batch does not show, such as other facts about a person who is in the forget pairs.
`held` keeps the features themselves, so that these stay where they are; only the captions of the forget pairs are free.
A class that stops near the level of related classes (`unlearning.related`) has captions that say something about those,
as "red circle" does about red things. They keep their cosines with the mean images ī_r of the related classes:

    held += RELATED mean over the forget pairs of mean_r <T_m - T°_m, ī_r>²

Without it, a search with such a caption still finds the forgotten images first, as all other cosines fall as well.
A teacher that is not the original has features of its own; then the cosines of the retain pairs are held instead:

    held  = mean over the retain pairs of (C_ii - C°_ii)²

The weights suit models whose logit scale s is at most 26. A model predicts by s C, and in one of a larger scale, such
as CLIP's 100, small distances between cosines say as much. With k = max(1, s / 26), s of the original, `level` and
`held` count k times, and the squared distances of cosines k² times: both terms of `functional.calibrated_loss` on
cosines, and the parts of `held` on cosines.

A text-to-image pipeline does not read these features but the hidden states h_1, ..., h_n of a caption's tokens, which
nothing above holds. With `lambda_hidden` there is one more term, on the captions alone:

    hidden = mean over the retain pairs of d(h, h°) + mean over the forget pairs of d(h, h*)
    d(h, h*) = mean over the tokens of |h_t - h*_t|² / |h*_t|²

The tokens are those up to the end token, and the end token of the empty caption, which pipelines read for
classifier-free guidance. h* are the mean states of the retained captions at the same place, as long as theirs are.
Tokens up to which a retained caption reads the same count in that caption only, as the tower is causal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.errors import InputError
from cliperase_fast.losses import CalibratedLoss
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.hidden_states import HiddenStates, movement, with_edited_states
from cliperase_fast.unlearning.batches import CaptionTable
from cliperase_fast.unlearning.methods.base import TrainingMethod
from cliperase_fast.unlearning.methods.calibrated_terms import joint_terms, sigmoid_terms
from cliperase_fast.unlearning.objective import BatchFeatures, Objective
from cliperase_fast.unlearning.related import UNRELATED
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.splits import Split
from cliperase_fast.unlearning.teacher import MEMORY_LIMIT, Widen

MEASURED = 256  # captions that tell how far the hidden states have moved
RELATED = 0.1  # the weight of the captions of related classes in `held`
_FORGET_CONCEPT = -1  # of all forget pairs of data whose pairs name no concept


@dataclass(frozen=True)
class CalibratedOptions:
    """Weights of the terms that only this method has.

    lambda_anchor: of the squared distance of all other cosines from the original's. lambda_held: of that of the
    features of images and of retained captions. lambda_level: of the distance of the forget pairs' cosines from their
    background level. lambda_hidden: of the term on hidden states, for text-to-image pipelines. hidden_skip: how many
    layers before the last one their hidden states are those of, as clip_skip of diffusers.
    """

    lambda_anchor: float = 30.0
    lambda_held: float = 3000.0
    lambda_level: float = 33.0
    lambda_hidden: float = 0.0
    hidden_skip: int = 0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:  # false for NaN as well
                raise InputError(f"{name}={weight} must be a finite number, 0 or larger")
        if not isinstance(self.hidden_skip, int):
            raise InputError(f"hidden_skip={self.hidden_skip} must be a whole number of layers")
        if self.hidden_skip > 0 and self.lambda_hidden == 0:
            raise InputError(f"hidden_skip={self.hidden_skip} has no effect with lambda_hidden=0: give it a weight")


class CalibratedObjective(NamedTuple):
    """The terms of `functional.calibrated_loss` and those of single pairs; unweighted but total."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor
    anchor: Tensor
    held: Tensor
    level: Tensor


class HiddenObjective(NamedTuple):
    """The terms of `CalibratedObjective`, and `hidden`."""

    total: Tensor
    retain: Tensor
    forget: Tensor
    consistency: Tensor
    anchor: Tensor
    held: Tensor
    level: Tensor
    hidden: Tensor


class Calibrated(TrainingMethod):
    """The modules of CLIPErase against an edited teacher, see the module.

    A pair's concept is its entity or class. In data without either, all forget pairs are one concept, and retain pairs
    with the same caption share theirs. The background levels are the teacher's, over the retain pairs of the training
    split.
    """

    name = "calibrated"
    summary = "CLIPErase against an edited teacher: forget pairs stop at their background level"
    source = "this library, after CLIPErase"
    needs = ("forget", "retain", "teacher")
    joint_teacher = True
    presses = True
    reads_levels = True
    unused_settings = frozenset(["forget_loss", "margin", "consistency"])
    Options = CalibratedOptions
    hidden: HiddenStates | None = None  # set by `check_model` if there is the term on hidden states

    @property
    def forget_level(self) -> str:
        # Held hidden states of forget captions become like those of all retained captions.
        held = self.settings.forget_level == "auto" and self.options.lambda_hidden > 0
        return UNRELATED if held else super().forget_level

    def check_inputs(self, teacher: Any) -> None:
        super().check_inputs(teacher)
        if self.options.lambda_hidden == 0:
            return
        weight = f"lambda_hidden={self.options.lambda_hidden:g}"
        if self.settings.trainable == "image":
            raise InputError(
                f"{weight} holds hidden states of the text tower, which trainable='image' does not change: train "
                "'text' or 'all', or leave it out"
            )
        if self.settings.deepspeed:
            raise InputError(f"{weight} does not work with DeepSpeed, which runs the towers: leave out deepspeed")
        if teacher is not None:
            raise InputError(f"{weight} holds the hidden states of the original model itself: leave out teacher=")

    def check_model(self, model: ClipAdapter, train: Split, captions: CaptionTable) -> None:
        if self.options.lambda_hidden == 0:
            return
        if not captions.complete:
            raise InputError(
                f"lambda_hidden needs the tokens of all captions in advance, and {len(captions)} different ones are "
                "too many: give fewer retain pairs, or fewer captions of each image"
            )
        self.hidden = HiddenStates.of(model, captions.first_tokens.long(), self.options.hidden_skip)
        size = 4 * len(captions) * self.hidden.row
        if size > MEMORY_LIMIT and self.settings.teacher_cache != "off":
            raise InputError(
                f"the hidden states of {len(captions)} captions take {size / 2**30:.1f} GiB, more than the "
                f"{MEMORY_LIMIT / 2**30:g} GiB that are kept in memory: set teacher_cache='off', which computes them "
                "in every step, or give fewer retain pairs"
            )

    def prepare(self, run: Run) -> None:
        if self.hidden is not None:
            run.movement = Movement(run, self.hidden)

    def widen(self, run: Run) -> Widen | None:
        layout = self.hidden
        if layout is None:
            return None

        def wide(adapter: ClipAdapter, teaches: bool) -> ClipAdapter:
            if not teaches:
                return layout.adapter(adapter)
            first = run.data.train.n_forget
            forget, retain = (_tokens(run, of) for of in (run.captions.of_pair[:first], run.captions.of_pair[first:]))
            with run.runtime.inference(adapter):
                return with_edited_states(layout, adapter, forget, retain, run.runtime.batch_size)

        return wide

    def objective(self, run: Run) -> Objective:
        settings = self.settings
        near = run.setup.models.closeness
        loss = CalibratedLoss(
            settings.lambda_retain,
            near**2 * settings.lambda_forget,
            settings.lambda_consistency,
            near**2 * self.options.lambda_anchor,
            backend=settings.backend,
            process_group=run.ranks.process_group or "local",
        )
        by_concept = run.loader.group_ids is not None and run.loader.group_ids.size > 0

        options, own_teacher, hidden = self.options, run.setup.inputs.teacher is None, self.hidden

        def terms(features: BatchFeatures) -> CalibratedObjective | HiddenObjective:
            concepts = features.group_ids if by_concept else _one_concept(features.group_ids, features.n_forget)
            terms_of = joint_terms if features.logit_bias is None else sigmoid_terms
            found = terms_of(loss, features, concepts)
            held, level = pair_terms(features, own_teacher, near)
            pressed = options.lambda_level * (run.pressure or 1.0)
            total = found.total + near * (options.lambda_held * held + pressed * level)
            parts = (*found[1:], held, level)
            if hidden is None:
                return CalibratedObjective(total, *parts)
            moved = hidden_term(features, hidden)
            return HiddenObjective(total + options.lambda_hidden * moved, *parts, moved)

        return terms


class Movement:
    """Measures how far the hidden states of retained captions, at most `MEASURED` of them, are from the original's."""

    def __init__(self, run: Run, layout: HiddenStates) -> None:
        assert run.setup.models.original is not None
        self.layout, self.runtime = layout, run.runtime
        tokens = _tokens(run, run.captions.of_pair[run.data.train.n_forget :])
        self.tokens = tokens[:: -(-len(tokens) // MEASURED)]
        self.original = self._states(run.setup.models.original)

    def __call__(self, student: ClipAdapter) -> float:
        return float(movement(self._states(student), self.original).mean())

    def _states(self, adapter: ClipAdapter) -> Tensor:
        wide = self.layout.adapter(adapter)
        with self.runtime.inference(adapter):
            rows = [wide.encode_text(part).float() for part in self.tokens.split(self.runtime.batch_size)]
        return self.layout.split(torch.cat(rows))[1]


def hidden_term(features: BatchFeatures, layout: HiddenStates) -> Tensor:
    """Return the term `hidden` of the module's formula over the pairs of all ranks; 0-d, float32 or wider."""
    assert features.text_tower is not None and features.teacher_text_tower is not None
    count = features.n_forget
    moved = movement(layout.unflatten(features.text_tower), layout.unflatten(features.teacher_text_tower))
    return _mean(moved[:count], features, 0) + _mean(moved[count:], features, 1)


def _tokens(run: Run, of_pairs: Sequence[np.ndarray]) -> Tensor:
    """Return the token ids of the different captions of some pairs, int64 [U, L]."""
    return run.captions.rows(np.unique(np.concatenate(list(of_pairs))))


def pair_terms(features: BatchFeatures, own_teacher: bool = True, closeness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the terms `held` and `level` of the module's formula over the batch of all ranks; 0-d float32.

    own_teacher: whether the teacher is the original. closeness: k of the module's formula, by which squared distances
    of cosines count more than those of features.
    """
    count = features.n_forget
    image, text, teacher_image, teacher_text = (
        features.image,
        features.text,
        features.teacher_image,
        features.teacher_text,
    )
    assert teacher_image is not None and teacher_text is not None
    assert features.background_image is not None and features.background_text is not None
    cosines = _cosines(image, text)  # [M + N]
    background = (features.background_image + features.background_text)[:count].float() / 2  # [M]
    level = (cosines[:count] - background).abs()
    if own_teacher:
        of_images = _distances(image, teacher_image)  # [M + N]
        moved = of_images[count:] + _distances(text[count:], teacher_text[count:])  # [N]
        held = _mean(moved, features, 1) + _mean(of_images[:count], features, 0)
        if features.related is not None:
            images, weights = features.related
            changes = (text - teacher_text)[:count].float() @ images.float().T  # [M, K]
            held = held + closeness * RELATED * _mean((changes.square() * weights[:count]).sum(1), features, 0)
    else:
        held = closeness * _mean((cosines - _cosines(teacher_image, teacher_text))[count:].square(), features, 1)
    return held, _mean(level, features, 0)


def _mean(part: Tensor, features: BatchFeatures, which: int) -> Tensor:
    """Return the mean over the pairs of all ranks. which: 0 for a part over forget pairs, 1 over retain pairs."""
    if features.ranks.size > 1:
        part = features.ranks.all_gather_with_gradient(part, features.counts[which])
    return part.mean()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the squared distance between rows of the same number in float32; [n, D] twice -> [n]."""
    return (rows.float() - others.float()).square().sum(1)


def _cosines(image: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of each pair in float32; unit rows [n, D] -> [n]."""
    return (image.float() * text.float()).sum(1)


def _one_concept(caption_ids: Tensor | None, n_forget: int) -> Tensor | None:
    """Return the ids [P] with one for all forget pairs, which come first; caption_ids are at least 0."""
    if caption_ids is None:
        return None
    return torch.cat([torch.full_like(caption_ids[:n_forget], _FORGET_CONCEPT), caption_ids[n_forget:]])
