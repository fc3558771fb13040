"""Make the processes that share a batch agree on the call of a loss before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from cliperase_fast.distributed import LOCAL, Group, Shards, resolve_group
from cliperase_fast.ops.registry import Backend
from cliperase_fast.validation import refuse_on_ranks

Found = TypeVar("Found")


def group_of(process_group: Any) -> Any:
    """Return `resolve_group(process_group)`; the common case "local" skips the call."""
    return None if isinstance(process_group, str) and process_group == LOCAL else resolve_group(process_group)


def agreed(
    process_group: Any,
    check: Callable[[], Found],
    describe: Callable[[Found], dict[str, object]],
    gather: str,
    batches: tuple[Tensor, ...],
    own_values: bool = False,
    counts: Callable[[], tuple[int, int]] | None = None,
) -> tuple[Found, list[Shards | None]]:
    """Run `check`, and return its result and the shards of each batch; None for each without a process_group.

    check: an InputError that it raises is raised on the other ranks too. describe: returns, for the result of `check`,
    what must be the same on every rank. batches: the image features of one or two batches; counts: returns the pairs
    of two batches that share their features.
    """
    if process_group is None:
        return check(), [None] * len(batches)
    refuse_on_ranks(*(batch for batch in batches if isinstance(batch, Tensor)))  # before the ranks talk
    group = Group(process_group)
    with group.propagate_errors():
        checked = check()
        group.check_device(batches[0].device)
        said = describe(checked)
    own = counts() if counts else (len(batches[0]), len(batches[1]) if len(batches) > 1 else 0)
    sizes = group.agree(said, own)[: len(batches)]
    return checked, [Shards(group, ranks, gather, own_values) for ranks in sizes]


def described(
    function: str,
    gather: str,
    backend: Backend,
    keep: str,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    group_ids: Tensor | None,
    **more: object,
) -> dict[str, object]:
    """Return what must be the same on every rank, without values that lie on a device."""
    tensors = {
        "image features": image,
        "text features": text,
        "logit_scale": scale,
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "group_ids": group_ids,
    }
    options: dict[str, object] = {"loss": function, "gather": gather, "keep": keep, **more, "backend": backend.name}
    for name, value in {**tensors, **more}.items():
        if isinstance(value, Tensor):
            needs = "with" if torch.is_grad_enabled() and value.requires_grad else "without"
            width = f" of width {value.shape[1]}" if value.ndim == 2 else ""
            options[name] = f"{value.dtype}{width} {needs} gradient"
        elif value is None:
            options[name] = "none"
    return options
