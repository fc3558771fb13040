"""What a training method gives to the trainer: a function from the features of a joint batch to named loss terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.errors import InputError

# The fields of `BatchFeatures` with a row for each pair.
_OF_PAIRS = (
    "image", "text", "group_ids", "teacher_image", "teacher_text", "background_image", "background_text",
    "image_tower", "text_tower", "teacher_image_tower", "teacher_text_tower",
)  # fmt: skip


class RelatedImages(NamedTuple):
    """The mean image features of classes in the teacher, and which of them each pair of a batch is related to."""

    images: Tensor  # [K, D°]
    weights: Tensor  # [M + N, K], 1 / R for the R classes that the pair's class is related to, else 0


@dataclass(frozen=True)
class BatchFeatures:
    """The features of a joint batch: M forget pairs, then N retain pairs. On several ranks, this rank's share of both.

    Features are L2-normalised. Teacher features have no gradient; they are None if the method does not need them, and
    those of all pairs if it sets `joint_teacher`, which gives it the background levels of all pairs too: the mean
    cosine of an image with the captions of all retain pairs of the training split, and of a caption with their images,
    both in the teacher. Methods that set `tower_features` also get the features of each tower before its projection,
    which are not normalised.
    """

    image: Tensor  # [M + N, D]
    text: Tensor  # [M + N, D]
    logit_scale: Tensor  # a scalar, already exponentiated
    n_forget: int  # M
    group_ids: Tensor | None = None  # int64 [M + N]; pairs with equal ids are not negatives of each other
    teacher_image: Tensor | None = None  # [N, D°], or [M + N, D°]
    teacher_text: Tensor | None = None  # as teacher_image
    teacher_logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None  # a scalar, without gradient; None unless the model has the sigmoid loss
    teacher_logit_bias: Tensor | None = None
    background_image: Tensor | None = None  # [M + N]
    background_text: Tensor | None = None  # [M + N]
    related: RelatedImages | None = None  # of this rank; None unless some class has background levels of its own
    image_tower: Tensor | None = None  # [M + N, W]
    text_tower: Tensor | None = None  # [M + N, W']
    teacher_image_tower: Tensor | None = None  # as teacher_image, W wide
    teacher_text_tower: Tensor | None = None  # as teacher_text, W' wide
    ranks: Ranks = SINGLE_PROCESS
    counts: tuple[Sequence[int], Sequence[int]] = ((), ())  # forget and retain pairs of each rank

    @property
    def forget_image(self) -> Tensor:
        return self.image[: self.n_forget]

    @property
    def forget_text(self) -> Tensor:
        return self.text[: self.n_forget]

    @property
    def retain_image(self) -> Tensor:
        return self.image[self.n_forget :]

    @property
    def retain_text(self) -> Tensor:
        return self.text[self.n_forget :]

    @property
    def retain_group_ids(self) -> Tensor | None:
        return None if self.group_ids is None else self.group_ids[self.n_forget :]

    def gather(self) -> BatchFeatures:
        """Return the whole batch of all ranks.

        A loss of it that every rank computes has the gradient that the engine expects: its mean over the ranks is that
        of the whole batch.
        """
        if self.ranks.size == 1:
            return self

        def whole(rows: Tensor | None) -> Tensor | None:  # of all pairs or of the retain pairs
            if rows is None:
                return None
            n_forget = len(rows) - len(self.retain_image)
            parts = zip((rows[:n_forget], rows[n_forget:]), self.counts, strict=True)
            return torch.cat(
                [
                    self.ranks.all_gather_with_gradient(part, counts)
                    for part, counts in (parts if n_forget else [(rows, self.counts[1])])
                ]
            )

        found: dict[str, Any] = {name: whole(getattr(self, name)) for name in _OF_PAIRS}
        return replace(self, **found, n_forget=sum(self.counts[0]), related=None, ranks=SINGLE_PROCESS)


class Objective(Protocol):
    """Computes the loss terms of a batch: a named tuple of 0-d tensors whose field `total` is minimised.

    The names of the fields become the columns of metrics.jsonl. All ranks call it together.
    """

    def __call__(self, features: BatchFeatures) -> Any: ...


def checked_terms(terms: Any) -> Any:
    """Return what an objective returned. Raises InputError unless it is a named tuple of loss terms with a total."""
    if "total" not in getattr(terms, "_fields", ()):
        raise InputError(
            f"the method's objective returned a {type(terms).__name__}; it must return a named tuple of loss terms, "
            "one of them `total`"
        )
    for name, term in zip(terms._fields, terms, strict=True):
        if not isinstance(term, Tensor) or term.ndim > 0:
            found = f"a tensor {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise InputError(f"the term {name!r} of the method's objective is {found}; it must be a tensor of shape []")
    if not terms.total.requires_grad:
        raise InputError(
            "the term 'total' of the method's objective carries no gradient, so nothing would be trained; compute it "
            "from the features of the batch, without detach() and torch.no_grad()"
        )
    return terms
