"""Refuse models that cannot forget anything, from a few features, before training and before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.data.images import pixel_bytes
from cliperase_fast.data.loading import stack_images
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import Background, EncodedPairs
from cliperase_fast.evaluation.encoding import SAME
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import refuse_inputs, set_training_modes, training_modes
from cliperase_fast.plurals import counted
from cliperase_fast.report.wording import plain_number
from cliperase_fast.unlearning.batches import CaptionTable
from cliperase_fast.unlearning.engines.base import train_mode
from cliperase_fast.unlearning.related import UNRELATED, concepts_of, with_levels_of_relatives
from cliperase_fast.unlearning.run import Baseline
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.selection import Target, wilson
from cliperase_fast.unlearning.splits import Split


def check_features(encoded: EncodedPairs, pairs: PairDataset) -> None:
    """Raise `InputError` if all images, or all captions, have features of zero or the same features.

    encoded: of `pairs`.
    """
    for features, what, method in (
        (encoded.image_features, "images", "encode_image"),
        (encoded.caption_features, "captions", "encode_text"),
    ):
        if len(features) == 0:
            continue
        zero = features.abs().amax(-1) == 0  # [n]
        if zero.all():
            raise InputError(
                f"{method} gives features of zero for all {len(features)} {what}, so there is no similarity to change: "
                "check the model's weights and what it does with its input"
            )
        if zero.any():
            warnings.warn(
                f"{method} gives features of zero for {int(zero.sum())} of {len(features)} {what}; they match nothing",
                stacklevel=2,
            )
        same = len(features) > 1 and bool(((features - features[0]).abs() < SAME).all())
        if same and (what == "captions" or _differ(pairs)):
            raise InputError(
                f"{method} gives all {len(features)} {what} the same features, so it does not distinguish them and "
                f"there is nothing to forget: check that {method} uses its input"
            )


def check_captions(model: ClipAdapter, captions: CaptionTable, runtime: Runtime) -> None:
    """Encode the caption with the highest token id, so that an id outside the vocabulary is an error now."""
    tokens = captions.rows([captions.highest])  # [1, L]
    failure = f"the model cannot encode a caption of {tokens.shape[1]} tokens with ids up to {int(tokens.max())}"
    with runtime.inference(model), refuse_inputs(failure, "use its own tokenizer"):
        model.encode_text(tokens)


def check_gradient(
    student: ClipAdapter,
    parameters: list[tuple[str, nn.Parameter]],
    pixels: Tensor,  # [3, H, W]
    tokens: Tensor,  # [1, L]
    config: UnlearnConfig,
    runtime: Runtime,
) -> None:
    """Raise `InputError` unless a gradient reaches the parameters of `trainable` through the features.

    Runs in training mode. The modules' modes and the random state are restored.
    """
    if not parameters:
        raise InputError(
            f"trainable={config.trainable!r} leaves nothing to train in this {type(student.module).__name__}: none of "
            "its parameters is a floating-point one of that part"
        )
    failure, remedy = "the model cannot encode a single image and caption in training mode", "correct its forward pass"
    with (
        seeded(config.seed),
        _training(student.module, config.drops_out),
        torch.enable_grad(),
        runtime.autocast(),
        refuse_inputs(failure, remedy),
    ):
        features = {  # stacked and not indexed, as autograd cannot save a view of an image made in inference mode
            "image": student.encode_image(stack_images([pixels]).to(runtime.device)),
            "text": student.encode_text(tokens),
        }
    reached = {tower: of_tower.requires_grad for tower, of_tower in features.items()}
    for tower, of_tower in features.items():
        _refuse_others_weights(student.module, of_tower, f"encode_{tower}")
    wanted = [config.trainable] if config.trainable in reached else list(reached)
    missing = [f"encode_{tower}" for tower in wanted if not reached[tower]]
    if len(missing) == len(wanted):
        raise InputError(
            f"no gradient reaches the trained parameters through {' and '.join(missing)}: nothing would be trained. "
            "The features are detached (torch.no_grad, torch.inference_mode, .detach(), numpy) or do not depend on "
            "these parameters; let them carry a gradient"
        )
    if missing:
        other = "text" if missing == ["encode_image"] else "image"
        warnings.warn(
            f"no gradient goes through {missing[0]}, so only the {other} tower is trained; if that is intended, "
            f"set trainable={other!r}",
            stacklevel=2,
        )


def _refuse_others_weights(module: nn.Module, features: Tensor, method: str) -> None:
    """Raise `InputError` if features depend on a trainable tensor that is not a parameter of the module."""
    own = {id(parameter) for parameter in module.parameters()}
    nodes, seen = [features.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise InputError(
                f"{method} of a copy of the {type(module).__name__} uses a trainable tensor {list(leaf.shape)} that is "
                "not a parameter of the copy, which would not be trained: a lambda, a weak reference or a global holds "
                "the given model or another one; reach its parts through self"
            )
        nodes += [following for following, _ in node.next_functions]


def check_teacher(
    config: UnlearnConfig,
    teacher: ClipAdapter,
    captions: CaptionTable,
    pixels: Tensor,
    student: EncodedPairs,
    runtime: Runtime,
) -> None:
    """Encode one pair, so that an unusable teacher is an error before anything is written."""
    failure, remedy = "the teacher cannot encode the model's images and tokens", "use the same image size and tokenizer"
    with runtime.inference(teacher), refuse_inputs(failure, remedy):
        image = teacher.encode_image(stack_images([pixels]).to(runtime.device))
        text = teacher.encode_text(captions.rows([captions.highest]).to(runtime.device))
    if not (image.isfinite().all() and text.isfinite().all()):
        raise InputError(
            "the teacher's features are not finite (NaN or infinity): its arithmetic overflows or divides by zero; use "
            "another teacher, or precision='fp32'"
        )
    width = text.shape[1]
    if config.consistency == "features" and width != student.image_features.shape[1]:
        raise InputError(
            f"consistency='features' compares features directly, and the teacher's are {width} wide and the model's "
            f"{student.image_features.shape[1]}; use 'logits' or 'intra' with a teacher like this"
        )


def check_forgettable(automatic: bool, level: str, part: Split, baseline: Baseline, closeness: float) -> list[str]:
    """Return a note if the model knows the forget pairs no better than by chance.

    There is no note if the pairs are too few to show this: the upper end of the 95 % interval of their score must be
    below the midpoint between chance and 1.

    automatic: whether the run trains to a target; `InputError` is raised if it would start there. level: as
    `Run.forget_level`. part: the validation split. closeness: as of `Target`.
    """
    before = baseline.validation
    if automatic:
        encoded, known = baseline.validation_encoded, "unrelated pairs"
        background = Background.of(encoded, ~part.forget_mask)  # of this split: the same but noise
        if level != UNRELATED:
            background = with_levels_of_relatives(background, part, encoded, level)
        concepts = None if background.own is None else concepts_of(part, part)
        if concepts is not None:
            known = "a model that never saw them, by the classes related to theirs"
        target = Target(background.association(encoded, part.forget_mask, concepts), part.n_forget, closeness)
        if target.reached(before):
            ours, theirs = plain_number(before.forget_similarity, 3), plain_number(target.background, 3)
            raise InputError(
                f"there is nothing to forget: on the validation split the model scores {before.forget:.1%} on the "
                f"forget pairs, whose cosine of {ours} is not above that of {known} ({theirs}) by more than "
                f"{target.association - target.background:.2g}; choose pairs that the model knows, or give numbers for "
                "learning_rate and epochs to train anyway"
            )
    choices = len(part.pairs.classes or ()) or len(baseline.validation_encoded.caption_features)
    if choices < 2 or before.forget > 1 / choices:
        return []
    low, high = wilson(before.forget, part.n_forget)
    if high >= (1 + 1 / choices) / 2:
        return []
    return [
        f"The model did not know the forget pairs better than by chance before the run: it scored {before.forget:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}) on the {counted(part.n_forget, 'forget pair')} of the validation "
        f"split, where guessing among {choices} scores {1 / choices:.1%}"
    ]


def _differ(pairs: PairDataset) -> bool:
    first = pixel_bytes(pairs.image(0))
    return any(pixel_bytes(pairs.image(index)) != first for index in range(1, len(pairs)))


@contextmanager
def _training(module: nn.Module, drops_out: bool) -> Iterator[None]:
    modes = training_modes(module)
    train_mode(module, drops_out)
    try:
        yield
    finally:
        set_training_modes(module, modes)
