"""Tables of the loss terms and of their variants, which config, validation, losses and report read.

To add a forget loss or a consistency mode: an entry here. One that is not a sum over pairs also needs its computation
in `functional.py`. To add a term: an entry in `TERMS`, a field of `functional.LossTerms` and its computation there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.errors import InputError


@dataclass(frozen=True)
class Term:
    """A term of the loss."""

    name: str  # of its field in `functional.LossTerms`, and of its column in metrics.jsonl
    label: str
    weight: str  # the name of its weight
    help: str


@dataclass(frozen=True)
class ForgetLoss:
    """A way to push forget pairs apart.

    sum_over_pairs: from the products I_f * T_f [M, D] and the margin to the sum of the pairs' losses, 0-d. None for a
    loss that also needs the similarities of different pairs.
    """

    name: str
    help: str
    sum_over_pairs: Callable[[Tensor, float], Tensor] | None


@dataclass(frozen=True)
class ConsistencyMode:
    """A way to compare the student with the frozen teacher."""

    name: str
    help: str
    fused: bool = False  # computed in the sweep of the retention
    same_width: bool = False  # needs a teacher whose features have the student's width
    needs_scale: bool = True  # of the teacher


TERMS = {
    term.name: term
    for term in (
        Term("retain", "Retention", "lambda_retain", "weight of the retention (contrastive) loss"),
        Term("forget", "Forgetting", "lambda_forget", "weight of the forgetting loss"),
        Term("consistency", "Consistency", "lambda_consistency", "weight of the consistency (KL) loss"),
    )
}

FORGET_LOSSES = {
    loss.name: loss
    for loss in (
        ForgetLoss("cosine", "the mean cosine of forget pairs", lambda products, margin: products.sum()),
        ForgetLoss(
            "hinge",
            "the same, down to the margin",
            lambda products, margin: F.relu(products.sum(1) - margin).sum(),
        ),
        ForgetLoss("contrastive", "minus their CLIP loss (gradient ascent)", None),
    )
}

CONSISTENCY_MODES = {
    mode.name: mode
    for mode in (
        ConsistencyMode("logits", "similarities of images and texts", fused=True),
        ConsistencyMode("features", "softmax over the features", same_width=True, needs_scale=False),
        ConsistencyMode("intra", "similarities within each modality"),
    )
}


def described(variants: Collection[ForgetLoss] | Collection[ConsistencyMode]) -> str:
    """Return the names with what they mean, for a help text."""
    return "; ".join(f"{variant.name}: {variant.help}" for variant in variants)


def check_name(what: str, value: object, known: Collection[str]) -> None:
    """Raise InputError, with the nearest known name, unless `value` is one of `known`."""
    if isinstance(value, str) and value in known:
        return
    hint = nearest_name(value, known) or f"; use one of {', '.join(known)}"
    raise InputError(f"{what}={value!r} is not known{hint}")


def nearest_name(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name nearest to `name`, or "" if none is near."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
