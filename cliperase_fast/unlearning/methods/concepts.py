"""Which pairs of a batch show the same concept, for methods that pair an image with the caption of another one."""

from __future__ import annotations

import torch
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError
from cliperase_fast.unlearning.objective import BatchFeatures


def require_concepts(settings: UnlearnConfig) -> None:
    """Raise InputError if the settings leave out the concepts of the pairs."""
    if settings.false_negatives == "none":
        raise InputError(
            f"method={settings.method!r} tells concepts apart by the pairs' classes, entities or captions, which "
            "false_negatives='none' leaves out; use 'auto' or 'caption'"
        )


def concepts(features: BatchFeatures) -> Tensor:
    """Return the concept of each pair: its entity or class, else its caption; int64 [M + N]."""
    assert features.group_ids is not None, "see require_concepts"
    return features.group_ids


def first_of_another(own: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """Return for each of `own` [A] a place in `ids` [B] that differs from it, the first from `start` [A] on, cyclic.

    -1 where all of `ids` are the same as it. int64.
    """
    count = len(ids)
    places = torch.arange(count, dtype=torch.int64, device=ids.device)
    distance = (places[None] - start[:, None]) % max(count, 1)  # [A, B]
    distance = distance.masked_fill(own[:, None] == ids[None], count)
    nearest, place = distance.min(1)
    return torch.where(nearest < count, place, -1)
