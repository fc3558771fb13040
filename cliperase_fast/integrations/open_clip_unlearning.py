"""Run CLIPErase in open_clip's own training loop, with forget shards beside the training data and a frozen teacher.

Inside a `with` block two functions of the loop are replaced: `get_data` yields batches whose first rows are pairs to
forget, and `create_loss` (`create_task` in open_clip 4) makes a loss that treats those rows as such. The teacher is
open_clip's own, from `--distill-model` and `--distill-pretrained`: the checkpoint that training starts from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cliperase_fast.coercion import whole
from cliperase_fast.distributed import LOCAL, WORLD
from cliperase_fast.errors import InputError
from cliperase_fast.integrations.open_clip import import_trainer
from cliperase_fast.losses import CLIPEraseLoss


class UnlearningLoss(nn.Module):
    """CLIPErase's loss with the arguments and results of open_clip's DistillClipLoss.

    forget_pairs: how many rows at the start of each batch are pairs to forget; the others are kept.
    loss: the weights and options. Its weighted terms are returned as `forget_loss`, `retain_loss` and
    `consistency_loss`, which sum to its total. With process_group="world" the batch is that of all ranks.
    """

    def __init__(self, forget_pairs: int, loss: CLIPEraseLoss) -> None:
        super().__init__()
        self.forget_pairs, self.loss = forget_pairs, loss

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """Return the total, 0-d, or a dict of the weighted terms. Features are [forget_pairs + n, D]."""
        m = self.forget_pairs
        terms = self.loss(
            image_features[:m], text_features[:m], image_features[m:], text_features[m:], dist_image_features[m:],
            dist_text_features[m:], logit_scale, dist_logit_scale,
        )  # fmt: skip
        if not output_dict:
            return terms.total
        return {
            "forget_loss": self.loss.lambda_forget * terms.forget,
            "retain_loss": self.loss.lambda_retain * terms.retain,
            "consistency_loss": self.loss.lambda_consistency * terms.consistency,
        }


def _concatenate(forget: Any, retain: Any) -> Any:
    """Concatenate two batches of open_clip's loader: tuples up to version 3, dicts from 4 on."""
    if isinstance(retain, dict):
        return {name: _concatenate(forget[name], part) for name, part in retain.items()}
    if isinstance(retain, Tensor):
        return torch.cat([forget, retain])
    return tuple(map(_concatenate, forget, retain))


class _Mixed:
    """A loader of batches whose first rows come from `forget`, which restarts whenever it ends."""

    def __init__(self, forget: Any, retain: Any) -> None:
        self.forget, self.retain, self.epoch = forget, retain, 0
        self.dataloader = self
        self.num_batches = retain.dataloader.num_batches
        self.num_samples = retain.dataloader.num_samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.retain.set_epoch(epoch)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        forget = self._endless()
        for batch in self.retain.dataloader:
            yield _concatenate(next(forget), batch)

    def _endless(self) -> Iterator[Any]:
        rounds = self.epoch * max(1, self.num_batches)  # no order repeats
        while True:
            self.forget.set_epoch(rounds)
            rounds += 1
            found = False
            for batch in self.forget.dataloader:
                found = True
                yield batch
            if not found:
                raise InputError("the forget data have less than one batch of forget pairs; lower forget_pairs")


@contextmanager
def unlearning(
    forget_data: str, forget_pairs: int, loss: CLIPEraseLoss | None = None, *, forget_samples: int | None = None
) -> Iterator[None]:
    """Make `open_clip_train.main.main(args)` unlearn inside the `with` block.

    forget_data: shards or CSV with the pairs to forget, in the same format as --train-data (the pairs to keep).
    forget_pairs: how many are in each batch on each rank, beside --batch-size pairs to keep.
    loss: a CLIPEraseLoss; None uses its defaults. With several ranks its batch is that of all ranks, and the gradients
        are those of one process with the whole batch, with --gather-with-grad or without.
    forget_samples: the number of pairs in the forget shards, if they do not say.

    Raises `InputError` if open_clip_train lacks these functions, if the arguments name no teacher, or if they need what
    the loss cannot do (--local-loss, --siglip, --horovod, and batches of several widths: --use-naflex,
    --variable-text).
    """
    trainer = import_trainer()
    making = "create_task" if hasattr(trainer, "create_task") else "create_loss"
    for seam in (making, "get_data"):
        if not hasattr(trainer, seam):
            raise InputError(
                f'this open_clip_train.main has no {seam} to add the forget pairs to: pip install "open_clip_torch<4"'
            )
    forget_pairs = whole("forget_pairs", forget_pairs, 1)
    create, get_data = getattr(trainer, making), trainer.get_data
    loss = CLIPEraseLoss() if loss is None else loss

    def create_loss(args: Any) -> nn.Module:
        chosen = loss
        if args.world_size > 1 and loss.process_group in (None, LOCAL):
            chosen = copy.copy(loss)
            chosen.process_group = WORLD
        return UnlearningLoss(forget_pairs, chosen)

    def create_task(args: Any, *rest: Any, **options: Any) -> nn.Module:
        task = create(args, *rest, **options)
        task.loss = create_loss(args)
        return task

    def data(args: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        _check(args)
        found = get_data(args, *rest, **options)
        found["train"] = _Mixed(_forget_data(get_data, args, rest, options), found["train"])
        return found

    def _forget_data(get_data: Callable[..., Any], args: Any, rest: Any, options: Any) -> Any:
        changed = copy.copy(args)
        changed.train_data, changed.train_num_samples, changed.batch_size = forget_data, forget_samples, forget_pairs
        changed.train_data_upsampling_factors = None
        changed.val_data = changed.imagenet_val = changed.imagenet_v2 = None
        return get_data(changed, *rest, **options)["train"]

    setattr(trainer, making, create_loss if making == "create_loss" else create_task)
    trainer.get_data = data
    try:
        yield
    finally:
        setattr(trainer, making, create)
        trainer.get_data = get_data


def _check(args: Any) -> None:
    if not args.distill:
        raise InputError(
            "unlearning needs the frozen teacher; pass --distill-model and --distill-pretrained, the model and "
            "checkpoint that training starts from"
        )
    if args.train_data is None:
        raise InputError("unlearning needs the pairs to keep; pass --train-data")
    for flag in ("local_loss", "siglip", "horovod", "use_naflex", "variable_text"):
        if getattr(args, flag, False):
            raise InputError(f"unlearning does not support --{flag.replace('_', '-')}; omit it")
